import math

import pytest

from normscope.core.finding import Verdict
from normscope.diagnostics import run
from tests.diagnostics.test_propagation import only
from tests.metrics.records import Network

FAILURE, WARNING, UNDECIDED, NOTE, OK = Verdict


def test_a_probe_that_failed():
    network = Network()
    network.events = [(30, "probe-failed", "l2.linear/output", "tails: RuntimeError: no"), (40, "note", "", "hello")]
    found = only(run.probe_failed(network.record()))
    assert (found.verdict, found.site, found.step) == (WARNING, "l2.linear/output", 30)
    assert "RuntimeError: no" in found.message
    assert only(run.probe_failed(Network().record())).verdict is OK


def test_what_is_not_measured():
    network = Network()
    network.extra_sites["mask/output"] = {"class": "Mask", "note": "int64 values are not measured", "shape": [4]}
    found = only(run.unmeasured(network.record()))
    assert (found.verdict, found.site, found.evidence["unmeasured"]) == (NOTE, "mask/output", 1)
    assert only(run.unmeasured(Network().record())).verdict is OK


@pytest.mark.parametrize(
    ("skipped", "verdict"),
    [((0, 1, 2), NOTE), (range(0, 40), NOTE), (range(40, 100), WARNING), ((), OK)],
)
def test_skipped_steps(skipped, verdict):
    network = Network()
    network.contexts = {step: {"loss_scale": 2.0**16, "skipped": step in skipped} for step in range(100)}
    found = only(run.skipped_steps(network.record()))
    assert found.verdict is verdict
    assert found.step == (skipped[0] if skipped else None)


def test_a_run_without_a_scaler_skips_nothing():
    assert run.skipped_steps(Network().record()) == []


def test_a_model_without_normalization():
    assert only(run.no_normalization(Network(norm=None).record())).verdict is NOTE
    assert only(run.no_normalization(Network().record())).verdict is OK
    silent = Network()
    del silent.facts["norms"]
    assert only(run.no_normalization(silent.record())).evidence["norms"] == 6


@pytest.mark.parametrize(("steps", "verdict"), [([], UNDECIDED), ([0], UNDECIDED), ([0, 10], OK)])
def test_a_record_without_enough_in_it(steps, verdict):
    assert only(run.no_data(Network(steps=steps).record())).verdict is verdict


def test_a_model_without_normalization_is_said_in_words():
    assert only(run.no_normalization(Network(norm=None).record())).message == "The model has no normalization layer."


def test_notes_of_the_record_are_shown():
    network = Network()
    network.events = [(10, "note", "cell/output", "Calls of cell beyond the eighth are joined")]
    found = only(run.unmeasured(network.record()))
    assert (found.verdict, found.site, found.step) == (NOTE, "cell/output", 10)
    assert found.message == "Calls of cell beyond the eighth are joined."


def broken(since, before, **last):
    network = Network()
    network.contexts = {s: before(s) for s in range(since)}
    network.contexts |= {s: {"grad_norm": math.inf, "loss": math.inf} | last for s in range(since, 91)}
    return only(run.diverged(network.record()))


def test_a_run_that_diverges_slowly_names_the_learning_rate():
    found = broken(57, lambda s: {"loss": 1.5**s, "grad_norm": 2.0**s})
    assert (found.verdict, found.step) == (FAILURE, 57)
    assert found.message == (
        "Training broke at step 57: gradients are NaN or infinite from there to the end (34 of 91 steps)."
    )
    assert found.evidence["last_loss"] == pytest.approx(1.5**56)
    assert found.evidence["grad_norm_growth"] == pytest.approx(2.0**10)
    assert found.evidence["lr"] == pytest.approx(0.1)
    assert "1e3-fold" in found.cause
    assert "learning rate" in found.cause


def test_a_run_that_breaks_at_once_names_one_batch():
    found = broken(57, lambda s: {})
    assert "one bad batch" in found.cause
    assert "step 57" in found.remedy
    alone = broken(57, lambda s: {}, grad_norm=None)
    assert "the loss is NaN" in alone.message


def test_only_the_last_stretch_to_the_end_is_a_break():
    network = Network()
    network.contexts = {s: {"grad_norm": math.inf} for s in (20, 21, 22)}
    assert only(run.diverged(network.record())).verdict is OK
    network.contexts |= {s: {"grad_norm": math.inf} for s in (89, 90)}
    found = only(run.diverged(network.record()))
    assert (found.verdict, found.step) == (FAILURE, 89)
    del network.contexts[89]
    assert only(run.diverged(network.record())).verdict is UNDECIDED
    network.contexts = {90: {"grad_norm": None, "skipped": True, "loss_scale": 1.0}}
    assert "step 89" in only(run.diverged(network.record())).message
    network.contexts = {s: {"grad_norm": None, "loss": None} for s in range(91)}
    assert run.diverged(network.record()) == []
