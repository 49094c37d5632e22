"""What is recorded of normalization layers against the layers' own definitions in float64 numpy."""

import copy

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

import normscope as ns
from normscope.probes import normalization
from tests.probes.test_activations import scalars

EPS = 0.05  # large, so that its weight is far from 0 and 1


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def train(model, batches, every=1, **settings):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with ns.attach(model, optimizer, every=every, **settings) as scope:
        for x in batches:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    return scope.record()


def areas(x, kind):
    """Return the areas that a layer normalizes over, as rows of float64 numpy."""
    x = x.detach().double()
    if kind == "batch":
        return x.movedim(1, 0).reshape(x.shape[1], -1).numpy()
    if kind == "group":
        return x.reshape(x.shape[0] * 2, -1).numpy()
    if kind == "instance":
        return x.reshape(x.shape[0] * x.shape[1], -1).numpy()
    return x.reshape(-1, x.shape[-1]).numpy()


LAYERS = {
    "batch, rows": (lambda: nn.BatchNorm1d(6, EPS), (16, 6), "batch"),
    "batch, images": (lambda: nn.BatchNorm2d(6, EPS), (5, 6, 4, 4), "batch"),
    "batch, no running": (lambda: nn.BatchNorm1d(6, EPS, track_running_stats=False), (16, 6), "batch"),
    "layer": (lambda: nn.LayerNorm(6, EPS), (4, 5, 6), "layer"),
    "rms": (lambda: nn.RMSNorm(6, EPS), (4, 5, 6), "rms"),
    "group": (lambda: nn.GroupNorm(2, 6, EPS), (5, 6, 4, 4), "group"),
    "instance": (lambda: nn.InstanceNorm2d(6, EPS, affine=True), (5, 6, 4, 4), "instance"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_statistics_are_those_of_the_layer(name, dtype):
    build, shape, kind = LAYERS[name]
    x = (torch.randn(shape) * 0.3 + 0.5).to(dtype)
    rows = areas(x, kind)
    record = train(nn.Sequential(build().to(dtype)), [x])
    mean, var = rows.mean(1), rows.var(1)
    power = (rows**2).mean(1) if kind == "rms" else var
    expected = {"mean": mean, "var": var, "eps_weight": EPS / (power + EPS)}
    found = scalars(record, "0/input")
    for stat, values in expected.items():
        np.testing.assert_allclose(record.array("0/input", stat)[1][0], values, rtol=1e-4, atol=1e-6)
        whole = [values.mean(), values.min(), np.median(values), values.max()]
        names = (stat, f"{stat}.min", f"{stat}.q50", f"{stat}.max")
        np.testing.assert_allclose([found[n][0] for n in names], whole, rtol=1e-4, atol=1e-6)
    assert found["count"] == [rows.shape[1]]
    assert found["batch"] == [shape[0]]


def test_the_eps_weight_is_what_the_layer_loses():
    """The variance of a normalized output is 1 minus the weight of eps."""
    layer = nn.LayerNorm(400, EPS, elementwise_affine=False)
    x = torch.randn(3, 400) * torch.tensor([[0.01], [0.3], [10.0]])
    model = nn.Sequential(nn.Identity(), layer, nn.Linear(400, 1))
    record = train(model, [x])
    lost = 1 - layer(x).var(1, correction=0)
    np.testing.assert_allclose(record.array("1/input", "eps_weight")[1][0], lost, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("eps", "power", "expected"),
    [(0.0, 2.0, 0.0), (0.0, 0.0, np.nan), (1e-5, 0.0, 1.0), (1.0, 3.0, 0.25), (1e-5, np.nan, np.nan)],
)
def test_eps_weight_at_its_limits(eps, power, expected):
    found = normalization.eps_weight(np.zeros(1), np.array([power]), eps, rms=False)
    np.testing.assert_allclose(found, [expected])


def test_many_areas_are_thinned():
    x = torch.randn(1000, 6)
    record = train(nn.Sequential(nn.LayerNorm(6)), [x])
    found = record.array("0/input", "mean")[1][0]
    assert len(found) == 250  # every fourth of 1000
    np.testing.assert_allclose(found, x[::4].mean(1), rtol=1e-4, atol=1e-6)


# ---- running statistics ----------------------------------------------------------------------------------------------


def test_running_statistics_drift_and_change():
    model = nn.Sequential(nn.BatchNorm2d(6))
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    batches = [torch.randn(5, 6, 3, 3) + step for step in range(3)]
    expected, before = [], None
    for x in batches:
        optimizer.zero_grad()
        twin(x).square().mean().backward()
        mean, var = (b.double().numpy().copy() for b in (twin[0].running_mean, twin[0].running_var))
        batch_mean, batch_var = areas(x, "batch").mean(1), areas(x, "batch").var(1, ddof=1)
        drift = 0.5 * (np.log(var / batch_var) + (batch_var + (batch_mean - mean) ** 2) / var - 1)
        change = np.nan
        if before is not None:
            change = np.linalg.norm(mean - before[0]) / np.linalg.norm(np.sqrt(var))
            change += np.linalg.norm(var - before[1]) / np.linalg.norm(var)
        before = (mean, var)
        expected.append((mean, var, drift, change))
        optimizer.step()
    record = train(model, batches)
    for number, stat in enumerate(("mean", "var", "drift")):
        np.testing.assert_allclose(
            record.array("0/running", stat)[1], [e[number] for e in expected], rtol=1e-4, atol=1e-6
        )
    found = scalars(record, "0/running")
    np.testing.assert_allclose(found["change"], [e[3] for e in expected], rtol=1e-4)
    assert found["updates"] == [1, 2, 3]
    assert found["calls"] == found["training"] == [1, 1, 1]
    assert found["recomputed"] == found["silent"] == [0, 0, 0]


@pytest.mark.parametrize(("mean", "var"), [(0.3, 2.0), (-1.0, 0.5), (0.0, 1.0)])
def test_drift_is_the_divergence_of_two_gaussians(mean, var):
    def log_density(x, m, v):
        return -0.5 * ((x - m) ** 2 / v + np.log(2 * np.pi * v))

    other, scale = 0.1, 1.5
    expected, _ = integrate.quad(
        lambda x: np.exp(log_density(x, mean, var)) * (log_density(x, mean, var) - log_density(x, other, scale)),
        -30,
        30,
    )
    found = normalization.drift(np.array([mean]), np.array([var]), np.array([other]), np.array([scale]))
    np.testing.assert_allclose(found, [expected], rtol=1e-6, atol=1e-9)


def test_drift_at_its_limits():
    zero, one = np.zeros(1), np.ones(1)
    assert normalization.drift(zero, one, zero, one) == 0
    assert normalization.drift(zero, zero, zero, one) == np.inf
    assert normalization.drift(zero, one, zero, zero) == np.inf
    assert np.isnan(normalization.drift(zero, zero, zero, zero))


def test_a_frozen_layer_is_seen_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    model[1].eval()
    found = scalars(train(model, torch.randn(3, 8, 6)), "1/running")
    assert found["training"] == [0, 0, 0]
    assert found["calls"] == [1, 1, 1]
    assert found["updates"] == [0, 0, 0]
    assert found["change"][1:] == [0, 0]


def test_forwards_without_gradient_are_silent():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ns.attach(model, optimizer, every=1) as scope:
        with torch.no_grad():
            model(torch.randn(8, 6))  # in training mode: it moves the running statistics
            model(torch.randn(8, 6))
        model(torch.randn(8, 6)).sum().backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(torch.randn(8, 6))  # in evaluation mode: it does not
        model.train()
        model(torch.randn(8, 6)).sum().backward()
        optimizer.step()
    found = scalars(scope.record(), "1/running")
    assert found["silent"] == [2, 0]
    assert found["calls"] == [1, 1]
    assert found["updates"] == [3, 4]


def test_several_calls_and_batches_in_a_step():
    model = nn.Sequential(nn.BatchNorm1d(6))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = torch.randn(3, 8, 6)
    with ns.attach(model, optimizer, every=1) as scope:
        for x in batches:
            model(x).square().sum().backward()
        optimizer.step()
    record = scope.record()
    assert scalars(record, "0/running")["calls"] == [3]
    assert scalars(record, "0/running")["updates"] == [3]
    np.testing.assert_allclose(
        record.array("0/input", "var")[1][0], areas(batches.reshape(24, 6), "batch").var(1), rtol=1e-4
    )
    np.testing.assert_allclose(record.array("0/running", "mean")[1][0], model[0].running_mean, rtol=1e-6)


def test_a_cumulative_average_has_no_momentum():
    record = train(nn.Sequential(nn.BatchNorm1d(6, momentum=None)), torch.randn(2, 8, 6))
    sites = record.sites.set_index("site")
    assert np.isnan(sites.loc["0/running", "momentum"]) or sites.loc["0/running", "momentum"] is None
    assert sites.loc["0/running", ["norm", "eps", "has_running"]].tolist() == ["batch", 1e-5, True]


def test_an_input_changed_in_place_is_measured_anew():
    class Shift(nn.Module):
        def forward(self, x):
            return x.add_(3.0)

    model = nn.Sequential(nn.Linear(6, 6), Shift(), nn.BatchNorm1d(6))
    x = torch.randn(16, 6)
    expected = model[0](x).detach().numpy().mean(0) + 3
    np.testing.assert_allclose(train(model, [x]).array("2/input", "mean")[1][0], expected, rtol=1e-4)
    direct = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    direct[0].register_forward_hook(lambda module, inputs, output: output.mul_(2.0))
    expected = direct[0](x).detach().numpy().mean(0)
    np.testing.assert_allclose(train(direct, [x]).array("1/input", "mean")[1][0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("layer", "shape"), [(nn.InstanceNorm1d, (6, 9)), (nn.InstanceNorm2d, (6, 4, 5))])
def test_instance_norm_without_a_batch_dimension(layer, shape):
    x = torch.randn(shape)
    record = train(nn.Sequential(layer(6, EPS, affine=True)), [x])
    rows = x.double().reshape(6, -1).numpy()
    np.testing.assert_allclose(record.array("0/input", "var")[1][0], rows.var(1), rtol=1e-4)


class GraphInstanceNorm(nn.InstanceNorm1d):
    """Normalize nodes, samples being told by another argument."""

    def forward(self, x, sample=None):
        return super().forward(x.t()[None])[0].t()


def test_areas_that_another_argument_tells_are_not_guessed():
    record = train(nn.Sequential(GraphInstanceNorm(6, affine=True)), [torch.randn(9, 6)])
    assert "0/output" in set(record.sites["site"])
    assert not [block for block in record.blocks if block.site == "0/input"]


def test_several_sets_of_running_statistics_are_kept_side_by_side():
    record = train(nn.Sequential(ns.norms.build("switchable-width-batch", 6)), [torch.randn(16, 6)])
    assert failed(record) == []
    assert record.array("0/running", "mean")[1].shape[1] % 6 == 0


def failed(record):
    return list(record.events.loc[record.events["kind"] == "probe-failed", "message"])


class Standing(nn.Module):
    """Running statistics in the shape in which they are used."""

    def __init__(self):
        super().__init__()
        self.eps = EPS
        self.weight = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.register_buffer("running_mean", torch.zeros(1, 6, 1, 1))
        self.register_buffer("running_var", torch.ones(1, 6, 1, 1))

    def forward(self, x):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True)
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var, 0.1)
        return self.weight * (x - mean) / torch.sqrt(var + self.eps)


def test_running_statistics_of_any_shape():
    x = torch.randn(5, 6, 4, 4) + 3
    record = train(nn.Sequential(type("BatchNorm", (Standing,), {})()), [x])
    assert failed(record) == []
    np.testing.assert_allclose(record.array("0/running", "mean")[1][0], 0.1 * x.mean((0, 2, 3)), rtol=1e-5)
