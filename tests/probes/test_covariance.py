"""Second moments against plain float64 numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normscope as ns
from normscope.metrics import conditioning as metrics
from normscope.probes import covariance
from normscope.probes.transfer import to_host

GENERATOR = torch.Generator().manual_seed(0)


def rows_of(x, axis):
    """Samples [m, d], written out."""
    x = np.moveaxis(x.detach().double().numpy(), axis, -1)
    return x.reshape(-1, x.shape[-1])


def reference(rows, about="moment"):
    """Eigenvalues, descending, of the d x d matrix."""
    centered = rows if about == "moment" else rows - rows.mean(0)
    sigma = sum(np.outer(row, row) for row in centered) / len(rows)
    return np.linalg.eigvalsh(sigma)[::-1]


def host(state):
    return to_host([state])[0]


def check(scalars, rows, factor=1.0, rel=2e-5):
    """Compare stored scalars with eigenvalues in float64."""
    for about in ("moment", "covariance"):
        values = reference(rows, about) * factor**2
        found = {name.partition(".")[2]: value for name, value in scalars.items() if name.startswith(about)}
        assert found["max"] == pytest.approx(values[0], rel=rel, abs=1e-12)
        assert found["trace"] == pytest.approx(values.sum(), rel=rel)
        participation = values.sum() ** 2 / (values**2).sum() if values.any() else 0.0
        assert found["participation"] == pytest.approx(participation, rel=rel)
        for percent in covariance.PERCENTS:
            index = math.ceil(percent * len(values) / 100)
            expected = values[index - 1] if index <= found["rank"] else 0.0
            assert found[f"p{percent}"] == pytest.approx(expected, rel=1e-2, abs=3e-7 * values[0])


SHAPES = {
    "more rows than features": ((200, 12), -1),
    "fewer rows than features": ((9, 40), -1),
    "as many rows as features": ((16, 16), -1),
    "tokens": ((6, 30, 10), -1),
    "images": ((8, 5, 7, 6), -3),
    "images, few positions": ((2, 30, 2, 2), -3),
    "one image without a batch": ((5, 7, 6), -3),
    "a vector": ((7,), -1),
    "one feature": ((50, 1), -1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_a_state_gives_the_eigenvalues_of_plain_numpy(name, dtype):
    shape, axis = SHAPES[name]
    scale = torch.linspace(0.5, 2, shape[axis]).reshape(_wide(shape, axis))
    x = (torch.randn(shape, generator=GENERATOR) * scale + 1).to(dtype)
    found = covariance.spectra(host(covariance.observe(x, axis)))
    rows = rows_of(x, axis)
    assert (found.scalars["samples"], found.scalars["width"]) == rows.shape
    check(found.scalars, rows)
    kept = found.arrays["moment"]
    assert kept == pytest.approx(reference(rows)[: len(kept)], rel=1e-3, abs=1e-6 * kept[0])


def _wide(shape, axis):
    wide = [1] * len(shape)
    wide[axis] = -1
    return wide


def test_the_memory_format_does_not_matter():
    x = torch.randn(8, 5, 7, 6, generator=GENERATOR)
    ours = [covariance.observe(y, -3) for y in (x, x.to(memory_format=torch.channels_last))]
    assert torch.allclose(*ours, rtol=1e-5, atol=1e-6)


def test_a_state_is_a_copy():
    x = torch.randn(3, 5, generator=GENERATOR)
    state = covariance.observe(x, -1)
    before = state.clone()
    x.zero_()
    assert torch.equal(state, before)


@pytest.mark.parametrize("sizes", [(3, 4, 2), (3, 40, 20), (50, 2, 60), (4, 5, 6), (1, 1, 1)])
def test_merging_is_associative_and_equals_one_pass(sizes):
    parts = [torch.randn(size, 12, generator=GENERATOR) + 3 for size in sizes]
    a, b, c = (covariance.observe(part, -1) for part in parts)
    left = covariance.merge(covariance.merge(a, b), c)
    right = covariance.merge(a, covariance.merge(b, c))
    assert left.shape == right.shape
    assert torch.allclose(left, right, rtol=1e-5, atol=1e-5)
    check(covariance.spectra(host(left)).scalars, rows_of(torch.cat(parts), -1))


def test_a_large_mean_does_not_cost_the_variance_its_digits():
    x = torch.randn(4000, 6, generator=GENERATOR) * torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.02]) + 300
    check(covariance.spectra(host(covariance.observe(x, -1))).scalars, rows_of(x, -1), rel=1e-4)
    found = covariance.spectra(host(covariance.observe(x, -1))).scalars
    assert found["covariance.p100"] == pytest.approx(reference(rows_of(x, -1), "covariance")[-1], rel=0.05)


@pytest.mark.parametrize(("samples", "width"), [(4000, 64), (50, 64)])
def test_the_rank_is_that_of_the_data(samples, width):
    x = torch.randn(samples, 10, generator=GENERATOR) @ torch.randn(10, width, generator=GENERATOR)
    found = covariance.spectra(host(covariance.observe(x, -1))).scalars
    assert found["moment.rank"] == found["covariance.rank"] == 10
    assert found["moment.p50"] == found["moment.p100"] == 0


def test_what_is_not_finite_gives_no_eigenvalues_and_zeros_none_above_zero():
    for shape in ((40, 6), (3, 6)):
        x = torch.randn(shape, generator=GENERATOR)
        x[1, 2] = math.inf
        found = covariance.spectra(host(covariance.observe(x, -1)))
        assert math.isnan(found.scalars["moment.max"])
        assert math.isnan(found.scalars["moment.p50"])
        zeros = covariance.spectra(host(covariance.observe(torch.zeros(shape), -1))).scalars
        assert (zeros["moment.max"], zeros["moment.rank"], zeros["moment.participation"]) == (0, 0, 0)


# ---- wide layers -----------------------------------------------------------------------------------------------------


def wide_sample(samples, width, decay):
    scale = torch.arange(1, width + 1, dtype=torch.float32) ** -decay
    return torch.randn(samples, width, generator=GENERATOR) * scale + 0.05


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_a_sketch_bounds_the_largest_eigenvalue_and_knows_the_trace(decay):
    x = wide_sample(900, 1500, decay)
    found = covariance.spectra(host(covariance.observe(x, -1))).scalars
    assert "moment.rank" not in found
    for about in ("moment", "covariance"):
        rows = rows_of(x, -1)
        rows = rows if about == "moment" else rows - rows.mean(0)
        values = np.linalg.eigvalsh(rows @ rows.T / len(rows))[::-1]
        low, error = found[f"{about}.max"], found[f"{about}.error"]
        assert low <= values[0] * (1 + 1e-4)
        assert values[0] <= (low + error) * (1 + 1e-4)
        assert found[f"{about}.trace"] == pytest.approx(values.sum(), rel=1e-4)
        # eight directions give the sum of squares to 1 / sqrt(8) of what the low-rank part leaves
        assert found[f"{about}.participation"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=0.35)
        if decay == 1.0:
            assert error < 0.1 * low


def test_sketches_add_up_and_draw_no_number_of_the_user():
    x = wide_sample(1600, 1500, 1.0)
    before = torch.get_rng_state()
    whole, *halves = (covariance.observe(part, -1) for part in (x, *x.split(800)))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.allclose(whole, covariance.merge(*halves), rtol=1e-3, atol=1e-2)


def test_few_samples_of_a_wide_layer_are_exact_and_merge_to_a_sketch():
    x = wide_sample(600, 3000, 1.0)
    states = [covariance.observe(part, -1) for part in x.split(300)]
    assert [state.shape for state in states] == [(300, 3000)] * 2
    found = covariance.spectra(host(states[0])).scalars
    values = np.linalg.eigvalsh(rows_of(x[:300], -1) @ rows_of(x[:300], -1).T / 300)[::-1]
    assert found["moment.max"] == pytest.approx(values[0], rel=1e-5)
    assert covariance.merge(*states).shape == covariance.observe(x, -1).shape


# ---- attached --------------------------------------------------------------------------------------------------------


class Taken:
    """What the layers of a model see in one step, by plain hooks of the test's own."""

    def __init__(self, model, names):
        self.inputs, self.gradients = {}, {}
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_hook(self._hook(name))

    def _hook(self, name):
        def hook(module, args, output):
            self.inputs.setdefault(name, []).append(args[0].detach().clone())
            output.register_hook(lambda g: self.gradients.setdefault(name, []).append(g.detach().clone()))

        return hook


def recorded(record, site, role):
    block = next(b for b in record.blocks if (b.site, b.role) == (site, role) and "moment.max" in b.stats)
    return dict(zip(block.stats, map(float, block.values[0]), strict=True))


def attached(model, batches, loss=F.cross_entropy, steps=1, divide=1, reduction="mean", cast=False):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with ns.attach(model, optimizer, every=1, probes="covariance", reduction=reduction) as scope:
        for _ in range(steps):
            optimizer.zero_grad()
            for x, y in batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                    value = loss(model(x), y)
                (value / divide).backward()
            optimizer.step()
    record = scope.record()
    assert not len(record.events)
    return record


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


def conv():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2),
        nn.Tanh(),
        nn.Conv2d(8, 6, 2, groups=2),
        nn.ConvTranspose2d(6, 5, 2),
        nn.Flatten(),
        nn.Linear(80, 3),
    )


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), (40, 6), {"0": -1, "2": -1}),
    "few rows": (lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)), (7, 20), {"0": -1, "2": -1}),
    "convolutions": (conv, (10, 4, 9, 9), {"0": -3, "2": -3, "3": -3, "5": -1}),
    "parametrized": (
        lambda: nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 9)), nn.Linear(9, 3)),
        (40, 6),
        {"0": -1, "1": -1},
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(9), nn.Tanh(), nn.LazyLinear(3)), (40, 6), {"0": -1, "2": -1}),
}


def batch(shape, classes=3):
    return torch.randn(shape, generator=GENERATOR), torch.randint(classes, shape[:1], generator=GENERATOR)


@pytest.mark.parametrize("name", MODELS)
def test_inputs_and_gradients_of_layers_are_those_of_plain_numpy(name):
    build, shape, layers = MODELS[name]
    torch.manual_seed(0)
    model, data = build(), batch(shape)
    model(data[0])
    taken = Taken(model, layers)
    record = attached(model, [data])
    for layer, axis in layers.items():
        check(recorded(record, f"{layer}/input", "value"), rows_of(taken.inputs[layer][0], axis))
        rows = rows_of(taken.gradients[layer][0], axis)
        check(recorded(record, f"{layer}/output", "gradient"), rows, factor=shape[0])


def test_a_sum_over_the_batch_needs_no_factor_and_gives_the_same():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), batch((40, 6))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    mean = recorded(attached(model, [data]), "0/output", "gradient")
    model.load_state_dict(state)
    total = attached(model, [data], lambda y, t: F.cross_entropy(y, t, reduction="sum"), reduction="sum")
    for stat, value in recorded(total, "0/output", "gradient").items():
        assert value == pytest.approx(mean[stat], rel=1e-4, abs=1e-7)


def test_accumulated_batches_are_one_batch():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), batch((60, 6))
    taken = Taken(model, ("0", "2"))
    parts = list(zip(data[0].split(4), data[1].split(4), strict=True))
    record = attached(model, parts, divide=15)
    for layer in ("0", "2"):
        found = recorded(record, f"{layer}/input", "value")
        assert found["samples"] == 60
        check(found, rows_of(torch.cat(taken.inputs[layer]), -1))
        rows = rows_of(torch.cat(taken.gradients[layer]), -1)
        check(recorded(record, f"{layer}/output", "gradient"), rows, factor=60)


def test_calls_of_a_shared_module_are_apart():
    torch.manual_seed(0)
    model, data = Shared(), batch((50, 6))
    taken = Taken(model, ("layer",))
    record = attached(model, [data])
    for call, site in enumerate(("layer", "layer#1")):
        check(recorded(record, f"{site}/input", "value"), rows_of(taken.inputs["layer"][call], -1))
        rows = rows_of(taken.gradients["layer"][1 - call], -1)  # the later call hears of its gradient first
        check(recorded(record, f"{site}/output", "gradient"), rows, factor=50)


def test_products_stay_in_float32_under_autocast():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), batch((400, 6))
    taken = Taken(model, ("0", "2"))
    record = attached(model, [data], cast=True)
    assert taken.inputs["2"][0].dtype == torch.bfloat16
    check(recorded(record, "0/input", "value"), rows_of(taken.inputs["0"][0], -1))
    check(recorded(record, "2/input", "value"), rows_of(taken.inputs["2"][0], -1))


def test_rounded_products_are_not_used():
    x = torch.randn(300, 8, generator=GENERATOR)
    assert covariance.observe(x, -1).dtype == torch.float32
    torch.set_float32_matmul_precision("medium")
    try:
        assert covariance.observe(x, -1).dtype == torch.float64
    finally:
        torch.set_float32_matmul_precision("highest")


def test_layers_take_turns_after_the_first_sampled_step():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(23)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with ns.attach(model, optimizer, every=10, probes="covariance") as scope:
        for _ in range(260):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    record = scope.record()
    seen = {b.site: list(b.steps) for b in record.blocks if "moment.max" in b.stats and b.role == "value"}
    assert len(seen) == 23
    assert {steps[0] for steps in seen.values()} == {0}
    assert {tuple(np.diff(steps[1:])) for steps in seen.values() if len(steps) > 2} <= {(50,) * 3, (50,) * 4}
    later = [step for steps in seen.values() for step in steps[1:]]
    assert max(later.count(step) for step in later) == 5


def test_the_first_sampled_step_of_a_run_holds_a_bounded_number_of_layers(monkeypatch):
    monkeypatch.setattr("normscope.scope.session.MOST_HELD", 3 * 2 * 4 * 8**2)
    layers = [layer for _ in range(7) for layer in (nn.Linear(8, 8), nn.Tanh())]
    model, x = nn.Sequential(*layers), torch.randn(16, 8, generator=GENERATOR)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with ns.attach(model, optimizer, every=10, probes="covariance") as scope:
        for _ in range(51):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    steps = scope.record().wide("moment.max", slot="input").notna()
    assert steps.loc[0].tolist() == [True] * 3 + [False] * 4
    assert steps.loc[10:50].sum().tolist() == [1] * 7
    looked = ns.examine(model, lambda out, y: (out - y).square().mean(), [(x, x)], probes="covariance")
    assert looked.wide("moment.max", slot="input").notna().to_numpy().all()


def test_full_eigenvalues_are_kept_and_the_last_ones_written_at_the_end():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), batch((40, 6))
    taken = Taken(model, ("0",))
    record = attached(model, [data])
    steps, values = record.array("0/input", "moment")
    assert list(steps) == [0]
    assert values[0] == pytest.approx(reference(rows_of(taken.inputs["0"][0], -1)), rel=1e-4)


def test_correlations_are_kept_on_request():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), batch((40, 6))
    taken = Taken(model, ("2",))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with ns.attach(model, optimizer, every=1, probes=("covariance", "correlation")) as scope:
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    found = scope.record().array("2/input", "correlation")[1][0].reshape(9, 9)
    assert found == pytest.approx(np.corrcoef(taken.inputs["2"][0].double().numpy().T), abs=1e-5)
    assert all(item.stat != "correlation" for item in attached(model, [data]).channels)


# ---- patches ---------------------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3), (5, 3, 8, 7)),
    "padded": (nn.Conv2d(3, 4, 3, padding=1), (5, 3, 6, 6)),
    "same": (nn.Conv2d(2, 4, (2, 4), padding="same"), (5, 2, 6, 6)),
    "reflected": (nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"), (5, 3, 6, 6)),
    "strided and dilated": (nn.Conv2d(3, 4, (3, 2), stride=(2, 3), dilation=(1, 2), padding=2), (4, 3, 9, 8)),
    "without a batch": (nn.Conv2d(3, 4, 3), (3, 8, 7)),
    "one axis": (nn.Conv1d(3, 4, 5, stride=2, padding=2), (6, 3, 20)),
    "three axes": (nn.Conv3d(2, 4, 2, padding=1), (3, 2, 4, 3, 5)),
}


def unfolded(module, x):
    """Patches [m, channels * taps] in float64, written out."""
    x = x.detach().double().numpy()
    axes = len(module.kernel_size)
    x = x if x.ndim == axes + 2 else x[None]
    if module.padding == "same":  # what is over goes to the far side
        sides = [((k - 1) // 2, k // 2) for k in module.kernel_size]
    else:
        sides = [(p, p) for p in module.padding]
    mode = {"zeros": "constant"}.get(module.padding_mode, module.padding_mode)
    x = np.pad(x, [(0, 0), (0, 0), *sides], mode=mode)
    spans = [(k - 1) * gap + 1 for k, gap in zip(module.kernel_size, module.dilation, strict=True)]
    places = [range(0, n - span + 1, stride) for n, span, stride in zip(x.shape[2:], spans, module.stride, strict=True)]
    rows = []
    for image in x:
        for start in itertools.product(*places):
            cut = [slice(s, s + span, gap) for s, span, gap in zip(start, spans, module.dilation, strict=True)]
            rows.append(image[(slice(None), *cut)].ravel())
    return np.array(rows)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")  # torch's own, of the case "same"
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_are_what_the_kernel_sees(name):
    module, shape = CONVOLUTIONS[name]
    x = torch.randn(shape, generator=GENERATOR)
    found = covariance.patches(module, x)
    assert found.double().numpy() == pytest.approx(unfolded(module, x))
    output = found @ module.weight.flatten(1).T + module.bias  # a convolution is this product
    expected = module(x if x.dim() == len(module.kernel_size) + 2 else x[None])
    assert torch.allclose(output, expected.movedim(1, -1).reshape(output.shape), atol=1e-5)


def test_patches_are_taken_of_few_images_and_narrow_ungrouped_convolutions(monkeypatch):
    x = torch.randn(50, 3, 8, 8, generator=GENERATOR)
    whole = covariance.patches(nn.Conv2d(3, 4, 3), x)
    monkeypatch.setattr(covariance, "_MOST_PATCHED", 20000)
    few = covariance.patches(nn.Conv2d(3, 4, 3), x)
    assert len(whole) == 50 * 36
    assert len(few) == 36 * (20000 // (3 * 64 * 9))
    assert torch.equal(few, whole[: len(few)])
    refused = (nn.Conv2d(128, 8, 3), nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(3, 3, 3), nn.Linear(3, 3))
    assert [covariance.has_patches(module) for module in refused] == [False] * 4


def test_patches_are_recorded_on_request():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    data = batch((30, 2, 6, 6))
    taken = Taken(model, ("2",))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with ns.attach(model, optimizer, every=1, probes=("covariance", "patches")) as scope:
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    record = scope.record()
    rows = unfolded(model[2], taken.inputs["2"][0])
    names = {stat for block in record.blocks if block.site == "2/patches" for stat in block.stats}
    scalars = {name: float(record.series("2/patches", name).iloc[0]) for name in names}
    assert (scalars["samples"], scalars["width"]) == rows.shape == (30 * 16, 54)
    check(scalars, rows)
    kappa = metrics.condition_numbers(record, factor="patches")
    assert list(kappa) == ["0/patches", "2/patches"]
    values = reference(rows)
    assert kappa["2/patches"].iloc[0] == pytest.approx(values[0] / values[26], rel=1e-3)
    assert not [site for site in attached(model, [data]).sites["site"] if site.endswith("/patches")]
