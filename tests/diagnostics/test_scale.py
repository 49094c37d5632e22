"""What is said of runs of which the answer is known: attached ones in float64, and records with one number changed."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from normscope.core.finding import Verdict
from normscope.diagnostics import diagnose, scale
from normscope.metrics.scale import invariance
from tests.diagnostics.test_propagation import only
from tests.metrics.test_scale import Sign, free, make, train

FAILURE, WARNING, UNDECIDED, NOTE, OK = Verdict
ALL = (
    scale.invariance,
    scale.effective_rate,
    scale.equilibrium,
    scale.decay,
    scale.gain_decay,
    scale.bias_before_norm,
    scale.gain_collapse,
)


def run(optimizer, steps=60, every=2, model=None, **options):
    model = make(**options) if model is None else model
    return train(model, optimizer(free(model)), steps=steps, every=every)[0]


def sgd(rate=0.1, **options):
    return lambda parameters: torch.optim.SGD(parameters, rate, **options)


def adamw(rate=1e-3, decay=0.1):
    return lambda parameters: torch.optim.AdamW(parameters, rate, weight_decay=decay)


@pytest.mark.parametrize(
    "optimizer",
    [sgd(), sgd(0.05, momentum=0.9, weight_decay=5e-4), sgd(0.05, momentum=0.9, weight_decay=0.01), adamw()],
    ids=["SGD", "little decay", "decay", "AdamW"],
)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_healthy_runs_get_no_warning(optimizer, norm):
    record = run(optimizer, norm=norm)
    found = [f for diagnostic in ALL for f in diagnostic(record)]
    assert [f.message for f in found if f.verdict in (FAILURE, WARNING, UNDECIDED)] == []
    assert only(scale.invariance(record)).verdict is OK


def test_invariance_is_said_with_its_units():
    found = only(scale.invariance(run(sgd())))
    assert (found.verdict, found.evidence["invariant"]) == (OK, 2)
    assert found.message.startswith("2 of 2 weights scale-invariant (2 by row); largest defect")  # the head is frozen


def test_a_large_eps_is_named_with_the_finding_that_explains_it():
    found = only(scale.invariance(run(sgd(1e-3), eps=10.0)))
    assert (found.verdict, found.site) == (NOTE, found.sites[0])
    assert "propagation.eps-dominates" in found.cause
    assert found.evidence["largest_defect"] > found.threshold


def test_a_bias_breaks_invariance_before_layer_normalization():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)).double()
    record = run(sgd(), model=model)
    found = only(scale.invariance(record))
    assert (found.verdict, found.evidence["invariant"]) == (OK, 0)  # only both together are, which is as it should be
    assert invariance(record)["unit"]["0/weight"] == "none"


def test_a_layer_in_evaluation_mode_breaks_invariance():
    model = make()
    for i in (1, 4):
        model[i].eval()
    found = only(scale.invariance(run(sgd(), model=model)))
    assert found.verdict is NOTE
    assert "evaluation mode" in found.cause


def test_steps_that_inflate_the_weights_are_found():
    found = only(scale.effective_rate(run(sgd(300.0))))
    assert (found.verdict, found.step) == (WARNING, 2)
    assert found.evidence["norm_change"] > 10
    assert found.evidence["effective_last"] < 0.01 * found.evidence["effective_first"]
    assert "grow" not in found.cause
    assert "LinearLR" in found.remedy


def test_decay_that_shrinks_the_weights_is_found():
    def no_gradient(parameters):
        return torch.optim.AdamW(parameters, 1e-9, weight_decay=1e8)

    found = only(scale.effective_rate(run(no_gradient)))
    assert found.verdict is WARNING
    assert found.evidence["norm_change"] < 0.1
    assert "weight_decay" in found.remedy


def test_weights_that_turn_too_fast_are_found():
    found = only(scale.effective_rate(run(sgd(3.0, weight_decay=0.1), steps=200)))
    assert found.verdict is WARNING
    assert found.evidence["angle"] > 0.3
    assert "forgets its direction" in found.message


def test_balance_is_judged_once_decay_had_time():
    assert scale.equilibrium(run(sgd(0.05, weight_decay=1e-3))) == []
    assert scale.equilibrium(run(sgd())) == []
    found = only(scale.equilibrium(run(sgd(0.1, momentum=0.9, weight_decay=0.02), steps=400, every=4)))
    assert found.verdict in (OK, NOTE)
    assert found.evidence["expected_angle"] == pytest.approx(np.sqrt(2 * 0.1 * 0.02 / 1.9), rel=1e-6)
    assert found.evidence["constant"] == pytest.approx(1 / (4 * 0.02), rel=1e-6)


def test_a_rate_that_falls_leaves_balance_behind():
    model = make()
    optimizer = torch.optim.SGD(free(model), 0.1, momentum=0.9, weight_decay=0.02)
    rates = lambda step: 0.1 if step < 300 else 0.001  # noqa: E731
    record = train(model, optimizer, steps=400, every=4, rates=rates)[0]
    found = only(scale.equilibrium(record))
    assert found.verdict is NOTE
    assert found.evidence["balance"] < 0.8
    assert found.evidence["steps_to_balance"] > 100
    assert "^(1/4)" in found.remedy


def test_decay_of_adam_and_of_an_unknown_optimizer():
    found = only(scale.equilibrium(run(lambda p: torch.optim.Adam(p, 1e-3, weight_decay=0.1))))
    assert (found.verdict, "AdamW" in found.remedy) == (NOTE, True)
    found = only(scale.equilibrium(run(lambda p: Sign(p, 1e-3, 0.1))))
    assert (found.verdict, "Sign" in found.message) == (UNDECIDED, True)
    assert scale.decay(run(lambda p: Sign(p, 1e-3, 0.1))) == []


def test_decay_that_never_acted_comes_with_one_that_would():
    near, far = (only(scale.decay(run(sgd(0.1, momentum=0.9, weight_decay=d)))) for d in (1.7e-3, 1e-4))
    assert (near.verdict, far.verdict) == (NOTE, OK)  # a hundredfold decay is no advice for a run so short
    for found in (near, far):
        assert found.evidence["balance"] > 1.25
        assert found.evidence["decay_that_acts"] == pytest.approx(0.1 / (0.1 * 60), rel=1e-6)  # (1 - a) / (eta T)


def test_growth_without_decay_is_a_note_and_little_growth_none():
    found = only(scale.decay(run(sgd(2.0), steps=200, every=5)))
    assert (found.verdict, found.evidence["growth"] > 1.5) == (NOTE, True)
    assert only(scale.decay(run(sgd(0.01)))).verdict is OK


def gained(decay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    return run(sgd(0.1, weight_decay=decay), model=model)


def test_decay_on_gains_is_a_note():
    found = only(scale.gain_decay(gained(0.01)))
    assert (found.verdict, found.sites) == (NOTE, ("1/weight", "1/bias"))
    assert "Muon" in found.remedy
    assert only(scale.gain_decay(gained(0.0))).verdict is OK
    assert scale.gain_decay(run(sgd())) == []


def test_a_bias_without_effect_is_a_note():
    found = only(scale.bias_before_norm(gained(0.0)))
    assert (found.verdict, found.sites) == (NOTE, ("0/bias",))
    assert "bias=False" in found.remedy
    assert scale.bias_before_norm(run(sgd())) == []


@pytest.mark.parametrize(("share", "verdict"), [(0.3, OK), (0.7, WARNING)])
def test_gains_that_went_to_zero(share, verdict):
    record = gained(0.0)
    channels = []
    for item in record.channels:
        if (item.site, item.stat) == ("1/weight", "value"):
            last = np.where(np.arange(8) < share * 8, 1e-4, 1.0).astype(np.float32)
            item = dataclasses.replace(item, values=(*item.values[:-1], last))
        channels.append(item)
    found = only(scale.gain_collapse(dataclasses.replace(record, channels=tuple(channels))))
    assert found.verdict is verdict
    assert found.evidence["gone_fraction"] == pytest.approx(np.ceil(share * 8) / 8)


def test_gains_that_start_at_zero_have_not_collapsed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[1].weight.zero_()
    assert only(scale.gain_collapse(run(sgd(), model=model))).verdict is OK


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: dataclasses.replace(r, channels=()),
        lambda r: dataclasses.replace(r, blocks=()),
        lambda r: dataclasses.replace(r, sites=r.sites[["run", "site"]]),
        lambda r: dataclasses.replace(r, context=r.context[["run", "step"]]),
        lambda r: dataclasses.replace(
            r, blocks=tuple(dataclasses.replace(b, values=np.full_like(b.values, np.inf)) for b in r.blocks)
        ),
        lambda r: dataclasses.replace(
            r, blocks=tuple(dataclasses.replace(b, values=np.zeros_like(b.values)) for b in r.blocks)
        ),
    ],
    ids=["no arrays", "no blocks", "no attributes", "no context", "infinite", "zero"],
)
def test_no_record_makes_a_diagnostic_raise(edit):
    found = diagnose(edit(gained(0.01)))
    assert [f.message for f in found if "failed on this record" in f.message] == []
    assert [f.id for f in found if f.verdict in (FAILURE, WARNING) and f.id.startswith("scale")] == []
