import math

import numpy as np
import pandas as pd
import pytest

from normscope.core.estimate import Status
from normscope.metrics import propagation
from tests.metrics.records import Network, at, over_depth


def slopes(y):
    """All slopes between pairs, the definition of Theil and Sen."""
    return [(y[j] - y[i]) / (j - i) for i in range(len(y)) for j in range(i + 1, len(y))]


def test_the_rate_is_the_median_of_all_pairs():
    y = np.random.default_rng(0).normal(size=9).cumsum()
    depth = propagation.depth(pd.DataFrame([np.exp(y)], columns=list("abcdefghi")))
    assert depth.rate.value == pytest.approx(np.median(slopes(y)))
    assert depth.rate.n == 9
    assert (depth.first, depth.last) == ("a", "i")


def test_the_interval_of_the_rate_holds_the_truth_19_times_in_20():
    random = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        y = 0.1 * np.arange(20) + random.normal(scale=0.3, size=20)
        rate = propagation.depth(pd.DataFrame([np.exp(y)])).rate
        held += abs(rate.value - 0.1) < 1.96 * rate.standard_error
    assert 0.92 < held / 400 < 0.98


def test_the_total_is_what_both_rate_and_ends_show():
    steady = propagation.depth(pd.DataFrame([2.0 ** np.arange(11)]))
    assert math.exp(steady.total) == pytest.approx(2**10)
    assert math.exp(steady.sustained) == pytest.approx(2**9)
    jump = propagation.depth(pd.DataFrame([[1.0] * 5 + [1e6] * 5]))
    assert jump.sustained == pytest.approx(0, abs=1e-9)
    head = propagation.depth(pd.DataFrame([[1.0] * 9 + [1e6]]))
    assert head.total == pytest.approx(0, abs=1e-9)


def test_layers_that_alternate_have_no_rate():
    rate = propagation.depth(pd.DataFrame([[1.0, 100.0] * 8])).rate
    assert abs(rate.value) <= 1.96 * rate.standard_error


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_layers_that_are_missing_do_not_change_the_rate(missing):
    y = 3.0 ** np.arange(8)
    y[1 : 1 + missing] = np.nan
    assert math.exp(propagation.depth(pd.DataFrame([y])).rate.value) == pytest.approx(3)


def test_too_few_layers_have_no_rate():
    assert propagation.depth(pd.DataFrame([[1.0, 2.0]])).rate.status is Status.FEW_SAMPLES
    assert propagation.depth(pd.DataFrame([[1.0] * 3 + [np.nan] * 5])).rate.status is Status.FEW_SAMPLES
    assert propagation.depth(pd.DataFrame()).rate.status is Status.NOT_RECORDED


def test_the_head_is_not_compared_and_a_norm_stands_for_the_layer_before_it():
    assert propagation.comparable(Network(layers=4, norm=None).record()) == [f"l{i}.linear/output" for i in range(4)]
    assert propagation.comparable(Network(layers=4).record()) == [f"l{i}.norm/output" for i in range(4)]


def test_activations_are_compared_where_no_weighted_layers_are():
    network = Network(layers=4, norm=None)
    blocks = {site: a | {"class": a["class"].replace("Linear", "Mixer")} for site, a in network.blocks().items()}
    network.blocks = lambda: blocks
    assert propagation.comparable(network.record()) == [f"l{i}.act/output" for i in range(4)]


def test_measures_of_magnitude():
    record = Network(norm=None).edit(over_depth(6, 2.0, "gradient")).record()
    norm = propagation.magnitudes(record, role="gradient", measure="norm")
    assert norm["l3.linear/output"].iloc[0] == pytest.approx(8e-3 * (64 * 16) ** 0.5, rel=1e-5)
    record = Network(norm=None).edit(at("l2.linear/output", var=0.25)).record()
    assert propagation.magnitudes(record, measure="std")["l2.linear/output"].iloc[0] == pytest.approx(0.5)


def test_a_branch_that_starts_at_zero_is_left_out():
    record = Network(norm=None).edit(at("l2.linear/output", rms=0.0)).record()
    magnitude = propagation.magnitudes(record)
    assert magnitude["l2.linear/output"].isna().all()
    assert propagation.depth(magnitude).rate.value == pytest.approx(0)


def test_from_zero_there_is_no_growth():
    network = Network(6, norm=None).edit(at("/output", steps=(0, 10, 20), rms=0.0)).edit(at("head/output", rms=0.0))
    growth = propagation.growth(network.edit(at("l0.linear/output", rms=0.5)).record()).set_index("site")
    assert growth["value"]["l0.linear/output"] == pytest.approx(1.0)
    assert growth["value"].drop("l0.linear/output").isna().all()


def test_growth_is_that_of_the_layer_and_a_layer_that_starts_at_zero_is_compared_with_others():
    network = Network(norm=None).edit(at("l2.linear/output", steps=(70, 80, 90), rms=50.0))
    network.edit(at("head/output", steps=(0, 10, 20), rms=0.0))
    growth = propagation.growth(network.record()).set_index("site")["value"]
    assert growth["l2.linear/output"] == pytest.approx(50)
    assert growth["head/output"] == pytest.approx(1)


def dead(pattern, count=64.0):
    network = Network(layers=2).edit(at("l0.act/output", count=count))
    network.arrays["l0.act/output", "value", "rms"] = pattern
    frame = propagation.dead_fraction(network.record(), 250).set_index("site")
    return frame.loc["l0.act/output"]


def test_units_that_are_silent_to_the_end_are_dead():
    half = dead(lambda step: np.where(np.arange(16) < 8, 0.0, 1.0))
    assert half["value"] == pytest.approx(0.5)
    assert half["n"] == 640
    assert half["standard_error"] == 0


def test_units_that_fired_lately_are_not():
    assert dead(lambda step: np.where((np.arange(16) < 8) & (step != 70), 0.0, 1.0))["value"] == 0
    assert dead(lambda step: np.where((np.arange(16) < 8) & (step != 30), 0.0, 1.0))["value"] == 0.5
    assert dead(lambda step: np.where((np.arange(16) < 8) & (step != 70), 0.0, 1.0), count=1e4)["value"] == 0


def test_without_arrays_the_smallest_late_fraction_counts():
    record = Network(layers=2).edit(lambda site, role, step, s: s.update(dead=0.6 if step < 90 else 0.2)).record()
    frame = propagation.dead_fraction(record, 250).set_index("site")
    assert frame.loc["l1.act/output", "value"] == pytest.approx(0.2)


def test_a_channel_without_gradient_at_every_step_is_unused():
    network = Network(layers=3, norm=None, activation=None)
    network.arrays["l1.linear/output", "gradient", "rms"] = lambda step: np.where(np.arange(16) < 4, 0.0, 1e-3)
    network.arrays["l0.linear/output", "gradient", "rms"] = lambda step: np.full(16, 0.0 if step == 0 else 1e-3)
    network.arrays["head/output", "gradient", "rms"] = lambda step: np.where(np.arange(16) < 12, 0.0, 1e-3)
    frame = propagation.unused_fraction(network.record()).set_index("site")["value"]
    assert frame.to_dict() == {"l0.linear/output": 0.0, "l1.linear/output": 0.25}


def test_gradients_that_underflow_are_no_sign_of_death():
    network = Network(layers=3, norm=None, activation=None)
    network.arrays["l1.linear/output", "gradient", "rms"] = lambda step: np.where(np.arange(16) < 12, 0.0, 1e-22)
    assert not len(propagation.unused_fraction(network.record()))


def test_a_cut_needs_every_site_before_it():
    network = Network(layers=4, norm=None, activation=None)
    for i in (0, 1):
        network.edit(at(f"l{i}.linear/output", role="gradient", rms=0.0))
    assert propagation.cut_off(network.record()) == ["l1.linear/output", "l0.linear/output"]
    branch = Network(layers=4, norm=None, activation=None).edit(at("l1.linear/output", role="gradient", rms=0.0))
    assert propagation.cut_off(branch.record()) == []
    faded = Network(layers=4, norm=None, activation=None).edit(at("l0.linear/output", role="gradient", rms=0.0))
    faded.edit(at("l1.linear/output", role="gradient", rms=1e-20))
    assert propagation.cut_off(faded.record()) == []


def test_an_output_activation_may_saturate():
    network = Network(layers=3, activation="Tanh", norm=None)
    network.extra_sites["out/output"] = {"class": "Sigmoid", "activation": "bounded"}
    network.extra["out/output", "train", "value"] = lambda step: {"saturated": 1.0}
    sites = propagation.saturation(network.record())["site"].tolist()
    assert sites == [f"l{i}.act/output" for i in range(3)]


def test_steps_that_are_not_finite():
    network = Network()
    network.contexts = {s: {"grad_norm": math.inf} for s in (40, 41)} | {
        s: {"grad_norm": None, "skipped": True, "loss_scale": 2.0} for s in (10, 42)
    }
    frame = propagation.nonfinite_steps(network.record())
    assert frame["streak"].to_dict() == {10: 1, 40: 1, 41: 2, 42: 3}


@pytest.mark.parametrize(
    ("edits", "site", "role"),
    [
        ([("l3.linear/output", "value"), ("l4.linear/output", "value")], "l3.linear/output", "value"),
        ([("l3.linear/output", "gradient"), ("l4.linear/output", "gradient")], "l4.linear/output", "gradient"),
        ([("l3.linear/output", "gradient"), ("l5.act/output", "value")], "l5.act/output", "value"),
    ],
)
def test_the_site_is_the_first_forward_or_the_last_backward(edits, site, role):
    network = Network()
    for place, kind in edits:
        network.edit(at(place, role=kind, steps=[40], nonfinite=3.0))
    found = propagation.nonfinite_sites(network.record())
    assert found[["step", "site", "role", "channels"]].to_numpy().tolist() == [[40, site, role, 3]]


def test_a_weight_gradient_that_overflows_alone_is_found():
    network = Network(norm=None)
    for name in ("l1.linear/weight", "l2.linear/weight"):
        network.extra_sites[name] = {"class": "Parameter", "shape": [16, 16]}
        overflows = name.startswith("l1")
        network.extra[name, "train", "gradient"] = lambda step, b=overflows: {
            "norm": math.inf if b and step == 40 else 1.0
        }
    found = propagation.nonfinite_sites(network.record())
    assert found[["step", "site", "role"]].to_numpy().tolist() == [[40, "l1.linear/weight", "weight"]]


def test_a_mask_does_not_take_the_blame():
    network = Network().edit(at("l0.linear/output", nonfinite=8.0)).edit(at("l4.act/output", steps=[40], nonfinite=1.0))
    network.contexts[40] = {"grad_norm": math.inf}
    found = propagation.nonfinite_sites(network.record()).set_index("step")
    assert found.loc[40, "site"] == "l4.act/output"
    assert found.loc[10, "site"] == "l0.linear/output"


def test_outliers_are_ratios_over_channels_of_what_is_no_relu():
    edit = at("l2.linear/output", **{"rms.max": 30.0, "rms.q50": 0.5, "max.max": 100.0, "kurtosis.max": 40.0})
    network = Network(norm=None).edit(edit).edit(at("l3.act/output", **{"rms.max": 1e6}))
    frame = propagation.outliers(network.record()).set_index("site")
    assert frame.loc["l2.linear/output", ["value", "kurtosis", "peak"]].tolist() == [60.0, 40.0, 200.0]
    assert "l3.act/output" not in frame.index


def test_the_weight_of_eps_is_that_of_the_median_channel():
    record = Network().edit(at("l2.norm/input", **{"eps_weight.q50": 0.7, "eps_weight.max": 1.0})).record()
    frame = propagation.eps_weight(record).set_index("site")
    assert frame.loc["l2.norm/input", "value"] == pytest.approx(0.7)
    assert frame.loc["l1.norm/input", "value"] == pytest.approx(1e-5)
