import math

import numpy as np
import pytest

from normscope.core.finding import Verdict
from normscope.diagnostics import propagation
from tests.metrics.records import Network, at, over_depth

FAILURE, WARNING, UNDECIDED, NOTE, OK = Verdict
DEPTH = (
    propagation.signal_exploding,
    propagation.signal_vanishing,
    propagation.gradient_exploding,
    propagation.gradient_vanishing,
)


def only(found):
    """The one finding of a diagnostic."""
    assert len(found) == 1
    return found[0]


def plain(layers=12, **options):
    return Network(layers, norm=None, **options)


# ---- depth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("diagnose", "rate", "role", "site", "per_layer"),
    [
        (propagation.signal_exploding, 3.0, "value", "l11.linear/output", 3.0),
        (propagation.signal_vanishing, 0.3, "value", "l11.linear/output", 0.3),
        (propagation.gradient_exploding, 0.3, "gradient", "l0.linear/output", 1 / 0.3),
        (propagation.gradient_vanishing, 3.0, "gradient", "l0.linear/output", 1 / 3.0),
    ],
)
def test_a_rate_per_layer_fires_where_it_is_worst(diagnose, rate, role, site, per_layer):
    found = only(diagnose(plain().edit(over_depth(12, rate, role)).record()))
    assert (found.verdict, found.site, found.step) == (WARNING, site, 0)
    assert found.evidence["rate_per_layer"] == pytest.approx(per_layer, rel=1e-3)
    assert found.evidence["total"] == pytest.approx(max(rate, 1 / rate) ** 11, rel=1e-2)
    assert found.evidence["layers"] == 12
    assert "1000" in found.message
    others = [d for d in DEPTH if d is not diagnose]
    record = plain().edit(over_depth(12, rate, role)).record()
    assert {f.verdict for other in others for f in other(record)} == {OK}


def test_a_factor_beyond_float32_is_a_failure():
    found = only(propagation.gradient_vanishing(plain(30).edit(over_depth(30, 2.0, "gradient")).record()))
    assert found.verdict is FAILURE


def test_a_signal_that_stays_but_no_longer_depends_on_the_input_vanishes():
    def collapse(site, role, step, stats):
        if role == "value" and site.endswith("/output") and site[0] == "l":
            stats["var"] = 0.4 ** (2 * int(site[1:].partition(".")[0]))

    found = only(propagation.signal_vanishing(plain().edit(collapse).record()))
    assert (found.verdict, found.evidence["measure"]) == (WARNING, "std")
    assert "differs between inputs" in found.message


@pytest.mark.parametrize(
    ("diagnose", "verdict"), [(propagation.signal_vanishing, NOTE), (propagation.gradient_exploding, WARNING)]
)
def test_what_only_the_start_shows(diagnose, verdict):
    role = "gradient" if diagnose is propagation.gradient_exploding else "value"
    start = over_depth(12, 0.3, role)
    network = plain().edit(lambda site, kind, step, stats: start(site, kind, step, stats) if step == 0 else None)
    found = only(diagnose(network.record()))
    assert (found.verdict, found.step) == (verdict, 0)
    assert "at the start" in found.message


def test_what_begins_later_is_dated():
    late = over_depth(12, 3.0, "value")
    network = plain().edit(lambda site, kind, step, stats: late(site, kind, step, stats) if step >= 40 else None)
    assert only(propagation.signal_exploding(network.record())).step == 40


def test_batch_normalization_is_named_as_the_cause():
    found = only(propagation.gradient_exploding(Network(40).edit(over_depth(40, 0.8, "gradient")).record()))
    assert found.source == "yang2019"
    assert "shortcuts" in found.remedy


@pytest.mark.parametrize("rate", [1.15, 1.5])
def test_a_stream_that_grows_slowly_or_over_few_layers_is_healthy(rate):
    for diagnose in DEPTH:
        for role in ("value", "gradient"):
            assert (
                only(diagnose(plain(8 if rate == 1.5 else 24).edit(over_depth(24, rate, role)).record())).verdict is OK
            )


def test_layers_of_two_kinds_and_one_jump_are_healthy():
    def kinds(site, role, step, stats):
        if site[0] == "l" and int(site[1:].partition(".")[0]) % 2:
            stats["rms"] = 1e-5

    def jump(site, role, step, stats):
        if site[0] == "l" and int(site[1:].partition(".")[0]) >= 6:
            stats["rms"] = 1e-5

    for edit in (kinds, jump):
        assert {only(d(plain().edit(edit).record())).verdict for d in DEPTH} == {OK}


def test_a_normalization_layer_between_resets_the_scale():
    network = Network(12)

    def weights(site, role, step, stats):
        if site.endswith("linear/output"):
            stats["rms"] *= 10.0 ** int(site[1:].partition(".")[0])

    assert only(propagation.signal_exploding(network.edit(weights).record())).verdict is OK


def test_a_run_that_diverges_is_dated():
    def diverge(site, role, step, stats):
        if site == "l3.linear/output" and role == "value" and step >= 40:
            stats["rms"] = 10.0 ** ((step - 30) / 10)

    found = only(propagation.signal_exploding(plain().edit(diverge).record()))
    assert (found.verdict, found.site) == (WARNING, "l3.linear/output")
    assert found.evidence["growth"] == pytest.approx(1e5)
    assert 50 <= found.step <= 70


def test_a_head_that_starts_at_zero_may_grow():
    network = plain().edit(at("head/output", steps=[0, 10, 20], rms=0.0)).edit(at("head/output", steps=[90], rms=30.0))
    assert only(propagation.signal_exploding(network.record())).verdict is OK


def test_a_gradient_norm_that_grows_without_end():
    network = plain()
    network.contexts = {step: {"grad_norm": 1.2**step} for step in range(100)}
    found = only(propagation.gradient_exploding(network.record()))
    assert found.verdict is WARNING or found.verdict is FAILURE
    assert found.evidence["growth"] > 1e3
    network.contexts = {step: {"grad_norm": 1.02**step * (1e5 if step == 50 else 1)} for step in range(100)}
    assert only(propagation.gradient_exploding(network.record())).verdict is OK


def test_a_record_without_gradients_does_not_judge_them():
    network = plain().edit(lambda site, role, step, stats: stats.clear() if role == "gradient" else None)
    assert only(propagation.gradient_vanishing(network.record())).verdict is UNDECIDED
    assert only(propagation.signal_vanishing(network.record())).verdict is OK


def test_two_layers_are_no_depth():
    assert only(propagation.signal_exploding(plain(2).edit(over_depth(2, 100.0, "value")).record())).verdict is OK


# ---- units -----------------------------------------------------------------------------------------------------------


def silent(fraction, site="l2.act/output", role="value", since=0):
    network = Network()
    zero = np.arange(16) < 16 * fraction
    network.arrays[site, role, "rms"] = lambda step: np.where(zero & (step >= since), 0.0, 1e-3)
    return network.edit(at(site, role=role, steps=range(since, 100), dead=fraction))


@pytest.mark.parametrize(("fraction", "verdict"), [(0.25, OK), (0.5, OK), (0.75, WARNING), (1.0, FAILURE)])
def test_dead_units(fraction, verdict):
    found = only(propagation.dead_units(silent(fraction, since=30).record()))
    assert found.verdict is verdict
    assert found.evidence["dead_fraction"] == pytest.approx(fraction)
    if verdict is not OK:
        assert (found.site, found.step) == ("l2.act/output", 30)


def test_dead_units_behind_a_functional_relu():
    network = Network(activation=None, norm=None)
    network.arrays["l2.linear/output", "gradient", "rms"] = lambda step: np.where(np.arange(16) < 12, 0.0, 1e-3)
    found = only(propagation.dead_units(network.record()))
    assert (found.verdict, found.site, found.evidence["role"]) == (WARNING, "l2.linear/output", "gradient")


def test_a_dead_layer_cuts_the_gradient():
    network = Network(activation=None, norm=None)
    for i in range(3):
        network.edit(at(f"l{i}.linear/output", role="gradient", rms=0.0))
    found = only(propagation.dead_units(network.record()))
    assert (found.verdict, found.site) == (FAILURE, "l2.linear/output")
    assert propagation.gradient_vanishing(network.record()) != []


def test_few_values_do_not_kill():
    found = only(propagation.dead_units(silent(0.75).edit(at("l2.act/output", count=4.0)).record()))
    assert found.verdict is UNDECIDED


def test_without_relu_or_gradients_nothing_can_die():
    assert propagation.dead_units(Network(activation="Tanh").record()) == []


@pytest.mark.parametrize(
    ("saturated", "sites", "verdict"),
    [(0.6, 1, OK), (0.6, 4, WARNING), (0.92, 1, WARNING), (0.97, 2, FAILURE), (0.4, 6, OK)],
)
def test_saturated_units(saturated, sites, verdict):
    network = Network(activation="Tanh", norm=None)
    for i in range(sites):
        network.edit(at(f"l{i}.act/output", steps=range(20, 100), saturated=saturated))
    found = only(propagation.saturated_units(network.record()))
    assert found.verdict is verdict
    if verdict is not OK:
        assert (found.site, found.step, len(found.sites)) == ("l0.act/output", 20, sites)


def test_no_bounded_activation_no_saturation():
    assert propagation.saturated_units(Network().record()) == []


# ---- not finite ------------------------------------------------------------------------------------------------------


def broken(step, every=1, site=None, role="value"):
    network = Network(steps=range(0, 100, every))
    network.contexts = {s: {"grad_norm": math.inf} for s in range(step, 100)}
    for later in range(step, 100):
        network.edit(at("/output", role=role, steps=[later] if later > step else [], nonfinite=16.0))
    return network if site is None else network.edit(at(site, role=role, steps=[step], nonfinite=4.0))


@pytest.mark.parametrize("role", ["value", "gradient"])
def test_the_step_and_the_site_of_a_nan(role):
    found = only(propagation.non_finite(broken(37, site="l3.linear/output", role=role).record()))
    assert (found.verdict, found.site, found.step) == (FAILURE, "l3.linear/output", 37)
    assert found.evidence["channels"] == 4
    assert "Step 37" in found.message


@pytest.mark.parametrize(
    ("site", "told"), [("l0.linear/output", "batch of this step"), ("l3.linear/output", "overflow")]
)
def test_what_breaks_in_the_first_layer_came_with_the_batch(site, told):
    found = only(propagation.non_finite(broken(37, site=site, role="value").record()))
    assert told in found.cause


def test_a_nan_between_samples_has_a_step_and_a_bracket():
    found = only(propagation.non_finite(broken(37, every=10).record()))
    assert (found.verdict, found.site, found.step) == (UNDECIDED, "", 37)
    assert (found.evidence["sampled_before"], found.evidence["sampled_after"]) == (30, 40)
    assert "before step 37" in found.remedy


def test_without_a_gradient_norm_the_samples_decide():
    known = broken(37, site="l3.linear/output")
    between = broken(37, every=10)
    for network in (known, between):
        network.contexts = {step: {"grad_norm": None} for step in range(100)}
    found = only(propagation.non_finite(known.record()))
    assert (found.verdict, found.site, found.step) == (FAILURE, "l3.linear/output", 37)
    found = only(propagation.non_finite(between.record()))
    assert (found.verdict, found.step, found.evidence["sampled_before"]) == (UNDECIDED, 40, 30)


def test_steps_that_a_scaler_skips_are_its_work():
    network = Network()
    network.contexts = {s: {"grad_norm": None, "skipped": True, "loss_scale": 2.0**15} for s in (0, 1, 2, 60)}
    assert only(propagation.non_finite(network.record())).verdict is OK


def test_a_scaler_that_skips_for_ever_hides_a_nan():
    network = Network(steps=range(100))
    network.contexts = {s: {"grad_norm": None, "skipped": True, "loss_scale": 1.0} for s in range(40, 100)}
    network.edit(at("l3.linear/output", role="gradient", steps=range(40, 100), nonfinite=2.0))
    found = only(propagation.non_finite(network.record()))
    assert (found.verdict, found.site, found.step) == (FAILURE, "l3.linear/output", 40)


def test_an_overflow_in_the_forward_pass_is_no_matter_of_the_scale():
    network = Network().edit(at("l3.linear/output", steps=[40], nonfinite=2.0))
    network.contexts = {40: {"grad_norm": None, "skipped": True, "loss_scale": 1.0}}
    found = only(propagation.non_finite(network.record()))
    assert (found.verdict, found.site, found.step) == (WARNING, "l3.linear/output", 40)


def test_a_mask_is_a_note():
    found = only(propagation.non_finite(Network().edit(at("l3.linear/output", nonfinite=2.0)).record()))
    assert (found.verdict, found.site) == (NOTE, "l3.linear/output")


def test_after_a_nan_other_diagnostics_judge_what_was_before():
    network = broken(37, every=10)
    nan = dict.fromkeys(("rms", "var", "mean"), math.nan)
    record = network.edit(at("/output", steps=range(40, 100), **nan)).record()
    assert {only(d(record)).verdict for d in DEPTH} == {OK}


def test_where_only_the_layer_is_unknown_training_broke_all_the_same():
    message = only(propagation.non_finite(broken(37, every=10).record())).message
    assert "Training broke at step 37" in message
    assert "only the layer" in message


# ---- outliers and eps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{"rms.max": 500.0}, {"max.max": 3000.0}])
def test_massive_activations_are_a_note(values):
    found = only(propagation.outlier_channels(plain().edit(at("l5.linear/output", **values)).record()))
    assert (found.verdict, found.site) == (NOTE, "l5.linear/output")
    assert only(propagation.outlier_channels(plain().record())).verdict is OK


@pytest.mark.parametrize(("weight", "verdict"), [(1e-4, OK), (0.2, NOTE), (0.8, WARNING)])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_eps_dominates(weight, verdict, norm):
    edit = at("l2.norm/input", steps=range(20, 100), **{"eps_weight.q50": weight})
    found = only(propagation.eps_dominates(Network(norm=norm).edit(edit).record()))
    assert found.verdict is verdict
    if verdict is not OK:
        assert (found.site, found.step) == ("l2.norm/input", 20)


def test_a_branch_that_starts_at_zero_may_have_no_variance_then():
    edit = at("l2.norm/input", steps=[0], **{"eps_weight.q50": 1.0})
    assert only(propagation.eps_dominates(Network().edit(edit).record())).verdict is OK


# ---- wording ---------------------------------------------------------------------------------------------------------


def test_healthy_depth_is_said_with_its_direction():
    record = plain().edit(over_depth(12, 0.3, "gradient")).record()
    message = only(propagation.gradient_vanishing(record)).message
    assert message == (
        "Towards the input the gradient does not shrink over 12 layers of one kind: it grows 5.6e5-fold, see "
        "propagation.gradient-exploding."
    )
    level = [only(d(plain().record())).message for d in DEPTH]
    assert all("does not" in message and "1-fold" not in message for message in level)
    message = only(propagation.signal_exploding(plain().edit(over_depth(12, 1.1, "value")).record())).message
    assert message == "Towards the output the signal grows 2.9-fold over 12 layers of one kind (threshold 1000)."


def test_a_model_of_zeros_that_begins_to_learn_does_not_explode():
    def learn(site, role, step, stats):
        if role == "value" and "rms" in stats:
            stats |= {"rms": 0.0 if step < 30 else 0.011, "var": 0.0}

    found = propagation.signal_exploding(plain().edit(learn).record())
    assert [f.verdict for f in found] == [OK]
    assert not any("grown" in f.message for f in found)


@pytest.mark.parametrize("steps", [range(0, 50, 10), range(0, 20, 10)])
def test_one_finite_late_sample_shows_that_a_layer_explodes(steps):
    network = plain(steps=steps).edit(at("/output", rms=0.06))
    network.edit(at("l3.linear/output", steps=[steps[-1]], rms=2.5e9))
    network.contexts = {s: {"grad_norm": math.inf} for s in range(steps[-1] + 1, steps[-1] + 3)}
    if len(steps) > 2:
        for role in ("value", "gradient"):
            network.steps = [*steps, 50, 60]
            network.edit(at("/output", role=role, steps=[50, 60], rms=math.nan, nonfinite=16.0))
    found = only(propagation.signal_exploding(network.record()))
    assert (found.verdict, found.site) == (FAILURE, "l3.linear/output")
    assert found.evidence["growth"] == pytest.approx(2.5e9 / 0.06, rel=1e-3)


def test_attention_is_named_in_transformers_alone():
    edit = at("l5.linear/output", **{"rms.max": 500.0})
    plainly = only(propagation.outlier_channels(Network(norm="layer").edit(edit).record()))
    assert "attention" not in plainly.cause
    network = Network(norm="layer").edit(edit)
    network.extra_sites["wte/output"] = {"class": "Embedding"}
    assert "attention" in only(propagation.outlier_channels(network.record())).cause
    network.contexts = {s: {"grad_norm": math.inf} for s in (89, 90)}
    assert propagation.outlier_channels(network.record()) == []


def test_dead_units_are_named_by_the_layer_before_the_relu():
    found = only(propagation.dead_units(silent(1.0).record()))
    assert "every unit after l2.norm is zero" in found.message
    assert "l2.norm.bias" in found.remedy
    assert "normalization layer" not in found.remedy


def test_a_cut_behind_a_normalization_layer_is_named_by_it():
    network = Network(activation=None).edit(at("l2.norm/output", **{"mean.max": -2.0}))
    for site in ("l0.linear", "l0.norm", "l1.linear", "l1.norm", "l2.linear", "l2.norm"):
        network.edit(at(f"{site}/output", role="gradient", rms=0.0))
    found = only(propagation.dead_units(network.record()))
    assert "every unit after l2.norm is zero" in found.message
    assert "l2.norm.bias" in found.remedy


def test_eps_behind_dead_units_is_a_consequence():
    network = silent(1.0).edit(at("l3.norm/input", **{"eps_weight.q50": 1.0}))
    found = only(propagation.eps_dominates(network.record()))
    assert "consequence of propagation.dead-units at l2.act/output" in found.message
    network = silent(1.0).edit(at("l1.norm/input", **{"eps_weight.q50": 1.0}))
    assert "consequence" not in only(propagation.eps_dominates(network.record())).message


def test_a_cut_is_named_by_the_first_dead_relu():
    network = Network()
    for i in range(4):
        for part in ("linear", "norm", "act") if i < 3 else ("linear", "norm"):
            network.edit(at(f"l{i}.{part}/output", role="gradient", rms=0.0))
    network.edit(at("l1.act/output", dead=1.0)).edit(at("l3.act/output", dead=1.0))
    network.edit(at("l3.norm/input", **{"eps_weight.q50": 1.0}))
    found = only(propagation.dead_units(network.record()))
    assert (found.verdict, found.site, len(found.sites)) == (FAILURE, "l1.norm/output", 11)
    assert "every unit after l1.norm is zero" in found.message
    assert "at l1.norm/output" in only(propagation.eps_dominates(network.record())).message
