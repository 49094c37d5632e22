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
