import numpy as np
import pytest

from normscope.core.finding import Verdict
from normscope.diagnostics import mismatch
from tests.diagnostics.test_propagation import only
from tests.metrics.records import Network, at

FAILURE, WARNING, UNDECIDED, NOTE, OK = Verdict
ALL = (
    mismatch.running_statistics,
    mismatch.train_eval_gap,
    mismatch.never_updated,
    mismatch.momentum,
    mismatch.updated_twice,
    mismatch.evaluation_mode,
    mismatch.tiny_variance,
)


def drifting(value, since=20, **options):
    return Network(**options).edit(at("l4.norm/running", steps=range(since, 100), **{"drift.q50": value}))


def shared(network):
    network.extra_sites["l4.norm#1/output"] = {"class": "BatchNorm1d", "norm": "batch"}
    return network


def held(network, batch=1.0, population=1.0, gap=0.1):
    network.extra["/output", "batch", "value"] = lambda step: {"loss": batch, "n": 256.0}
    network.extra["/output", "population", "value"] = lambda step: {"loss": population, "n": 256.0, "gap": gap}
    return network


def test_drift_beyond_sampling_is_found_and_dated():
    found = only(mismatch.running_statistics(drifting(0.5).record()))
    assert (found.verdict, found.site, found.step) == (WARNING, "l4.norm/running", 20)
    assert found.evidence["drift"] == pytest.approx(0.5)
    assert found.evidence["expected"] == pytest.approx(1 / 64, rel=0.06)
    assert found.threshold == found.evidence["limit"] == pytest.approx(0.1)


@pytest.mark.parametrize(("batch", "value", "verdict"), [(64, 0.05, OK), (2, 1.5, OK), (4, 1.0, OK), (4, 4.0, WARNING)])
def test_small_batches_may_drift_as_much_as_sampling_explains(batch, value, verdict):
    network = drifting(value).edit(at("/input", batch=float(batch)))
    assert only(mismatch.running_statistics(network.record())).verdict is verdict


def test_a_shared_layer_mixes_populations_which_is_a_note():
    assert only(mismatch.running_statistics(shared(drifting(0.5)).record())).verdict is NOTE


def test_an_average_that_has_just_begun_is_not_judged():
    network = drifting(0.5, steps=range(0, 20, 4), since=0)
    found = only(mismatch.running_statistics(network.record()))
    assert found.verdict is UNDECIDED
    assert "17 updates" in found.message


def test_without_drift_nothing_is_judged():
    edit = lambda site, role, step, s: [s.pop(k) for k in [*s] if k.startswith("drift")]  # noqa: E731
    assert only(mismatch.running_statistics(Network().edit(edit).record())).verdict is UNDECIDED


@pytest.mark.parametrize(
    ("population", "gap", "verdict"),
    [
        (1.0, 0.9, OK),
        (0.5, 0.9, OK),
        (5.0, 0.2, OK),
        (2.0, 0.4, NOTE),
        (5.0, 0.4, NOTE),
        (5.0, 0.8, WARNING),
        (5.0, 1.4, FAILURE),
    ],
)
def test_the_gap_between_training_and_evaluation(population, gap, verdict):
    found = only(mismatch.train_eval_gap(held(drifting(0.5), 1.0, population, gap).record()))
    assert found.verdict is verdict
    assert found.evidence["loss_population"] == population
    if verdict is not OK:
        assert (found.site, found.step) == ("l4.norm/running", 90)


def test_a_negative_loss_is_compared_by_its_size():
    assert only(mismatch.train_eval_gap(held(Network(), -5.0, -4.5, 0.8).record())).verdict is OK
    assert only(mismatch.train_eval_gap(held(Network(), -5.0, 8.0, 0.8).record())).verdict is WARNING


def test_the_gap_needs_a_problem_and_running_statistics():
    found = only(mismatch.train_eval_gap(Network().record()))
    assert found.verdict is UNDECIDED
    assert "problem=normscope.Problem(model, loss, [(inputs, targets)])" in found.remedy
    assert mismatch.train_eval_gap(Network(norm="layer").record()) == []
    found = only(mismatch.train_eval_gap(held(Network(), gap=np.nan).record()))
    assert (found.verdict, "problem" in found.remedy) == (UNDECIDED, False)


@pytest.mark.parametrize(("drift", "verdict"), [(0.5, FAILURE), (0.01, NOTE), (np.nan, WARNING)])
def test_statistics_that_never_move(drift, verdict):
    network = drifting(drift).edit(at("/running", updates=0.0, change=0.0))
    found = only(mismatch.never_updated(network.edit(at("/running", **{"drift.q50": drift})).record()))
    assert (found.verdict, found.step) == (verdict, 10)
    assert len(found.sites) == 6


def test_statistics_that_stop_moving():
    network = drifting(0.5).edit(at("l4.norm/running", steps=range(40, 100), updates=41.0))
    found = only(mismatch.never_updated(network.record()))
    assert (found.verdict, found.site, found.step, found.sites) == (
        FAILURE,
        "l4.norm/running",
        50,
        ("l4.norm/running",),
    )
    assert "stopped moving" in found.message


def test_frozen_layers_need_not_move():
    record = Network().edit(at("/running", updates=0.0, change=0.0, training=0.0)).record()
    assert mismatch.never_updated(record) == []
    assert only(mismatch.never_updated(Network().record())).verdict is OK
    assert only(mismatch.never_updated(Network(steps=[0]).record())).verdict is UNDECIDED


@pytest.mark.parametrize(
    ("momentum", "drift", "verdict"),
    [
        (0.1, 0.01, OK),
        (0.1, 0.5, OK),
        (0.01, 0.01, OK),
        (0.01, 0.5, WARNING),
        (None, 0.01, OK),
        (None, 0.5, WARNING),
        (0.0, 0.01, FAILURE),
        (0.99, 0.0, WARNING),
        (1.0, 0.0, WARNING),
        (0.6, 0.0, NOTE),
    ],
)
def test_momentum(momentum, drift, verdict):
    found = only(mismatch.momentum(drifting(drift, momentum=momentum).record()))
    assert found.verdict is verdict
    if verdict is WARNING and drift:
        assert found.sites == ("l4.norm/running",)


def test_a_slow_momentum_is_blamed_for_a_gap():
    found = only(mismatch.momentum(held(Network(momentum=0.01), 1.0, 5.0, 0.8).record()))
    assert (found.verdict, len(found.sites)) == (WARNING, 6)


@pytest.mark.parametrize(
    ("values", "how"),
    [
        ({"recomputed": 1.0}, "backward"),
        ({"silent": 2.0}, "no_grad"),
        ({"recomputed": 1.0, "calls": 0.0, "silent": 1.0}, "backward"),
    ],
)
def test_layers_updated_twice(values, how):
    found = only(mismatch.updated_twice(Network().edit(at("l4.norm/running", **values)).record()))
    assert (found.verdict, found.site) == (WARNING, "l4.norm/running")
    assert how in found.message
    assert ("eval()" in found.remedy) == (how == "no_grad")


def test_updates_between_sampled_steps_are_seen():
    more = lambda site, role, step, s: s.update(updates=1.2 * step) if "updates" in s else None  # noqa: E731
    found = only(mismatch.updated_twice(Network().edit(more).record()))
    assert (found.verdict, found.evidence["updates_per_forward"]) == (WARNING, pytest.approx(1.2))


def test_accumulation_shared_layers_and_one_look_are_no_double_updates():
    accumulated = Network().edit(at("/running", calls=4.0))
    accumulated.edit(lambda site, role, step, s: s.update(updates=4.0 * step) if "updates" in s else None)
    assert only(mismatch.updated_twice(accumulated.record())).verdict is OK
    assert only(mismatch.updated_twice(Network().edit(at("/running", steps=[0], silent=1.0)).record())).verdict is OK
    mixed = shared(Network()).edit(at("l4.norm/running", silent=1.0, recomputed=1.0))
    assert only(mismatch.updated_twice(mixed.record())).verdict is OK


@pytest.mark.parametrize(("drift", "verdict"), [(0.5, WARNING), (0.01, NOTE), (np.nan, UNDECIDED)])
def test_evaluation_mode_while_training(drift, verdict):
    edit = at("/running", training=0.0, **{"drift.q50": drift})
    network = drifting(drift).edit(edit)
    found = only(mismatch.evaluation_mode(network.record()))
    assert (found.verdict, len(found.sites)) == (verdict, 6 if verdict is not UNDECIDED else 0)
    assert mismatch.running_statistics(network.record()) == []
    assert only(mismatch.evaluation_mode(Network().record())).verdict is OK


@pytest.mark.parametrize(
    ("variances", "eps", "verdict"),
    [
        ([1.0] * 8, 1e-5, OK),
        ([1e-8] + [1.0] * 15, 1e-5, OK),
        ([1e-8] * 2 + [1.0] * 6, 1e-5, NOTE),
        ([1e-8] * 6 + [1.0] * 2, 1e-5, WARNING),
    ],
)
def test_tiny_variance(variances, eps, verdict):
    network = Network(layers=2)
    network.arrays["l1.norm/running", "value", "var"] = lambda step: np.array(variances)
    assert only(mismatch.tiny_variance(network.record())).verdict is verdict


def test_a_tiny_eps_magnifies():
    network = Network(layers=2)
    blocks = {site: a | ({"eps": 1e-12} if "norm" in a else {}) for site, a in network.blocks().items()}
    network.blocks = lambda: blocks
    network.arrays["l1.norm/running", "value", "var"] = lambda step: np.array([1e-9, 1.0, 1.0, 1.0])
    found = only(mismatch.tiny_variance(network.record()))
    assert (found.verdict, found.site) == (WARNING, "l1.norm/running")
    assert found.evidence["gain"] == pytest.approx(1e-9**-0.5, rel=1e-3)


@pytest.mark.parametrize("diagnose", ALL)
def test_without_running_statistics_there_is_no_mismatch(diagnose):
    assert diagnose(Network(norm="layer").record()) == []
    assert diagnose(Network(norm=None).record()) == []


def unmoved(momentum, steps=range(0, 40, 4)):
    network = Network(momentum=momentum, steps=steps).edit(at("/running", updates=0.0, change=0.0))
    return network.edit(at("/running", **{"drift.q50": 2.0}))


@pytest.mark.parametrize("momentum", [0.0, 0.01, None])
def test_statistics_that_never_move_explain_the_rest(momentum):
    network = held(unmoved(momentum), 0.1, 11.8, 2.0)
    assert only(mismatch.never_updated(network.record())).verdict is FAILURE
    drift, slow = (only(d(network.record())) for d in (mismatch.running_statistics, mismatch.momentum))
    assert drift.verdict is NOTE
    assert "never-updated" in drift.message
    assert slow.verdict is (FAILURE if momentum == 0 else NOTE)
    gap = only(mismatch.train_eval_gap(network.record()))
    assert (gap.verdict, "never-updated" in gap.cause) == (FAILURE, True)


def test_a_loss_that_is_far_worse_weighs_more_than_the_distance_of_outputs():
    assert only(mismatch.train_eval_gap(held(Network(), 0.1, 11.8, 0.4).record())).verdict is WARNING


def test_tiny_variances_behind_dead_units_are_a_consequence():
    network = Network(layers=4)
    network.arrays["l1.act/output", "value", "rms"] = lambda step: np.zeros(16)
    network.edit(at("l1.act/output", dead=1.0))
    network.arrays["l3.norm/running", "value", "var"] = lambda step: np.zeros(16)
    found = only(mismatch.tiny_variance(network.record()))
    assert "consequence of propagation.dead-units at l1.act/output" in found.message
    network.arrays["l0.norm/running", "value", "var"] = lambda step: np.zeros(16)
    del network.arrays["l3.norm/running", "value", "var"]
    assert "consequence" not in only(mismatch.tiny_variance(network.record())).message
