"""Which modules are recognized, with which parts; the parts are checked against what the modules compute."""

import copy
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from normscope.core.errors import ArgumentError
from normscope.norms import KINDS, NormParts, declare_norm, find_norms, recognize

C = 6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def kinds(model):
    return {path: parts.kind for path, parts in find_norms(model).items()}


def imported(name):
    """Import a third-party package, whose warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


# -------- torch's own

PLAIN = {
    "batch1": (nn.BatchNorm1d(C), "batch", {"momentum": 0.1, "has_running": True, "gain": "weight", "bias": "bias"}),
    "batch2": (nn.BatchNorm2d(C, affine=False), "batch", {"momentum": 0.1, "has_running": True}),
    "cumulative": (
        nn.BatchNorm3d(C, momentum=None),
        "batch",
        {"has_running": True, "gain": "weight", "bias": "bias"},
    ),
    "bare": (nn.BatchNorm2d(C, affine=False, track_running_stats=False), "batch", {}),
    "sync": (
        nn.SyncBatchNorm(C, eps=1e-3),
        "batch",
        {"eps": 1e-3, "momentum": 0.1, "has_running": True} | {"gain": "weight", "bias": "bias"},
    ),
    "lazy": (nn.LazyBatchNorm2d(), "batch", {"momentum": 0.1, "has_running": True, "gain": "weight", "bias": "bias"}),
    "instance": (nn.InstanceNorm2d(C), "instance", {}),
    "lazy instance": (
        nn.LazyInstanceNorm1d(affine=True, track_running_stats=False),
        "instance",
        {"gain": "weight", "bias": "bias"},
    ),
    "instance running": (
        nn.InstanceNorm3d(C, track_running_stats=True),
        "instance",
        {"momentum": 0.1, "has_running": True},
    ),
    "group": (nn.GroupNorm(3, C), "group", {"groups": 3, "gain": "weight", "bias": "bias"}),
    "layer": (nn.LayerNorm(C), "layer", {"axis": -1, "normalized_ndim": 1, "gain": "weight", "bias": "bias"}),
    "layer image": (
        nn.LayerNorm((C, 4, 4), bias=False),
        "layer",
        {"axis": -1, "normalized_ndim": 3, "gain": "weight"},
    ),
    "layer bare": (nn.LayerNorm(C, elementwise_affine=False), "layer", {"axis": -1, "normalized_ndim": 1}),
    "rms": (nn.RMSNorm(C), "rms", {"axis": -1, "normalized_ndim": 1, "gain": "weight", "eps": None}),
    "lrn": (nn.LocalResponseNorm(3), "local-response", {"eps": None}),
    "lrn map": (nn.CrossMapLRN2d(3), "local-response", {"eps": None}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_torch_classes(name):
    module, kind, rest = PLAIN[name]
    assert recognize(module) == NormParts(**({"axis": 1, "eps": 1e-5, "certainty": "class"} | rest), kind=kind)


@pytest.mark.parametrize(
    "module",
    [
        nn.Softmax(-1),
        nn.Linear(C, C),
        nn.Embedding(4, C, max_norm=1.0),
        nn.Identity(),
        nn.Conv2d(C, C, 1),
        nn.LSTM(C, C),
    ],
    ids=lambda module: type(module).__name__,
)
def test_torch_modules_that_do_not_normalize(module):
    assert recognize(module) is None


def test_paths_are_in_module_order_and_shared_modules_come_once():
    shared = nn.LayerNorm(C)
    model = nn.Sequential(nn.Linear(C, C), shared, nn.Sequential(nn.BatchNorm1d(C), shared), nn.RMSNorm(C))
    assert list(find_norms(model)) == ["1", "2.0", "3"]


def test_a_norm_is_its_own_model():
    assert list(find_norms(nn.LayerNorm(C))) == [""]


# -------- hand-written norms


class ThirdRMSNorm(nn.Module):
    def __init__(self, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.variance_epsilon = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class OffsetRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(C))
        self.eps = 1e-6

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x) * (1.0 + self.weight.float())


class RootLayerNorm(ThirdRMSNorm):
    """Called layer norm, as T5 does, but it subtracts no mean."""


class BiaslessLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(C))
        self.epsilon = 1e-5

    def forward(self, x):
        centered = x - x.mean(-1, True)
        return (self.gamma + 0.0) * centered / torch.sqrt(centered.square().mean(-1, True) + self.epsilon)


class OpaqueLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C))
        self.eps = 1e-5

    def forward(self, x):
        return F.layer_norm(x, (C,), self.weight, self.bias, self.eps)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TransposingLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class FormatLayerNorm(nn.Module):
    def __init__(self, data_format):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.eps, self.data_format = 1e-6, data_format

    def forward(self, x):
        if self.data_format == "channels_last":
            return F.layer_norm(x, (C,), self.weight, self.bias, self.eps)
        x = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class VitLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.eps = 1e-6

    @staticmethod
    def _centered(x):
        return x - x.mean(dim=1, keepdim=True)

    def forward(self, x):
        x = self._centered(x)
        dim = 1
        return (
            self.weight[:, None, None] * x / torch.sqrt(x.pow(2).mean(dim, keepdim=True) + self.eps)
            + self.bias[:, None, None]
        )


class ImageRMS_norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(C, 1, 1))

    def forward(self, x):
        return F.normalize(x, dim=1) * C**0.5 * self.gamma


class ChannelRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.ones(C))

    def forward(self, x):
        return F.normalize(x) * C**0.5 * self.g[:, None, None]


class ScaleNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = C**0.5
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.scale * self.g


class SimpleRMSNorm(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1) * C**0.5


class GatedRMSNorm(ThirdRMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * F.silu(gate))


class RMSNormGated(ThirdRMSNorm):
    def forward(self, x, gate=None):
        y = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return y if gate is None else y * F.silu(gate)


class PlusOneLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class JoinedLayerNorm(nn.Module):
    """A norm without gain inside, the gain outside: one norm, whose parts are the outer module's."""

    def __init__(self, unit_offset=True):
        super().__init__()
        self.unit_offset = unit_offset
        self.ln = nn.LayerNorm(C, elementwise_affine=False)
        self.gamma = nn.Parameter(torch.full((C,), 1.0 - unit_offset))

    def forward(self, x):
        return self.ln(x) * (self.gamma + float(self.unit_offset))


DUCKS = {
    "rms": (ThirdRMSNorm(), "rms", -1, 1e-6, "weight", None, 0.0),
    "rms offset": (OffsetRMSNorm(), "rms", -1, 1e-6, "weight", None, 1.0),
    "rms called layer": (RootLayerNorm(), "rms", -1, 1e-6, "weight", None, 0.0),
    "layer without bias": (BiaslessLayerNorm(), "layer", -1, 1e-5, "gamma", None, 0.0),
    "layer by function": (OpaqueLayerNorm(), "layer", -1, 1e-5, "weight", "bias", 0.0),
    "layer by name 2d": (LayerNorm2d(C), "layer", 1, 1e-5, "weight", "bias", 0.0),
    "layer transposing": (TransposingLayerNorm(C), "layer", 1, 1e-5, "weight", "bias", 0.0),
    "layer format first": (FormatLayerNorm("channels_first"), "layer", 1, 1e-6, "weight", "bias", 0.0),
    "layer format last": (FormatLayerNorm("channels_last"), "layer", -1, 1e-6, "weight", "bias", 0.0),
    "layer by source": (VitLayerNorm(), "layer", 1, 1e-6, "weight", "bias", 0.0),
    "rms by gain shape": (ImageRMS_norm(), "rms", 1, None, "gamma", None, 0.0),
    "rms by default dim": (ChannelRMSNorm(), "rms", 1, None, "g", None, 0.0),
    "scale": (ScaleNorm(), "rms", -1, None, "g", None, 0.0),
    "rms bare": (SimpleRMSNorm(), "rms", -1, None, None, None, 0.0),
    "rms gated": (RMSNormGated(), "rms", -1, 1e-6, "weight", None, 0.0),
    "gated rms": (GatedRMSNorm(), "rms", -1, 1e-6, "weight", None, 0.0),
    "layer 1 + gain": (PlusOneLayerNorm(C), "layer", -1, 1e-5, "weight", "bias", 1.0),
    "joined": (JoinedLayerNorm(), "layer", -1, 1e-5, "gamma", None, 1.0),
    "joined without offset": (JoinedLayerNorm(unit_offset=False), "layer", -1, 1e-5, "gamma", None, 0.0),
}


@pytest.mark.parametrize("name", DUCKS)
def test_ducks(name):
    module, kind, axis, eps, gain, bias, offset = DUCKS[name]
    certainty = "class" if isinstance(module, nn.LayerNorm) else "duck"
    expected = NormParts(
        kind, axis, eps, gain=gain, bias=bias, gain_offset=offset, certainty=certainty, normalized_ndim=1
    )
    assert find_norms(module) == {"": expected}


@pytest.mark.parametrize("name", DUCKS)
@torch.no_grad()
def test_parts_agree_with_what_the_module_computes(name):
    module = DUCKS[name][0]
    parts = recognize(module)
    # channels on axis 1 of images or sequences, or last; only the right one can be normalized to these post-conditions
    shape = (5, C, 3) if isinstance(module, TransposingLayerNorm) else (5, C, 3, 4) if parts.axis == 1 else (5, 3, C)
    x = torch.randn(shape) + 2
    gain = getattr(module, parts.gain) if parts.gain else None
    if gain is not None:
        gain.fill_(1 - parts.gain_offset)
    y = module(x)
    mean, square = y.mean(parts.axis), y.square().mean(parts.axis)
    torch.testing.assert_close(square, torch.ones_like(square), rtol=1e-3, atol=1e-3)
    assert (mean.abs().max() < 1e-4) == (parts.kind == "layer")
    if gain is not None:
        gain.fill_(-parts.gain_offset)
        assert module(x).abs().max() == 0


def run_source(code):
    """Define a class whose source cannot be read."""
    space = {"nn": nn, "torch": torch}
    exec(code, space)
    return next(v for v in space.values() if isinstance(v, type) and issubclass(v, nn.Module))


@pytest.mark.parametrize(
    ("name", "bias", "kind", "offset"),
    [
        ("T5LayerNorm", False, "rms", 0.0),
        ("DebertaLayerNorm", True, "layer", 0.0),
        ("GemmaRMSNorm", False, "rms", 1.0),
        ("Gemma2RMSNorm", False, "rms", 1.0),
        ("Gemma3nRMSNorm", False, "rms", 0.0),
        ("LlamaRMSNorm", False, "rms", 0.0),
    ],
)
def test_without_source_bias_and_name_decide(name, bias, kind, offset):
    module = run_source(f"class {name}(nn.Module):\n    def forward(self, x):\n        return x - x")()
    module.weight = nn.Parameter(torch.ones(C))
    if bias:
        module.bias = nn.Parameter(torch.zeros(C))
    parts = recognize(module)
    assert (parts.kind, parts.axis, parts.gain_offset, parts.normalized_ndim) == (kind, -1, offset, 1)


def opaque(name, base="nn.Module", **tensors):
    """Build a module whose forward method says nothing."""
    module = run_source(f"class {name}({base}):\n    def forward(self, x):\n        return fused(self, x)")
    module = module() if base == "nn.Module" else module(C)
    for key, value in tensors.items():
        setattr(module, key, value)
    return module


def test_without_source_name_and_gain_shape_tell_the_axis():
    column = nn.Parameter(torch.ones(1, C, 1, 1))
    assert recognize(opaque("LayerNorm2d", "nn.LayerNorm")).axis == 1
    assert recognize(opaque("FastLayerNorm", "nn.LayerNorm")).axis == -1
    assert recognize(opaque("RMSNorm", gamma=column)).axis == 1
    assert recognize(opaque("RMSNorm", gamma=nn.Parameter(torch.ones(C)))).axis == -1


def test_gains_by_other_names_and_a_single_gain():
    old = opaque("LayerNorm", a_2=nn.Parameter(torch.ones(C)), b_2=nn.Parameter(torch.zeros(C)))
    assert (recognize(old).gain, recognize(old).bias) == ("a_2", "b_2")
    single = recognize(opaque("ScaleNorm", g=nn.Parameter(torch.ones(1, 1))))
    assert (single.kind, single.axis, single.gain) == ("rms", -1, "g")


def test_an_unknown_word_needs_evidence():
    assert recognize(opaque("TimestepNorm", eps=1e-5)).kind == "other"
    assert recognize(opaque("TimestepNorm", scale=nn.Parameter(torch.ones(C)))).kind == "other"
    assert recognize(opaque("TimestepNorm")) is None


def test_without_source_the_name_tells_the_offset():
    assert recognize(opaque("NemotronLayerNorm1P", "nn.LayerNorm")).gain_offset == 1


class FusedLayerNorm(nn.Module):
    """The source is there, but it delegates: neither a square nor a difference is to be seen."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), 1e-5

    def forward(self, x):
        return torch.ops.fused.apply(x, self.weight, self.eps)


def test_a_layer_norm_that_delegates_is_believed():
    assert recognize(FusedLayerNorm()).kind == "layer"


def test_an_uninitialized_norm_is_recognized():
    lazy = opaque("LazyRMSNorm", weight=nn.UninitializedParameter(), eps=1e-6)
    assert recognize(lazy) == NormParts("rms", -1, 1e-6, gain="weight", certainty="duck", normalized_ndim=1)


@pytest.mark.parametrize(
    "ending", ["Block", "Head", "Wrapper", "Layer", "Linear", "Embedding", "Loss", "Model", "Cell"]
)
def test_endings_that_name_something_else(ending):
    assert recognize(opaque(f"RMSNorm{ending}", weight=nn.Parameter(torch.ones(C)), eps=1e-6)) is None
    assert recognize(opaque("RMSNormFused", weight=nn.Parameter(torch.ones(C)), eps=1e-6)).kind == "rms"


class FrozenBatchNorm2d(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(C))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class InPlaceABN(nn.Module):
    """No word in the name; the attributes say it."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))
        self.eps, self.momentum = 1e-5, 0.01


def test_batch_norms_by_attributes():
    frozen, nameless = recognize(FrozenBatchNorm2d()), recognize(InPlaceABN())
    assert frozen == NormParts("batch", 1, has_running=True, gain="weight", bias="bias", certainty="duck")
    assert nameless == NormParts("batch", 1, 1e-5, 0.01, None, True, "weight", "bias", certainty="duck")


class FilterResponseNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.eps = 1e-6

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + self.eps)
        return self.gamma[:, None, None] * x + self.beta[:, None, None]


class SeasonLayerNorm(OpaqueLayerNorm):
    """Subtracts the mean over time afterwards; the channels are last all the same."""

    def forward(self, x):
        x = F.layer_norm(x, (C,), self.weight, self.bias, self.eps)
        return x - x.mean(1, keepdim=True)


class CenteredSumLayerNorm(OpaqueLayerNorm):
    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) - 0 * x.sum(1, keepdim=True)
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() + self.bias


class WholeLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma, self.eps = nn.Parameter(torch.ones(C, 1, 1)), 1e-5

    def forward(self, x):
        x = x - x.mean([1, 2, 3], keepdim=True)
        return self.gamma * x / (x.square().mean([1, 2, 3], keepdim=True) + self.eps).sqrt()


def test_dimensions_by_source():
    assert [recognize(build()).axis for build in (SeasonLayerNorm, CenteredSumLayerNorm)] == [-1, -1]
    whole = recognize(WholeLayerNorm())
    assert (whole.kind, whole.axis, whole.normalized_ndim) == ("layer", -1, 3)


class L2Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), 1e-10

    def forward(self, x):
        return self.weight[:, None, None] * x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + self.eps)


def test_other_names():
    assert recognize(FilterResponseNorm()) == NormParts("other", 1, 1e-6, gain="gamma", bias="beta", certainty="duck")
    assert recognize(L2Norm()) == NormParts("rms", 1, 1e-10, gain="weight", certainty="duck", normalized_ndim=1)


class LayerNormTriton(ThirdRMSNorm):
    """An unknown ending: gain and eps are evidence enough."""


class LayerNormNoGain(nn.Module):
    def forward(self, x):
        return x


def test_an_unknown_ending_needs_gain_and_eps():
    assert recognize(LayerNormTriton()).kind == "rms"
    assert recognize(LayerNormNoGain()) is None


# -------- decoys


class NormMlpClassifierHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(C), nn.Linear(C, 2)


class NormFreeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), 1e-5


class LayerNormWrapper(NormFreeBlock):
    pass


class RMSNormLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(C, C)), nn.Parameter(torch.ones(C)), 1e-5


class LinearNorm(RMSNormLinear):
    """Ends in Norm, but it is a linear layer."""


class CosineNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C, C)), 1e-5


class NormalizedLinear(RMSNormLinear):
    pass


class PreNorm(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(C), fn


class NoNorm(NormFreeBlock):
    """The affine map that MobileBERT puts where other models normalize."""


class GradNorm(NormFreeBlock):
    pass


class Norm(nn.Module):
    """The length of a vector."""

    def forward(self, x):
        return x.norm(dim=-1)


class LogNormal(NormFreeBlock):
    pass


class Normalize(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))


class RunningStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))


class AdaLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(C, 2 * C), nn.LayerNorm(C, elementwise_affine=False)


class AdaptiveRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.to_gamma = C**0.5, nn.Linear(C, C)


class WrappedBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.BatchNorm1d(C)


class GainedBatchNorm(nn.Module):
    """Its running statistics are inside, so inside it is reported."""

    def __init__(self):
        super().__init__()
        self.bn, self.gamma = nn.BatchNorm1d(C, affine=False), nn.Parameter(torch.ones(C))


class RescaledLayerNorm(nn.Module):
    """The norm inside has a gain already; the second one is something else."""

    def __init__(self):
        super().__init__()
        self.norm, self.gamma = nn.LayerNorm(C), nn.Parameter(torch.ones(C))


class SimplePairNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(C))
        self.query_norm, self.key_norm = SimpleRMSNorm(), SimpleRMSNorm()


class RMSNormPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), 1e-5
        self.query_norm, self.key_norm = ThirdRMSNorm(), ThirdRMSNorm()


def normalized_weight():
    """Build a linear layer whose weight, not whose activation, passes through a norm."""
    linear = nn.Linear(C, C)
    parametrize.register_parametrization(linear, "weight", SimpleRMSNorm())
    return linear


DECOYS = {
    "head": (NormMlpClassifierHead(), ["norm"]),
    "norm-free block": (NormFreeBlock(), []),
    "named wrapper": (LayerNormWrapper(), []),
    "fused linear": (RMSNormLinear(), []),
    "linear called norm": (LinearNorm(), []),
    "matrix": (CosineNorm(), []),
    "normalized linear": (NormalizedLinear(), []),
    "pre-norm": (PreNorm(nn.Linear(C, C)), ["norm"]),
    "pre-norm of nothing": (PreNorm(nn.Identity()), ["norm"]),
    "pre-norm of a norm": (PreNorm(PreNorm(nn.Identity())), ["norm", "fn.norm"]),
    "no norm": (NoNorm(), []),
    "gradient norm": (GradNorm(), []),
    "length": (Norm(), []),
    "distribution": (LogNormal(), []),
    "input scaling": (Normalize(), []),
    "statistics": (RunningStatistics(), []),
    "adaptive": (AdaLayerNorm(), ["norm"]),
    "adaptive without a norm inside": (AdaptiveRMSNorm(), []),
    "wrapped": (WrappedBatchNorm(), ["module"]),
    "wrapped with running statistics": (GainedBatchNorm(), ["bn"]),
    "two inside": (RMSNormPair(), ["query_norm", "key_norm"]),
    "two bare ones inside": (SimplePairNorm(), ["query_norm", "key_norm"]),
    "rescaled": (RescaledLayerNorm(), ["norm"]),
    "normalized weight": (normalized_weight(), []),
    "spectral": (parametrizations.spectral_norm(nn.Linear(C, C)), []),
    "weight": (parametrizations.weight_norm(nn.Conv2d(C, C, 3)), []),
}


@pytest.mark.parametrize("name", DECOYS)
def test_decoys_do_not_count_and_the_norms_in_them_count_once(name):
    model, expected = DECOYS[name]
    assert recognize(model) is None
    assert list(find_norms(nn.ModuleDict({"x": model}))) == [f"x.{path}" for path in expected]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    "build", [ThirdRMSNorm, lambda: nn.LayerNorm(C), FrozenBatchNorm2d], ids=["duck", "class", "buffers"]
)
def test_a_parametrized_norm_is_recognized_without_computing_its_weight(build):
    norm = build()
    expected = recognize(norm)
    calls = []
    rule = Doubled()
    rule.register_forward_hook(lambda *_: calls.append(1))
    parametrize.register_parametrization(norm, "weight", rule, unsafe=True)
    calls.clear()
    assert find_norms(nn.ModuleList([norm])) == {"0": expected}
    assert not calls


def test_nothing_is_run_and_nothing_changes():
    model = nn.Sequential(nn.BatchNorm1d(C), ThirdRMSNorm(), JoinedLayerNorm(), WrappedBatchNorm(), nn.Dropout())
    model.apply(lambda module: module.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran")))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    find_norms(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_keep_their_names():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C), nn.BatchNorm1d(C), nn.RMSNorm(C)))
    assert kinds(scripted) == {"1": "layer", "2": "batch", "3": "rms"}


def test_copies_and_data_parallel_wrappers_are_looked_through():
    model = nn.Sequential(nn.Linear(C, C), ThirdRMSNorm(), nn.BatchNorm1d(C))
    assert kinds(copy.deepcopy(model)) == {"1": "rms", "2": "batch"}
    assert kinds(nn.DataParallel(model)) == {"module.1": "rms", "module.2": "batch"}


# -------- declared


def test_a_declared_class_and_its_subclasses_are_recognized():
    class Whitening(nn.Module):
        def __init__(self, eps):
            super().__init__()
            self.eps = eps

    class Faster(Whitening):
        pass

    assert recognize(Whitening(1e-3)) is None
    declare_norm(Whitening, lambda module: NormParts("batch", 1, eps=module.eps))
    assert find_norms(nn.Sequential(Faster(1e-3))) == {"0": NormParts("batch", 1, eps=1e-3, certainty="declared")}


def test_a_declaration_can_deny_and_precedes_the_class():
    class Odd(nn.BatchNorm1d):
        pass

    declare_norm(Odd, lambda module: None)
    assert recognize(Odd(C)) is None
    declare_norm(Odd, NormParts("other", -1))
    assert recognize(Odd(C)) == NormParts("other", -1, certainty="declared")
    assert recognize(nn.BatchNorm1d(C)).kind == "batch"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: declare_norm(nn.LayerNorm(C), NormParts("layer", -1)), ["cls=", "LayerNorm", "class"]),
        (lambda: declare_norm(int, NormParts("layer", -1)), ["cls=", "int"]),
        (lambda: declare_norm(Doubled, "layer"), ["parts='layer'", "NormParts"]),
        (lambda: NormParts("bacth", 1), ["kind='bacth'", "'batch'", *KINDS]),
        (lambda: NormParts("batch", 1, certainty="sure"), ["certainty='sure'", "declared"]),
    ],
)
def test_errors_say_what_was_received(call, words):
    with pytest.raises(ArgumentError) as error:
        call()
    assert all(word in str(error.value) for word in words)


class GRN(nn.Module):
    """Global response normalization, which is known by its initials."""

    def __init__(self):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, 1, C)), nn.Parameter(torch.zeros(1, 1, 1, C))

    def forward(self, x):
        size = x.norm(dim=(1, 2), keepdim=True)
        return self.gamma * (x * size / (size.mean(-1, keepdim=True) + 1e-6)) + self.beta + x


class GatedGRN(nn.Module):
    """A gated residual network has the same initials, and matrices."""

    def __init__(self):
        super().__init__()
        self.linear, self.weight = nn.Linear(C, C), nn.Parameter(torch.ones(C))


def test_response_normalizations_by_their_initials():
    expected = NormParts("other", -1, gain="gamma", bias="beta", certainty="duck")
    assert recognize(GRN()) == expected
    assert recognize(type("BlockGRN", (GRN,), {})()) == expected
    assert recognize(type("FRN1d", (GRN,), {})()).kind == "other"
    assert recognize(GatedGRN()) is None
    assert recognize(type("GRNBlock", (GRN,), {})()) is None


class Config(nn.Module):
    """A model that warns of attributes which are its configuration's."""

    def __getattr__(self, name):
        if name.endswith("eps"):
            raise DeprecationWarning(name)
        return super().__getattr__(name)


def test_a_model_is_not_asked_for_attributes():
    assert recognize(Config()) is None


# -------- third-party models

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
CONVNEXT = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"}

# kind, axis, gain_offset, certainty -> how many; L = 3 layers
ARCHITECTURES = {
    "Llama": (GROUPED, {("rms", -1, 0.0, "duck"): 2 * 3 + 1}),
    "Qwen3": (GROUPED | {"head_dim": 16}, {("rms", -1, 0.0, "duck"): 4 * 3 + 1}),  # q_norm and k_norm besides
    "Gemma": (GROUPED | {"head_dim": 16}, {("rms", -1, 1.0, "duck"): 2 * 3 + 1}),
    "Gemma2": (GROUPED | {"head_dim": 16}, {("rms", -1, 1.0, "duck"): 4 * 3 + 1}),
    "Cohere": (GROUPED | {"use_qk_norm": True}, {("layer", -1, 0.0, "duck"): 3 * 3 + 1}),  # a gain per head: a matrix
    "T5": (T5, {("rms", -1, 0.0, "duck"): (2 * 3 + 1) + (3 * 3 + 1)}),  # encoder, decoder with cross attention
    "Bert": (SMALL, {("layer", -1, 0.0, "class"): 2 * 3 + 1}),
    "GPT2": (GPT2, {("layer", -1, 0.0, "class"): 2 * 3 + 1}),
    "Deberta": (SMALL, {("layer", -1, 0.0, "duck"): 2 * 3 + 1}),
    "MobileBert": ({"vocab_size": 64, "num_hidden_layers": 1, "embedding_size": 8}, {}),  # NoNorm throughout
    # stem and three downsamplings channels first; one in each of five blocks and one after pooling channels last
    "ConvNext": (CONVNEXT, {("layer", 1, 0.0, "class"): 1 + 3, ("layer", -1, 0.0, "class"): 5 + 1}),
    "ResNet": (RESNET, {("batch", 1, 0.0, "class"): 1 + 2 * 3 + 1}),  # stem, three blocks, one shortcut
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers(name):
    transformers = imported("transformers")
    options, expected = ARCHITECTURES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))
    found = find_norms(model)
    assert Counter((p.kind, p.axis, p.gain_offset, p.certainty) for p in found.values()) == expected
    assert all(p.eps is not None and p.gain == "weight" for p in found.values())
    assert all(isinstance(getattr(model.get_submodule(path), p.gain), nn.Parameter) for path, p in found.items())


def test_transformers_llama_paths():
    transformers = imported("transformers")
    model = transformers.LlamaModel(transformers.LlamaConfig(**GROUPED | {"rms_norm_eps": 1e-4}))
    layers = [f"layers.{i}.{name}" for i in range(3) for name in ("input_layernorm", "post_attention_layernorm")]
    expected = NormParts("rms", -1, 1e-4, gain="weight", certainty="duck", normalized_ndim=1)
    assert find_norms(model) == dict.fromkeys([*layers, "norm"], expected)


# name -> arguments, path, kind, axis, eps, gain, has_running; path None: not a norm
GRAPH = {
    "BatchNorm": ((8,), "module", "batch", 1, 1e-5, "weight", True),
    "HeteroBatchNorm": ((8, 2), "", "batch", 1, 1e-5, "weight", True),
    "InstanceNorm": ((8,), "", "instance", 1, 1e-5, None, False),
    "LayerNorm": ((8,), "", "layer", -1, 1e-5, "weight", False),
    "HeteroLayerNorm": ((8, 2), "", "layer", -1, 1e-5, "weight", False),
    "GraphNorm": ((8,), "", "other", -1, 1e-5, "weight", False),
    "PairNorm": ((), "", "other", -1, 1e-5, None, False),
    "MeanSubtractionNorm": ((), "", "other", -1, None, None, False),
    "MessageNorm": ((), "", "other", -1, None, "scale", False),
    "DiffGroupNorm": ((8, 2), "norm", "batch", 1, 1e-5, "weight", True),
}


@pytest.mark.parametrize("name", GRAPH)
def test_graph_networks(name):
    arguments, path, *expected = GRAPH[name]
    found = find_norms(getattr(imported("torch_geometric.nn"), name)(*arguments))
    assert {k: [p.kind, p.axis, p.eps, p.gain, p.has_running] for k, p in found.items()} == {path: expected}


def test_graph_size_scaling_has_no_statistics():
    assert find_norms(imported("torch_geometric.nn").GraphSizeNorm()) == {}


def test_graph_layer_norm_normalizes_over_nodes_too():
    graph = imported("torch_geometric.nn")
    x = torch.randn(5, 8) + 2
    for mode, dims in [("graph", 2), ("node", 1)]:
        norm = graph.LayerNorm(8, mode=mode)
        assert recognize(norm).normalized_ndim == dims
        mean = norm(x).mean(tuple(range(-dims, 0)))
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)


# options -> kind, gain, gain_offset, path inside the norm's own place, certainty, norms per branch
DECODERS = {
    "layer": ({}, "layer", "gamma", 1.0, "", "duck"),
    "rms": ({"use_rmsnorm": True}, "rms", "g", 1.0, "", "duck"),
    "rms without offset": ({"use_rmsnorm": True, "norm_add_unit_offset": False}, "rms", "g", 0.0, "", "duck"),
    "scale": ({"use_scalenorm": True}, "rms", "g", 1.0, "", "duck"),
    "simple": ({"use_simple_rmsnorm": True}, "rms", None, 0.0, "", "duck"),
    "adaptive": ({"use_adaptive_layernorm": True, "dim_condition": 32}, "layer", None, 0.0, ".ln", "class"),
}


@pytest.mark.parametrize("name", DECODERS)
def test_x_transformers(name):
    package = imported("x_transformers")
    options, kind, gain, offset, inside, certainty = DECODERS[name]
    decoder = package.Decoder(dim=32, depth=2, heads=2, **options)
    model = package.TransformerWrapper(num_tokens=64, max_seq_len=16, attn_layers=decoder)
    places = [*(f"layers.{i}.0.0" for i in range(2 * 2)), "final_norm"]  # depth 2: attention and feed-forward each
    found = find_norms(model)
    assert list(found) == [f"attn_layers.{place}{inside}" for place in places]
    assert {(p.kind, p.axis, p.gain, p.gain_offset, p.certainty) for p in found.values()} == {
        (kind, -1, gain, offset, certainty)
    }


def test_x_transformers_without_norms():
    package = imported("x_transformers")
    decoder = package.Decoder(dim=32, depth=1, heads=2, use_dynamic_tanh=True)
    assert find_norms(decoder) == {}
