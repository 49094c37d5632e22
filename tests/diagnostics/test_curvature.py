"""Diagnostics of curvature: each fires on a record made for it, is silent on a good one, and judges whole runs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normscope as ns
from normscope.core.finding import Verdict
from normscope.core.store import Store
from normscope.diagnostics import curvature
from tests.metrics.records import Network
from tests.metrics.test_curvature import measured

FAILURE, WARNING, UNDECIDED, NOTE, OK = Verdict
ALL = (curvature.edge_of_stability, curvature.outliers, curvature.trace_dominated, curvature.negative)
NAN = float("nan")


def only(found):
    (finding,) = found
    return finding


@pytest.mark.parametrize(
    ("sharpness", "losses", "verdict", "limit"),
    [
        (10.0, (1.0, 2.0), OK, 1.0),  # of 38: the loss may grow for another reason
        (35.0, (1.0, 0.5), NOTE, 0.8),
        (50.0, (1.0, 0.5), NOTE, 0.8),
        (50.0, (1.0, 1.05), NOTE, 0.8),
        (50.0, (1.0, 1.5), WARNING, 1.0),
        (50.0, (-1.0, -0.5), WARNING, 1.0),
    ],
)
def test_sharpness_above_the_edge_warns_where_the_loss_grows(sharpness, losses, verdict, limit):
    rows = {0: {"held_loss": losses[0]}, 40: {"held_loss": losses[1], "sharpness": sharpness}}
    found = only(curvature.edge_of_stability(measured(rows)))
    assert (found.verdict, found.threshold) == (verdict, limit)
    assert found.evidence["ratio"] == pytest.approx(sharpness / 38)
    if verdict is WARNING:
        assert found.step == 40
        assert found.evidence["stable_lr"] == pytest.approx(0.1 * 38 / sharpness)
        assert "the loss on held samples has grown" in found.message


def test_a_loss_that_is_not_finite_has_grown():
    rows = {0: {"sharpness": 50.0}, 40: {"held_loss": np.inf, "sharpness": NAN}}
    found = only(curvature.edge_of_stability(measured(rows)))
    assert (found.verdict, found.step) == (WARNING, 0)
    assert "not finite at step 40" in found.message


def test_the_start_may_be_above_the_edge():
    rows = {0: {"sharpness": 90.0}, 40: {"sharpness": 20.0, "held_loss": 5.0}}
    assert only(curvature.edge_of_stability(measured(rows))).verdict is OK


def test_adam_is_judged_by_its_own_matrix():
    rows = {0: {}, 40: {"held_loss": 3.0, "sharpness": 900.0, "preconditioned": 100.0}}
    assert only(curvature.edge_of_stability(measured(rows, optimizer="AdamW"))).verdict is OK
    rows[40]["preconditioned"] = 400.0
    assert only(curvature.edge_of_stability(measured(rows, optimizer="AdamW"))).verdict is WARNING


def test_without_an_optimizer_the_sharpness_says_which_rate_is_stable():
    found = only(curvature.edge_of_stability(measured({0: {"lr": NAN}})))
    assert (found.verdict, found.evidence["stable_lr"]) == (OK, pytest.approx(0.2))
    found = only(curvature.edge_of_stability(measured({0: {"lr": NAN, "sharpness": -1.0}})))
    assert (found.verdict, "no direction of the loss curves upwards" in found.message) == (OK, True)


def test_without_a_problem_it_says_what_to_pass():
    found = only(curvature.edge_of_stability(Network().record()))
    assert found.verdict is UNDECIDED
    assert "problem=normscope.Problem(model, loss, [(inputs, targets)])" in found.remedy
    assert [diagnostic(Network().record()) for diagnostic in ALL[1:]] == [[]] * 3


@pytest.mark.parametrize(("kth", "verdict"), [(5.0, OK), (1.0, NOTE)])
def test_outliers(kth, verdict):
    found = only(curvature.outliers(measured({0: {"k": 10.0, "kth": kth, "kth_residual": 0.01, "energy": 0.9}})))
    assert (found.verdict, found.evidence["outlier_ratio"]) == (verdict, pytest.approx(10 / kth))
    assert ("hold 90% of the squared gradient" in found.message) == (verdict is NOTE)


@pytest.mark.parametrize(("top", "error", "verdict"), [(5.0, 0.1, OK), (90.0, 1.0, NOTE), (90.0, 50.0, OK)])
def test_a_layer_that_holds_the_trace(top, error, verdict):
    traces = {f"l{i}/weight": (1.0, 0.1) for i in range(4)} | {"head/weight": (top, error)}
    found = only(curvature.trace_dominated(measured({0: {}}, traces)))
    assert (found.verdict, found.site) == (verdict, "head/weight" if verdict is NOTE else "")
    assert found.evidence["share"] == pytest.approx(top / (4 + top))


def test_three_layers_are_too_few_to_share():
    assert curvature.trace_dominated(measured({0: {}}, {"a/weight": (9.0, 0.0), "b/weight": (0.1, 0.0)})) == []


@pytest.mark.parametrize(("left", "verdict"), [(0.45, OK), (0.6, NOTE)])
def test_negative_curvature(left, verdict):
    spectrum = np.array([-1.0, 1.0]), np.array([left, 1 - left])
    found = only(curvature.negative(measured({0: {"smallest": -1.0}}, spectrum=spectrum)))
    assert (found.verdict, found.evidence["negative_mass"]) == (verdict, pytest.approx(left))


@pytest.mark.parametrize("diagnostic", ALL)
def test_an_empty_record_has_no_curvature(diagnostic):
    assert diagnostic(Store(None, "empty", {}).record()) == []


# ---- whole runs ------------------------------------------------------------------------------------------------------


def trained(rate, make=torch.optim.SGD, steps=60, **options):
    """Fit noisy labels of 128 samples with a small network, full batch; `rate` is in units of 2 / sharpness."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(128, 12, generator=draw), torch.randint(0, 4, (128,), generator=draw)
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(12, 12), nn.Tanh())), nn.Linear(12, 4))
    held = ns.Problem(model, F.cross_entropy, [(x, y)])
    if make is torch.optim.SGD:
        rate *= 2 / ns.eigenpairs(held, 1).values[0]
    optimizer = make(model.parameters(), rate, **options)
    with ns.attach(model, optimizer, problem=held) as scope:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scope.step(loss=loss)
    return {f.id: f for f in scope.findings() if f.subject == "curvature"}


@pytest.mark.parametrize(
    ("rate", "make", "options"),
    [(0.3, torch.optim.SGD, {}), (0.3, torch.optim.SGD, {"momentum": 0.9}), (1e-3, torch.optim.AdamW, {})],
)
def test_healthy_runs_have_no_warning(rate, make, options):
    found = trained(rate, make, **options)
    assert {f.verdict for f in found.values()} <= {OK, NOTE}
    assert found["curvature.edge-of-stability"].evidence["ratio"] > 0


def quadratic(factor):
    """Descend on |A x|^2 / 2 with `factor` times the largest stable learning rate."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1, bias=False)
    x = torch.randn(64, 6)
    held = ns.Problem(model, F.mse_loss, [(x, torch.zeros(64, 1))])
    rate = factor * 2 / ns.eigenpairs(held, 1, tol=1e-6).values[0]
    optimizer = torch.optim.SGD(model.parameters(), float(rate))
    with ns.attach(model, optimizer, problem=held) as scope:
        for _ in range(30):
            optimizer.zero_grad()
            F.mse_loss(model(x), torch.zeros(64, 1)).backward()
            optimizer.step()
    return float(rate), only([f for f in scope.findings() if f.id == "curvature.edge-of-stability"])


def test_a_learning_rate_above_two_over_sharpness_is_found():
    rate, found = quadratic(1.2)
    assert found.verdict is WARNING
    assert found.evidence["ratio"] == pytest.approx(1.2, rel=1e-3)
    assert found.evidence["stable_lr"] == pytest.approx(rate / 1.2, rel=1e-3)
    _, found = quadratic(0.5)
    assert (found.verdict, found.evidence["ratio"]) == (OK, pytest.approx(0.5, rel=1e-3))


def test_a_run_that_breaks_at_once_is_found():
    _, found = quadratic(1e9)
    assert found.verdict is WARNING
