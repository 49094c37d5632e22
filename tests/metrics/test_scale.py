"""Scale invariance and effective learning rates measured on attached runs, against identities that hold exactly."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.record import Record
from normscope.metrics import equilibrium, scale, tables

HIDDEN = ("0/weight", "3/weight")


def make(norm=nn.BatchNorm1d, factor=1.0, eps=1e-30, **options):
    """Two hidden layers in float64, each before a normalization without gain, and a frozen head."""
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((6, 8), (8, 8)):
        options_of = {"affine": False} if norm is nn.BatchNorm1d else {"elementwise_affine": False}
        layers += [nn.Linear(inputs, outputs, bias=False), norm(outputs, eps=eps, **(options or options_of)), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(8, 3)).double()
    model[6].requires_grad_(False)
    with torch.no_grad():
        for i in (0, 3):
            model[i].weight *= factor
    return model


def data(step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (32,), generator=generator)


def train(model, optimizer, steps=30, every=1, rates=None, **options):
    losses = []
    with ns.attach(model, optimizer, every=every, **options) as scope:
        for step in range(steps):
            if rates is not None:
                optimizer.param_groups[0]["lr"] = rates(step)
            inputs, targets = data(step)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return scope.record(), np.array(losses)


def free(model):
    return [p for p in model.parameters() if p.requires_grad]


def growth(frame):
    """|w'|^2 - |w|^2 of each step."""
    return frame["norm"] ** 2 * (2 * frame["radial"] + frame["relative"] ** 2)


@pytest.fixture(scope="module")
def plain():
    model = make()
    return train(model, torch.optim.SGD(free(model), 0.1))


def test_weights_before_batch_normalization_are_invariant_by_row(plain):
    frame = scale.invariance(plain[0])
    assert frame["unit"].to_dict() == dict.fromkeys(HIDDEN, "row")
    assert frame["units"].tolist() == [8, 8]
    assert frame["defect"].max() < 1e-13
    assert scale.weights(plain[0])["feeds"].tolist() == ["1", "4"]


def test_weights_before_layer_normalization_are_invariant_as_a_whole():
    model = make(nn.LayerNorm)
    frame = scale.invariance(train(model, torch.optim.SGD(free(model), 0.1))[0])
    assert frame["unit"].to_dict() == dict.fromkeys(HIDDEN, "tensor")
    assert frame["defect"].max() < 1e-6  # of rows, which are kept in float32


def test_weights_before_group_normalization_are_invariant_by_block():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8, bias=False), nn.GroupNorm(2, 8, eps=1e-30, affine=False), nn.ReLU(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers).double()
    frame = scale.invariance(train(model, torch.optim.SGD(model.parameters(), 0.1))[0])
    assert frame.loc["0/weight", ["unit", "units"]].tolist() == ["block", 2]
    assert frame.loc["3/weight", "unit"] == "none"
    assert frame.loc["3/weight", "defect"] > 0.5
    assert frame.loc["0/weight", "defect"] < 1e-6


def test_a_large_eps_breaks_invariance_in_proportion():
    """d f(aW) / da at a = 1 has the factor eps / (var + eps), so the defect is linear in a small eps."""
    defects = []
    for eps in (1e-6, 1e-4, 10.0):
        model = make(eps=eps)
        defects.append(scale.invariance(train(model, torch.optim.SGD(free(model), 1e-3))[0])["defect"]["0/weight"])
    assert defects[1] / defects[0] == pytest.approx(100, rel=0.02)
    assert defects[2] > scale.PARTIAL


def test_norms_grow_by_the_square_of_each_step(plain):
    """|w'|^2 = |w|^2 + eta^2 |g|^2, step by step and in sum."""
    record = plain[0]
    for site in HIDDEN:
        frame = scale.motion(record)[site]
        gradient = record.series(site, "norm", role="gradient").to_numpy(float)
        np.testing.assert_allclose(growth(frame), 0.01 * gradient**2, rtol=1e-6)
        assert frame["radial"].abs().max() < 1e-16
        end = frame["norm"].iloc[-1] ** 2
        assert end - frame["norm"].iloc[0] ** 2 == pytest.approx(0.01 * (gradient[:-1] ** 2).sum(), rel=1e-4)
        np.testing.assert_allclose(frame["effective"], 0.1 / frame["norm"] ** 2, rtol=1e-12)


def test_norms_grow_with_momentum_as_in_the_lemma_of_adamp():
    """|w'|^2 = |w|^2 + eta^2 |p_t|^2 + 2 eta^2 sum over k < t of a^(t - k) |p_k|^2."""
    model = make()
    record, _ = train(model, torch.optim.SGD(free(model), 0.1, momentum=0.9))
    for site in HIDDEN:
        frame = scale.motion(record)[site]
        square = (frame["relative"] * frame["norm"]).to_numpy() ** 2
        past = [sum(0.9 ** (t - k) * square[k] for k in range(t)) for t in range(len(square))]
        np.testing.assert_allclose(growth(frame), square + 2 * np.array(past), rtol=1e-5)


@pytest.mark.parametrize("c", [0.1, 4.0])
def test_the_size_of_weights_can_be_traded_for_rate_and_decay(c):
    """(w, eta, lambda) -> (sqrt(c) w, c eta, lambda / c) changes nothing but the norm."""
    runs = []
    for factor, rate, decay in ((1.0, 0.1, 0.01), (math.sqrt(c), 0.1 * c, 0.01 / c)):
        model = make(factor=factor)
        runs.append(train(model, torch.optim.SGD(free(model), rate, momentum=0.9, weight_decay=decay)))
    (first, losses), (second, other) = runs
    np.testing.assert_allclose(losses, other, rtol=0, atol=1e-13)
    for site in HIDDEN:
        a, b = scale.motion(first)[site], scale.motion(second)[site]
        for name in ("relative", "angle", "effective", "shrink", "expected"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(a["balance"], b["balance"], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(b["norm"] / a["norm"], math.sqrt(c), rtol=1e-6)


def test_decay_is_an_exponential_learning_rate():
    """SGD with decay equals SGD without and eta (1 - eta lambda)^(-2t - 1): the weights turn by the same angles."""
    rate, decay = 0.1, 0.05
    alpha = 1 - rate * decay
    model = make()
    decayed, losses = train(model, torch.optim.SGD(free(model), rate, weight_decay=decay))
    model = make()
    rates = lambda step: rate * alpha ** (-2 * step - 1)  # noqa: E731
    grown, other = train(model, torch.optim.SGD(free(model), rate), rates=rates)
    np.testing.assert_allclose(losses, other, rtol=0, atol=1e-13)
    for site in HIDDEN:
        a, b = scale.motion(decayed)[site], scale.motion(grown)[site]
        np.testing.assert_allclose(a["angle"], b["angle"], rtol=1e-6)
        np.testing.assert_allclose(b["effective"], a["effective"] / alpha, rtol=1e-6)
        np.testing.assert_allclose(b["norm"] / a["norm"], alpha ** -np.arange(len(a)), rtol=1e-6)


def test_adam_trades_the_size_of_weights_for_its_rate():
    """Without decay and eps (w, eta) -> (c w, c eta) changes nothing: the effective rate of Adam is eta / |w|."""
    runs = []
    for c in (1.0, 3.0):
        model = make(factor=c)
        runs.append(train(model, torch.optim.Adam(free(model), 1e-2 * c, eps=0.0)))
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=0, atol=1e-12)
    a, b = (scale.motion(record)["0/weight"] for record, _ in runs)
    np.testing.assert_allclose(a["effective"], b["effective"], rtol=1e-6)
    np.testing.assert_allclose(a["angle"], b["angle"], rtol=1e-5)


def test_balance_of_a_run_without_gradient_is_zero():
    """Decay alone: the norm shrinks by eta lambda a step, and the weight does not turn."""
    model = make()
    optimizer = torch.optim.AdamW(free(model), 0.1, weight_decay=0.2)
    with ns.attach(model, optimizer, every=1) as scope:
        for _ in range(5):
            for p in free(model):
                p.grad = torch.zeros_like(p)
            optimizer.step()
    frame = scale.motion(scope.record())["0/weight"]
    np.testing.assert_allclose(frame["balance"], 0.0, atol=1e-5)
    np.testing.assert_allclose(frame["radial"], -0.02, rtol=1e-6)
    assert frame["angle"].max() < 1e-8


class Walk(nn.Module):
    """A weight that is given tangent random gradients of norm 1 / |w|."""

    def __init__(self, start):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 400, generator=torch.Generator().manual_seed(0)).double())
        with torch.no_grad():
            self.weight *= start / self.weight.norm()


def test_a_random_walk_in_equilibrium_is_told_by_the_record():
    rate, decay, momentum = 0.1, 0.01, 0.9
    model = Walk((rate / (decay * (1 - momentum) * (2 - decay * rate / (1 + momentum)))) ** 0.25)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=momentum, weight_decay=decay)
    generator = torch.Generator().manual_seed(1)
    with ns.attach(model, optimizer, every=5, probes="parameters") as scope:
        for _ in range(3000):
            w = model.weight.detach()
            g = torch.randn(w.shape, generator=generator, dtype=w.dtype)
            g -= (g * w).sum() / (w * w).sum() * w
            model.weight.grad = g / (g.norm() * w.norm())
            optimizer.step()
    frame = scale.summary(scope.record())
    row = frame.loc["/weight"]
    assert row["expected"] == pytest.approx(equilibrium.angle(rate, decay, momentum), rel=1e-6)
    assert row["angle"] == pytest.approx(row["expected"], rel=0.005)
    assert abs(row["balance"] - 1) < 4 * row["balance_error"] + 0.05
    assert row["constant"] == pytest.approx(1 / (4 * 0.01), rel=1e-6)
    assert row["exposure"] == pytest.approx(3000 * 0.04, rel=1e-6)
    assert row["consumed"] == pytest.approx(3000 * 0.01, rel=1e-6)


def test_settings_are_those_of_each_group_and_step():
    model = make()
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[3].weight], "lr": 0.2, "weight_decay": 0.3}]
    optimizer = torch.optim.SGD(groups, momentum=0.5)
    record, _ = train(model, optimizer, steps=6, every=2, rates=lambda step: 0.1 / (step + 1))
    moves = scale.motion(record)
    np.testing.assert_allclose(moves["0/weight"]["rate"], [0.1, 0.1 / 3, 0.1 / 5])
    assert moves["3/weight"]["rate"].tolist() == [0.2] * 3
    np.testing.assert_allclose(moves["3/weight"]["shrink"], 0.2 * 0.3 / 0.5)
    assert moves["0/weight"]["shrink"].tolist() == [0.0] * 3


class Sign(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad.sign() + group["weight_decay"] * p))


def test_of_an_unknown_optimizer_only_what_is_measured_is_told():
    model = make()
    record, _ = train(model, Sign(free(model), 1e-3, 0.1))
    frame = scale.motion(record)["0/weight"]
    assert np.isfinite(frame[["norm", "relative", "radial", "angle"]]).all().all()
    assert frame[["effective", "shrink", "expected", "balance"]].isna().all().all()
    assert set(scale.parameters(record)["rule"]) == {""}


def test_gains_and_idle_biases():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[1].weight[:6] = 0.0
        model[1].weight[6:] = 1.0
        model[1].bias.fill_(0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.0, weight_decay=0.1)
    record, _ = train(model, optimizer, steps=6)
    frame = scale.gains(record)
    assert frame.loc["1/weight", ["gone", "first_max", "last_max", "n"]].tolist() == [0.75, 1.0, 1.0, 8]
    assert frame.loc["1/weight", "decay"] == pytest.approx(0.1)
    assert scale.decayed_norms(record) == ["1/weight", "1/bias"]
    assert scale.idle_biases(record).index.tolist() == ["0/bias"]
    assert scale.idle_biases(record)["share"]["0/bias"] < 1e-13


def test_nothing_recorded_is_nothing_told():
    empty = Record((), pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), (), ())
    for told in (scale.invariance, scale.summary, scale.gains, scale.idle_biases):
        assert len(told(empty)) == 0
    assert scale.motion(empty) == {}


def test_what_settings_imply_is_computed_once_a_group(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)) for _ in range(8)))
    layers = [p for p in model.parameters() if p.ndim > 1]
    rest = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.SGD([{"params": layers}, rest], 0.1, momentum=0.5, weight_decay=0.01)
    with ns.attach(model, optimizer, every=1) as scope:
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().sum(1).mean().backward()
            optimizer.step()
    calls, shrinkage, arrays, read = [], equilibrium.shrinkage, tables.arrays, []
    monkeypatch.setattr(equilibrium, "angle", lambda *_, **__: 0.0)
    monkeypatch.setattr(equilibrium, "shrinkage", lambda *a, **k: calls.append(a) or shrinkage(*a, **k))
    monkeypatch.setattr(tables, "arrays", lambda *a, **k: read.append(k) or arrays(*a, **k))
    moves = scale.motion(scope.record())
    assert len(moves) == 32
    assert len(calls) == 2 * len(moves["0.0/weight"])  # groups, not parameters
    assert {float(moves[site]["shrink"].iloc[-1]) for site in moves if site.endswith(".0/weight")} == {0.1 * 0.01 / 0.5}
    assert {float(moves[site]["decay"].iloc[-1]) for site in moves if not site.endswith(".0/weight")} == {0.0}
    read.clear()
    assert len(scale.gains(scope.record())) == 8
    assert len(read) == 1  # slots, not layers
