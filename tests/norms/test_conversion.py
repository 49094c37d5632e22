"""Conversion, folding and recalibration against torch, numpy and recorded numbers."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from normscope.core.errors import ArgumentError
from normscope.norms import (
    Affine,
    Batch,
    Coloring,
    Norm,
    Running,
    Whiten,
    build,
    convert,
    find_norms,
    fold,
    recalibrate,
    zoo,
)
from normscope.norms.recalibration import measured_statistics

torch.set_num_threads(1)

OTHER = Path(__file__).parents[1] / "reference" / "other"


def seeded(model, dtype=torch.float64):
    """Random parameters and statistics, so that nothing is at its neutral value."""
    generator = torch.Generator().manual_seed(0)
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def images(channels=3, n=4, seed=1):
    return torch.randn(n, channels, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Residual(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        a = self.norm1(self.conv1(x)).relu()
        return self.drop(a + self.norm2(self.conv2(a)))


# --- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_batch_norm_to_ours_computes_the_same(norm):
    old = seeded(norm(5, eps=1e-3, momentum=0.3)).eval()
    rank = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}[norm]
    x = torch.randn((4, 5, *(3,) * (rank - 2)), dtype=torch.float64)
    new = convert(nn.Sequential(old), to="batch")[0]
    assert type(new) is Norm
    assert (new.eps, new.momentum, new.training) == (1e-3, 0.3, False)
    torch.testing.assert_close(new(x), old(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new.train()(x), old.train()(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(new.running_var, old.running_var)
    assert int(new.num_batches_tracked) == int(old.num_batches_tracked)


@pytest.mark.parametrize(
    ("old", "to", "shape"),
    [
        (nn.LayerNorm(6, eps=1e-3), "layer", (2, 5, 6)),
        (nn.LayerNorm(6), "layer", (2, 6, 5, 6)),
        (nn.LayerNorm((5, 6)), "layer", (2, 5, 6)),
        (nn.RMSNorm(6, eps=1e-3), "rms", (2, 5, 6)),
        (nn.GroupNorm(2, 6, eps=1e-3), "group", (2, 6, 5)),
        (nn.InstanceNorm2d(6, affine=True), "instance", (2, 6, 5, 4)),
        (nn.InstanceNorm2d(6), "instance", (2, 6, 5, 4)),
        (nn.LayerNorm(6, bias=False), "layer", (2, 5, 6)),
    ],
)
def test_the_same_kind_computes_the_same(old, to, shape):
    old = seeded(old)
    x = torch.randn(shape, dtype=torch.float64)
    expected = old(x)
    new = convert(old, to=to)
    assert new is not old
    assert type(new) is Norm
    torch.testing.assert_close(new(x), expected, rtol=1e-10, atol=1e-10)


def test_gains_survive_from_layer_to_rms_and_from_batch_to_group():
    old = seeded(nn.LayerNorm(6))
    rms = convert(nn.Sequential(old), to="rms")[0]
    torch.testing.assert_close(rms.weight, old.weight)
    batch = seeded(nn.BatchNorm2d(8))
    batch.weight.requires_grad_(False)
    group = convert(nn.Sequential(batch), to="group", groups=4)[0]
    assert group.area.groups == 4
    assert not group.weight.requires_grad
    assert group.bias.requires_grad
    torch.testing.assert_close(group.bias, batch.bias)


def test_a_unit_offset_is_taken_into_account():
    class GemmaRMSNorm(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.eps, self.weight = 1e-6, nn.Parameter(torch.zeros(dim))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)

    old = seeded(GemmaRMSNorm(6))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(convert(nn.Sequential(old), to="rms")(x), old(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["batch-renorm", "ghost-batch", "momentum-batch", "switchable"])
def test_running_statistics_survive_in_variants_of_batch_norm(name):
    old = seeded(nn.BatchNorm2d(8))
    new = convert(nn.Sequential(old), to=name)[0]
    torch.testing.assert_close(new.running_mean, old.running_mean)
    if name == "ghost-batch":
        torch.testing.assert_close(new.running_square, old.running_var + old.running_mean.square())
        torch.testing.assert_close(new.eval()(images(8)), old.eval()(images(8)), rtol=1e-9, atol=1e-9)
    elif name == "batch-renorm":
        torch.testing.assert_close(new.running_std, (old.running_var + old.eps).sqrt())
    else:
        torch.testing.assert_close(new.running_var, old.running_var)


@pytest.mark.parametrize("name", ["iterative", "l1-batch", "task"])
def test_statistics_that_mean_something_else_start_anew(name):
    new = convert(nn.Sequential(seeded(nn.BatchNorm2d(8))), to=name)[0]
    assert float(new.running_mean.abs().max()) == 0


def test_where_type_mode_and_sharing():
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(shared, nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm(4)), shared).eval()
    model[1].train()
    assert convert(model, to="instance", where="1.*0") is model
    assert [type(m) for m in (model[0], model[1][0], model[1][1])] == [nn.BatchNorm2d, Norm, nn.LayerNorm]
    assert model[1][0].training
    assert not model[0].training
    convert(model, to="group", where=nn.BatchNorm2d, groups=2)
    assert model[0] is model[2]
    assert model[0].area.groups == 2
    assert not model[0].training
    convert(model, to="rms", where=lambda path, module: path == "1.1")
    assert find_norms(model)["1.1"].kind == "rms"


def test_type_of_numbers_is_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False, track_running_stats=False)).bfloat16()
    new = convert(model, to="batch")[1]
    assert new.weight is None
    assert new.running_mean.dtype == torch.bfloat16


def test_a_function_makes_the_layer():
    model = seeded(Residual())
    convert(model, to=lambda c, groups: nn.GroupNorm(groups, c), groups=4)
    assert type(model.norm1) is nn.GroupNorm
    assert float(model.norm1.weight.detach().std()) > 0.1
    assert model(images()).shape == (4, 8, 6, 5)


def test_channels_on_the_last_axis():
    tokens = torch.randn(3, 7, 6, dtype=torch.float64)
    model = convert(nn.Sequential(nn.LayerNorm(6)).double(), to="batch")
    assert model[0].area == Batch(channels="last")
    flat = tokens.reshape(-1, 6)
    torch.testing.assert_close(
        model(tokens), ((flat - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()).reshape(3, 7, 6)
    )
    with pytest.raises(ArgumentError, match=r"'0'.*last axis.*channels='first'"):
        convert(nn.Sequential(nn.LayerNorm(6)), to="group", groups=2)
    new = convert(nn.Sequential(nn.LayerNorm(6)), to="group", groups=2, channels="first")
    assert new(torch.randn(2, 6)).shape == (2, 6)


def test_images_to_layer_norm_share_all_of_an_example():
    x = images(8)
    expected = nn.functional.group_norm(x, 1)
    torch.testing.assert_close(convert(nn.Sequential(nn.BatchNorm2d(8)).double(), to="layer")(x), expected)


@pytest.mark.parametrize(
    ("model", "arguments", "reason"),
    [
        (
            lambda: nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(4)),
            {"to": "group", "groups": 4},
            "'0': groups=4 .*divisors: \\[1, 2",
        ),
        (lambda: nn.BatchNorm2d(6), {"to": "grop"}, "did you mean 'group'"),
        (lambda: nn.BatchNorm2d(6), {"to": "group", "gruops": 2}, "did you mean 'groups'"),
        (lambda: nn.BatchNorm2d(6), {"where": "layer3.*"}, "matches none of the 1 norms"),
        (lambda: nn.Linear(3, 3), {}, "no norm"),
        (lambda: nn.LayerNorm((3, 4)), {"to": "batch"}, "trailing axes"),
        (lambda: nn.BatchNorm1d(6), {"to": "concept-whitening"}, "dimensions"),
        (lambda: nn.BatchNorm1d(6), {"channels": "middle"}, "channels='middle'"),
        (lambda: nn.LocalResponseNorm(3), {"to": "batch"}, "number of features"),
        (lambda: build("centering", 4), {"to": "batch"}, "CenteredLinear is also a linear layer"),
    ],
)
def test_errors(model, arguments, reason):
    made = model()
    before = [type(module) for module in made.modules()]
    with pytest.raises(ArgumentError, match=reason):
        convert(made, **arguments)
    assert [type(module) for module in made.modules()] == before


def test_an_activation_inside_is_not_lost_silently():
    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, count):
            super().__init__(count)
            self.act = nn.ReLU()

    with pytest.raises(ArgumentError, match=r"act \(ReLU\)"):
        convert(nn.Sequential(BatchNormAct2d(4)), to="group", groups=2)


UNCONDITIONAL = [name for name, row in zoo.items() if not row.example().traits.condition and row.features == 8]


@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_every_method_replaces_batch_norm_or_says_why_not(name):
    model = seeded(Residual(), torch.float32)
    try:
        convert(model, to=name, **dict(zoo[name].options))
    except ArgumentError as error:
        said = str(error)
        assert "last axis" in said or "dimensions" in said, name
    else:
        y = model(images(n=6).float())
        assert y.shape == (6, 8, 6, 5)
        assert torch.isfinite(y).all()


# --- fold ------------------------------------------------------------------------------------------------------------


def test_fold_reproduces_the_recorded_numbers():
    with np.load(OTHER / "bn_folding.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind == "f"}
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).double().eval()
    model.load_state_dict(
        {"0.weight": data["w"], "0.bias": data["b"], "1.weight": data["gamma"], "1.bias": data["beta"]}
        | {f"1.{name}": data[name] for name in ("running_mean", "running_var")},
        strict=False,
    )
    folded = fold(model)
    torch.testing.assert_close(folded[0].weight, data["w_fold"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(folded[0].bias, data["b_fold"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(folded(data["x"]), data["y_fold"], rtol=1e-9, atol=1e-9)


PAIRS = {
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 6, 5)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d(6)), (2, 4, 6, 5)),
    "transposed groups": (lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), (2, 4, 6)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4)),
    "ours": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), convert(nn.BatchNorm2d(6), "batch")), (2, 4, 6, 5)),
    "tokens": (lambda: nn.Sequential(nn.Linear(4, 6), _norm(Batch(channels="last"), Affine())), (2, 3, 4)),
    "whitening": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), _norm(Batch(groups=2), Affine())), (2, 4, 6, 5)),
    "coloring": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), _norm(Batch(), Coloring())), (2, 4, 6, 5)),
    "transposed whitening": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3), _norm(Batch(), Affine())),
        (2, 4, 6, 5),
    ),
}


def _norm(area, recovery):
    return Norm(area, Whiten(population="covariance"), recovery, Running(), num_features=6)


@pytest.mark.parametrize("case", PAIRS)
def test_folded_pairs_compute_the_same(case):
    make, shape = PAIRS[case]
    model = seeded(make())
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model(3 * x + 1)
    folded = fold(model)
    assert type(folded[1]) is nn.Identity
    assert model.training
    assert type(model[1]) is not nn.Identity
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_fold_finds_pairs_by_tracing_and_is_exact_in_float32():
    model = seeded(Residual(), torch.float32)
    folded = fold(model)
    assert not find_norms(folded)
    assert len(find_norms(model)) == 2
    x = images().float()
    expected = model.eval()(x)
    assert float((folded(x) - expected).detach().abs().max() / expected.detach().abs().max()) < 1e-5


def test_fold_leaves_what_would_change_the_result():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y + self.other(self.other(x))

    twice = nn.Conv2d(3, 3, 1)
    for model in (
        Branching(),
        nn.Sequential(twice, nn.BatchNorm2d(3), twice),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    ):
        model = seeded(model)
        folded = fold(model)
        assert len(find_norms(folded)) == len(find_norms(model))
        torch.testing.assert_close(folded(images()), model.eval()(images()))
    grouped = seeded(nn.Sequential(nn.Conv2d(6, 6, 1, groups=2), _norm(Batch(), Affine())))
    assert len(find_norms(fold(grouped))) == 1


def test_fold_without_a_trace_takes_neighbors_and_given_pairs():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.body(x)
            return self.norm(self.conv(y)) if x.sum() > -1e9 else y

    model = seeded(Choosing())
    assert list(find_norms(fold(model))) == ["norm"]
    folded = fold(model, pairs=[("conv", "norm"), ("body.0", "body.1")])
    assert not find_norms(folded)
    torch.testing.assert_close(folded(images()), model.eval()(images()), rtol=1e-9, atol=1e-9)
    for pair, reason in (
        (("conv", "nrom"), "no module"),
        (("norm", "conv"), "no plain"),
        (("conv", "body.0"), "no norm"),
    ):
        with pytest.raises(ArgumentError, match=reason):
            fold(model, pairs=[pair])


# --- recalibrate -----------------------------------------------------------------------------------------------------


def test_recalibrate_gives_the_moments_of_all_samples():
    batches = [images(n=n, seed=n) * n + n for n in (2, 5, 3)]
    for model in (nn.BatchNorm2d(3), convert(nn.BatchNorm2d(3), "batch")):
        layer = recalibrate(nn.Sequential(nn.Identity(), seeded(model)), batches)[1]
        x = np.concatenate([batch.numpy() for batch in batches])
        np.testing.assert_allclose(layer.running_mean, x.mean((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, x.var((0, 2, 3)), rtol=1e-12)


def test_recalibrate_reproduces_the_recorded_plain_average():
    with np.load(OTHER / "bn_recalibration.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind == "f"}
    for layer in (nn.BatchNorm2d(3), convert(nn.BatchNorm2d(3), "batch")):
        layer = layer.double()
        with torch.no_grad():
            layer.weight.copy_(data["weight"])
            layer.bias.copy_(data["bias"])
        recalibrate(layer, [data["x0"], data["x1"], data["x2"]], estimate="batches")
        torch.testing.assert_close(layer.running_mean, data["running_mean"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_var, data["running_var"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.eval()(data["x0"]), data["y_eval"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("population", ["covariance", "sigma", "matrix"])
def test_recalibrate_whitening(population):
    batches = [images(6, n=n, seed=n) + n for n in (4, 8)]
    operation = Whiten("zca", population=population)
    layer = Norm(Batch(), operation, None, Running(), num_features=6).double()
    recalibrate(layer, batches)
    flat = [np.moveaxis(batch.numpy(), 1, 0).reshape(6, -1) for batch in batches]
    together = np.cov(np.concatenate(flat, 1), bias=True)
    found = getattr(layer, f"running_{population}")[0].numpy()
    if population == "matrix":
        roots = [np.linalg.inv(_root(np.cov(z, bias=True) + 1e-5 * np.eye(6))) for z in flat]
        np.testing.assert_allclose(found, (roots[0] + 2 * roots[1]) / 3, rtol=1e-8, atol=1e-10)
    else:
        np.testing.assert_allclose(found, together + (population == "sigma") * 1e-5 * np.eye(6), rtol=1e-10, atol=1e-12)


def _root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values) @ vectors.T


def test_recalibrate_uses_batch_statistics_and_touches_nothing_else():
    model = seeded(Residual())
    model.register_buffer("mine", torch.ones(2))
    model.norm1.eval()
    modes = [module.training for module in model.modules()]
    kept = {n: v.clone() for n, v in model.state_dict().items() if "running" not in n}
    batches = [images(seed=seed) for seed in (1, 2)]
    torch.manual_seed(5)
    recalibrate(model, batches, lambda m, batch: m(batch + 0 * torch.randn(())))
    first = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(1)), "random numbers were drawn"
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in kept.items())
    assert not any("forward" in module.__dict__ for module in model.modules())
    with torch.no_grad():
        inputs = []
        for x in batches:
            z = model.conv1(x)
            a = nn.functional.batch_norm(z, None, None, model.norm1.weight, model.norm1.bias, True).relu()
            inputs.append(model.conv2(a))
    expected = torch.cat(inputs).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.norm2.running_mean, expected.mean(1))
    torch.testing.assert_close(model.norm2.running_var, expected.var(1, correction=0))


@pytest.mark.parametrize("name", ["batch-renorm", "switchable", "ghost-batch", "representative-batch", "l1-batch"])
def test_recalibrate_other_layers(name):
    layer = convert(nn.Sequential(seeded(nn.BatchNorm2d(3))), to=name)[0]
    batches = [images(seed=seed) for seed in (1, 2)]
    recalibrate(layer, batches)
    assert not torch.equal(layer.running_mean, torch.zeros(3, dtype=torch.float64))
    if name != "representative-batch":  # which centers its input first
        expected = torch.cat(batches).mean((0, 2, 3))
        torch.testing.assert_close(layer.running_mean, expected)


def test_recalibrate_takes_tuples_and_mappings():
    model, x = nn.Sequential(nn.BatchNorm2d(3).double()), images()
    once = recalibrate(model, [(x, 0)])[0].running_mean.clone()
    recalibrate(model, iter([{"input": x + 1}]))
    torch.testing.assert_close(model[0].running_mean, once + 1)


def test_recalibrate_refuses_and_restores():
    model = seeded(Residual())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArgumentError, match="at least one batch"):
        recalibrate(model, [])
    with pytest.raises(RuntimeError):
        recalibrate(model, [images(), images(5)])
    with pytest.raises(ArgumentError, match="did you mean 'batches'"):
        recalibrate(model, [images()], estimate="batch")
    with pytest.raises(ArgumentError, match="no norm with running"):
        recalibrate(nn.LayerNorm(3), [images()])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.training
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_recalibrate_only_some_norms_while_the_others_use_what_they_store():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double().eval()
    model[0].running_mean += 1.0
    x = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    inside = model[:2](x)
    recalibrate(model, [x[:3], x[3:]], only="2")
    torch.testing.assert_close(model[2].running_mean, inside.mean((0, 2, 3)))
    torch.testing.assert_close(model[2].running_var, inside.var((0, 2, 3), correction=0))
    assert model[0].running_mean.tolist() == [1.0] * 3


def test_recalibrate_only_what_is_there():
    with pytest.raises(ArgumentError, match="only='1' is unknown; Options: 0"):
        recalibrate(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), [images()], only=["1"])


def test_measured_statistics_are_those_that_each_norm_would_store_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double().eval()
    data = [images(), images(n=7, seed=2)]
    found = measured_statistics(model, data)
    for path in ("0", "2"):
        alone = recalibrate(copy.deepcopy(model), data, only=path).get_submodule(path)
        for name, value in found[path].items():
            torch.testing.assert_close(getattr(alone, name), value)
    assert all("forward" not in vars(module) for module in model)


def test_a_layer_without_tensors_takes_the_type_of_what_is_around_it():
    part = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)).double()
    model = nn.Sequential(nn.Linear(4, 4), part)
    convert(model, to="rms", affine=True)
    assert {p.dtype for p in part.parameters()} == {torch.float64}
    assert {p.dtype for p in model[0].parameters()} == {torch.float32}
