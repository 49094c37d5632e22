"""The layer itself: torch's layers and their state, fused kernels, types, ranks of processes, parts of one's own."""

import copy
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from normscope.core.errors import ArgumentError
from normscope.core.named import Named
from normscope.core.source import cite
from normscope.core.survey import works
from normscope.norms import (
    Affine,
    Batch,
    BatchGroup,
    Group,
    Instance,
    Layer,
    Norm,
    Position,
    Row,
    Running,
    Split,
    Standardize,
    TopK,
    Whiten,
    build,
    checks,
    find_norms,
    recognize,
    zoo,
)
from normscope.norms.operation import RMS, Operation, Scale

torch.set_num_threads(1)

TWINS = (
    (lambda: nn.BatchNorm1d(8), lambda: build("bn", 8), (6, 8)),
    (lambda: nn.BatchNorm1d(8), lambda: build("bn", 8), (6, 8, 5)),
    (lambda: nn.BatchNorm2d(8, eps=1e-3), lambda: build("bn", 8, eps=1e-3), (6, 8, 4, 5)),
    (lambda: nn.BatchNorm3d(8), lambda: build("bn", 8), (6, 8, 2, 3, 2)),
    (lambda: nn.BatchNorm2d(8, momentum=None), lambda: build("bn", 8, momentum=None), (6, 8, 4, 5)),
    (lambda: nn.BatchNorm2d(8, affine=False), lambda: build("bn", 8, affine=False), (6, 8, 4, 5)),
    (
        lambda: nn.BatchNorm2d(8, track_running_stats=False),
        lambda: build("bn", 8, track_running_stats=False),
        (6, 8, 4, 5),
    ),
    (lambda: nn.GroupNorm(4, 8), lambda: build("gn", 8, groups=4), (6, 8, 4, 5)),
    (lambda: nn.GroupNorm(1, 8), lambda: build("ln", 8), (6, 8, 4, 5)),
    (lambda: nn.LayerNorm(8), lambda: build("ln", 8), (6, 5, 8)),
    (lambda: nn.LayerNorm((8, 4, 5)), lambda: build("ln", (8, 4, 5)), (6, 8, 4, 5)),
    (lambda: nn.InstanceNorm2d(8, affine=True), lambda: build("in", 8), (6, 8, 4, 5)),
    (
        lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        lambda: build("in", 8, track_running_stats=True),
        (6, 8, 4, 5),
    ),
    (lambda: nn.RMSNorm(8, eps=1e-6), lambda: build("rms", 8), (6, 5, 8)),
)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("theirs", "ours", "shape"), TWINS)
def test_torch_layers_and_their_state(theirs, ours, shape, fused):
    torch.manual_seed(0)
    theirs, ours = theirs().double(), ours().double()
    ours._kernel = ours._kernel if fused else None
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    for step in range(3):
        x = torch.randn(shape, dtype=torch.float64) * (1 + step) + step
        if step == 1:
            ours.load_state_dict(theirs.state_dict())
        elif step == 2:
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
        else:
            theirs(x)
    for name, value in theirs.state_dict().items():
        if name == "num_batches_tracked" and isinstance(theirs, nn.InstanceNorm2d):
            continue  # torch does not count there
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


FUSED = (
    (lambda: build("bn", 8), (6, 8, 4, 5)),
    (lambda: build("bn", 8, affine=False), (6, 8)),
    (lambda: build("bn", 8, track_running_stats=False), (6, 8, 4, 5)),
    (lambda: Norm(Batch(channels="last"), Standardize(), Affine(), Running(), num_features=8), (6, 5, 8)),
    (lambda: build("gn", 8, groups=4), (6, 8, 4, 5)),
    (lambda: build("in", 8), (6, 8, 4, 5)),
    (lambda: build("ln", 8), (6, 5, 8)),
    (lambda: build("ln", 8), (6, 8, 4, 5)),
    (lambda: build("ln", 8), (6, 8)),
    (lambda: build("ln", (4, 5)), (6, 8, 4, 5)),
    (lambda: build("positional", 8, unbiased=False, affine=True), (6, 8, 4, 5)),
    (lambda: build("rms", 8), (6, 5, 8)),
    (lambda: build("rms", 8), (6, 8, 4, 5)),
    (lambda: build("rms", 8, position=True), (6, 8, 4, 5)),
    (lambda: build("rms", (4, 5)), (6, 8, 4, 5)),
)


@pytest.mark.parametrize(("make", "shape"), FUSED)
def test_kernels_do_what_the_parts_do(make, shape):
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = make().double()
        assert layer._kernel is not None
        layer._kernel = layer._kernel if fused else None
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_()
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        grads = torch.autograd.grad(y.pow(3).sum(), [x, *layer.parameters()], create_graph=True)
        (second,) = torch.autograd.grad(grads[0].square().sum(), x)
        results.append([y, *grads, second, *layer.buffers(), layer.eval()(x)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["bn", "ln", "gn", "in", "rms", "positional", "dbn", "l1-batch", "ghost"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_statistics_of_half_types_are_taken_in_float32(name, half):
    torch.manual_seed(0)
    options = {"gn": {"groups": 4}, "dbn": {"group_size": 4}, "ghost": {"examples": 4}}.get(name, {})
    # the sum of squares overflows float16, and bfloat16 cannot tell the values from their mean
    x = (30 * torch.randn(8, 8, 16, 16) + 100).to(half)
    layer = build(name, 8, **options)
    found = layer(x)
    assert found.dtype == half
    expected = build(name, 8, **options)(x.float())
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_layer_of_half_parameters():
    layer = build("iterative", 4).bfloat16()
    assert layer(torch.randn(8, 4, 3, 3).bfloat16()).dtype == torch.bfloat16
    assert layer.running_matrix.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bn", "ln", "rms", "gn", "iterative", "gw", "l1-batch"])
def test_compiled_layers_agree(name):
    layer = build(name, 8, groups=4) if name in {"gn", "gw"} else build(name, 8)
    other = copy.deepcopy(layer)
    x = torch.randn(4, 8, 5, 5, requires_grad=True)
    y = torch.compile(layer, backend="aot_eager")(x)
    expected = other(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    (grad,), (expected_grad,) = (torch.autograd.grad(v.pow(3).sum(), x) for v in (y, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-3)


def test_functional_transforms_work_for_whitening():
    layer = Norm(Batch(), Whiten("newton"))
    x = torch.randn(6, 4, dtype=torch.float64)
    hessian = torch.func.jacrev(torch.func.grad(lambda v: layer(v).pow(3).sum()))(x)
    assert torch.isfinite(hessian).all()
    found = torch.autograd.functional.hessian(lambda v: layer(v).pow(3).sum(), x)
    torch.testing.assert_close(hessian, found, rtol=1e-6, atol=1e-6)


RANKS = """
    import sys, torch, torch.distributed as dist
    from normscope.norms import *
    from normscope.norms.operation import RMS
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method="file://" + folder + "/meet", rank=rank, world_size=2)
    cut = slice(0, 5) if rank == 0 else slice(5, 8)
    makers = {makers}
    for place, make in enumerate(makers):
        whole, part = make().double(), make().double()
        part.synchronize()
        assert part.average is not whole.average
        generator = torch.Generator().manual_seed(place)
        x = torch.randn(8, 8, 4, 4, generator=generator, dtype=torch.float64).requires_grad_()
        w = torch.randn(8, 8, 4, 4, generator=generator, dtype=torch.float64)
        grads = torch.autograd.grad((whole(x) * w).sum(), x)[0][cut]
        y = part(x[cut])
        torch.testing.assert_close(y, whole(x)[cut], rtol=1e-9, atol=1e-9)
        (grad,) = torch.autograd.grad((y * w[cut]).sum(), x)
        torch.testing.assert_close(grad[cut], grads, rtol=1e-9, atol=1e-9)
        whole = make().double()
        whole(x)
        for mine, its in zip(part.buffers(), whole.buffers()):
            torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)
        # the gradients of all ranks' parameters add up to those of one process
        whole.zero_grad()
        (whole(x) * w).sum().backward()
        part.zero_grad()
        (part(x[cut]) * w[cut]).sum().backward()
        for (name, mine), its in zip(part.named_parameters(), whole.parameters()):
            dist.all_reduce(mine.grad)
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-9, atol=1e-9, msg=lambda m: f"{place} {name} {m}")
    dist.destroy_process_group()
"""
MAKERS = """[
        lambda: build("bn", 8),
        lambda: build("iterative", 8, groups=2),
        lambda: build("wc", 8, affine=False),
        lambda: build("lp-batch", 8, top=5),
        lambda: build("l1-batch", 8),
        lambda: build("robust", 8, statistics="running"),
        lambda: build("generalized-batch", 8),
        lambda: Norm(Batch(), RMS(), population=Running(), num_features=8),
        lambda: Norm(BatchGroup(4), Standardize(), population=Running(), num_features=8),
        lambda: build("batch-instance", 8),
        lambda: build("switchable", 8),
        lambda: build("evonorm", 8),
    ]"""


def test_ranks_share_their_statistics(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANKS).replace("{makers}", textwrap.dedent(MAKERS)))
    root = str(Path(__file__).parents[2])
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), tmp_path], cwd=root, env={"PYTHONPATH": root}, stderr=-1)
        for rank in range(2)
    ]
    for process in ranks:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()[-2000:]


def test_synchronizing_needs_a_process_group():
    with pytest.raises(ArgumentError, match=r"torch\.distributed is not initialized; call init_process_group first"):
        build("bn", 8, process_group="world")
    assert build("ln", 8, process_group="world").average is build("ln", 8).average


def test_repr_is_the_constructor_call_inside_a_model():
    model = nn.Sequential(nn.Linear(4, 8), Norm(Batch(), Standardize(eps=1e-3), num_features=8))
    assert "(1): Norm(Batch(), Standardize(eps=0.001), num_features=8)" in repr(model)


def test_a_new_layer_is_one_line():
    layer = Norm(Instance(), RMS(), Affine(shift=False), num_features=4)
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(layer(x), x / (x.square().mean((2, 3), keepdim=True) + 1e-5).sqrt())


@dataclass(frozen=True, repr=False)
class Median(Operation):
    """An operation of a user: subtract the median."""

    tracked: ClassVar[tuple[str, ...]] = ("mean",)
    shifts: ClassVar[bool] = True

    def measure(self, z, average=None):
        return {"mean": z.flatten(2).median(2).values}

    def coefficients(self, stats):
        return None, -stats["mean"]


def test_a_new_part_obeys_the_laws():
    tested = checks.check(lambda: Norm(Batch(), Median(), Affine(), Running(), num_features=8), skip=["repr"])
    assert {"shift", "gradient", "state", "view"} <= set(tested)


def test_statistics_of_an_input_are_those_of_training():
    layer = build("bn", 4).double()
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    before = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(layer.statistics(x)["var"].flatten(), x.var((0, 2, 3), correction=0))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_split_normalizes_parts_of_the_channels():
    parts = [Norm(Instance(), Standardize(), num_features=2), Norm(Batch(), Standardize(), num_features=3)]
    layer, x = Split(*parts), torch.randn(4, 5, 3, 3)
    torch.testing.assert_close(layer(x), torch.cat([parts[0](x[:, :2]), parts[1](x[:, 2:])], 1))
    with pytest.raises(ArgumentError, match="has no num_features"):
        Split(Norm(Instance(), Standardize()))


def test_build_takes_the_common_arguments_for_every_row():
    for name, row in zoo.items():
        options = {"eps": 1e-4, "momentum": 0.2, "groups": 4, "dtype": torch.float64} | dict(row.options)
        layer = build(name, row.features, **options)
        assert all(p.dtype == torch.float64 for p in layer.parameters()), name


def test_build_puts_everything_on_the_device():
    for name in ("bn", "iterative", "cw", "ce", "recurrent-batch", "region"):
        layer = build(name, 8, device="meta")
        assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("iteratve", 8), "name='iteratve' is unknown; did you mean 'iterative'"),
        (lambda: build("bn", 8, epsilon=1e-3), "option='epsilon' is unknown; .*Options: eps, momentum, affine, groups"),
        (lambda: zoo["bacth"], "did you mean 'batch'"),
        (lambda: Named((zoo["bn"], zoo["bn"]), "", repr), r"rows share the names \['batch', 'bn'\]"),
    ],
)
def test_unknown_names_offer_the_closest(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_a_missing_option_is_named():
    def make(num_features, *, classes):
        return nn.Identity()

    row = Row("needy", "S007", make)
    assert repr(row) == "build('needy', num_features, classes=...)  # S007"
    assert "needy" in Named((row,), "", repr)


def test_the_zoo_is_a_mapping_with_a_line_for_each_row():
    assert zoo["bn"] is zoo["batch"]
    assert "bn" in zoo
    assert len(zoo) == len(list(zoo)) == len(repr(zoo).splitlines()) - 1
    assert "group                       group x standardize x affine x current" in repr(zoo)


def test_rows_cite_sources_and_provide_names_of_the_catalog():
    asked = {name for work in works() for name in work.provides}
    for row in zoo.values():
        assert cite(row.source).title
        assert set(row.provides) <= asked, row.name


@pytest.mark.parametrize(
    ("layer", "kind", "axis"),
    [
        (build("bn", 8), "batch", 1),
        (build("gn", 8, groups=4), "group", 1),
        (build("in", 8), "instance", 1),
        (build("ln", 8), "layer", -1),
        (build("rms", 8, offset=1.0), "rms", -1),
        (build("ln", 8, channels="first"), "group", 1),
        (build("iterative", 8), "other", 1),
    ],
)
def test_our_layers_are_recognized(layer, kind, axis):
    parts = recognize(layer)
    assert (parts.kind, parts.axis, parts.eps) == (kind, axis, layer.eps)
    assert list(find_norms(nn.Sequential(nn.Linear(3, 3), layer))) == ["1"]


def test_scale_alone_keeps_the_mean():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 4, 5)) + 3)
    y = Norm(Batch(), Scale())(x)
    assert y.mean() > 1
    assert y.var(correction=0).item() < 2


def test_parts_are_values():
    assert Batch() == Batch()
    assert {Standardize(), Standardize(eps=1e-5)} == {Standardize()}
    assert repr(Running(momentum=None)) == "Running(momentum=None)"
    assert [repr(p) for p in (Group(), Layer(), Position(), BatchGroup(2), TopK(k=3), Whiten("pca"))] == [
        "Group()",
        "Layer()",
        "Position()",
        "BatchGroup(groups=2)",
        "TopK(k=3)",
        "Whiten(method='pca')",
    ]
