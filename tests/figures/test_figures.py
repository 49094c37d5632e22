"""What the figures prepare."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from normscope.core.store import Store
from normscope.figures import FIGURES, figure_for
from normscope.figures.draw import draw
from normscope.figures.frames import logarithmic
from normscope.figures.palette import CURVES, REFERENCE, RULE
from normscope.metrics import propagation
from tests.report.records import Run, findings_of

ILLUSTRATED = [
    *(
        f"spikes.{kind}"
        for kind in ("overflow", "outside", "schedule", "attention", "second-moment", "data", "instability")
    ),
    "propagation.signal-exploding",
    "propagation.signal-vanishing",
    "propagation.gradient-exploding",
    "propagation.gradient-vanishing",
    "propagation.dead-units",
    "propagation.saturated-units",
    "propagation.non-finite",
    "propagation.outlier-channels",
    "propagation.massive-activations",
    "propagation.eps-dominates",
    "attention.logits-grow",
    "attention.entropy-collapse",
    "attention.output-logits",
    "conditioning.ill-conditioned-inputs",
    "conditioning.ill-conditioned-gradients",
    "conditioning.curvature-dominated",
    "conditioning.rank-collapse",
    "curvature.edge-of-stability",
    "curvature.outliers",
    "curvature.trace-dominated",
    "curvature.negative",
    "scale.invariance",
    "scale.effective-rate",
    "scale.equilibrium",
    "scale.decay",
    "scale.gain-decay",
    "scale.gain-collapse",
    "scale.bias-before-norm",
    "noise.small-batch",
    "noise.whitening-batch",
    "noise.batches-not-random",
    "noise.gradient-noise",
    "mismatch.running-statistics",
    "mismatch.train-eval-gap",
    "mismatch.never-updated",
    "mismatch.updated-twice",
    "mismatch.momentum",
    "mismatch.evaluation-mode",
    "mismatch.tiny-variance",
    "run.skipped-steps",
    "run.diverged",
]


@pytest.fixture(scope="module")
def record():
    return Run(24, 60).record()


def prepared(record, finding_id, *sites):
    figure = figure_for(finding_id)
    return figure.prepare(record, sites).rename(columns=dict(zip(figure.columns, "xyc", strict=False)))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.id)
def test_a_figure_prepares_the_columns_it_declares(figure, record):
    sites = next(
        (f.sites for f in findings_of(record) if f.id in figure.explains and f.sites), tuple(record.sites["site"])
    )
    frame = figure.prepare(record, sites)
    assert tuple(frame.columns) == figure.columns
    # no activation of this network is bounded, no token enters a norm, and its record has no attention, second moments,
    # curvature or spike: see test_conditioning, test_curvature and tests/diagnostics/test_attention
    elsewhere = ("attention.", "conditioning.", "curvature.", "spikes.")
    assert len(frame) or figure.id in ("propagation.saturation", "propagation.peaks") or figure.id.startswith(elsewhere)
    measured = frame[~frame[figure.columns[2]].isin(figure.rules)]
    assert measured[figure.columns[1]].dtype == float or not len(frame)
    assert measured[figure.columns[2]].nunique() - len(figure.references) <= 4
    assert set(figure.references) <= set(frame[figure.columns[2]]) or not len(frame)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.id)
def test_a_figure_of_what_was_not_recorded_has_no_rows(figure):
    frame = figure.prepare(Store(None, "empty", {}).record(), ("a/output", ""))
    assert tuple(frame.columns) == figure.columns
    assert len(frame) == 0


def test_every_finding_to_be_illustrated_has_one_figure():
    told = [finding for figure in FIGURES for finding in figure.explains]
    assert sorted(told) == sorted(ILLUSTRATED)
    assert len({figure.id for figure in FIGURES}) == len(FIGURES)
    assert figure_for("propagation.dead-units").id == "propagation.dead-channels"
    assert figure_for("no.such") is None


def test_signal_goes_over_depth_at_the_first_the_middle_and_the_last_finite_step(record):
    frame = prepared(record, "propagation.signal-exploding", "layer1.1.bn1/output")
    sites = propagation.comparable(record)
    values = pd.DataFrame({site: record.series(site, "rms") for site in sites})
    finite = values[np.isfinite(values).mean(axis=1) >= 0.5]
    expected = [finite.index[i] for i in (0, (len(finite) - 1) // 2, len(finite) - 1)]
    assert list(frame["c"].unique()) == [*(f"step {step}" for step in expected), "layer named in the finding"]
    for step in expected:
        shown = frame[frame["c"] == f"step {step}"]
        assert shown["site"].tolist() == sites
        assert shown["x"].tolist() == list(range(len(sites)))
        assert shown["y"].to_numpy() == pytest.approx(values.loc[step].to_numpy(), nan_ok=True)
    assert frame["x"].iloc[-1] == sites.index("layer1.1.bn1/output")
    assert math.isnan(frame["y"].iloc[-1])


def test_what_differs_between_inputs_is_a_standard_deviation(record):
    frame = prepared(record, "propagation.signal-vanishing")
    site = frame["site"].iloc[0]
    assert frame["y"].iloc[0] == pytest.approx(math.sqrt(record.series(site, "var").iloc[0]))


def test_dead_channels_are_those_of_the_worst_layers_in_the_order_given(record):
    sites = [f"layer1.{block}.relu1/output" for block in (5, 4, 3, 2, 1)]
    frame = prepared(record, "propagation.dead-units", "no/such", *sites)
    assert list(frame["c"].unique()) == sites[:4]
    expected = record.series(sites[0], "dead")
    first = frame[frame["c"] == sites[0]]
    assert first["x"].tolist() == expected.index.tolist()
    assert first["y"].to_numpy() == pytest.approx(expected.to_numpy())


def test_dead_gradients_are_shown_where_the_values_live():
    store = Store(None, "a", {})
    store.site("fc/output", {"order": 0})
    for step in range(3):
        store.scalars(step, "fc/output", "train", "value", ("dead",), np.array([0.1]))
        store.scalars(step, "fc/output", "train", "gradient", ("dead",), np.array([step / 2]))
    store.commit()
    frame = prepared(store.record(), "propagation.dead-units", "fc/output")
    assert frame["y"].tolist() == [0, 0.5, 1]
    assert frame["c"].unique().tolist() == ["fc/output, gradient"]


def test_saturation_is_shown_for_bounded_activations():
    store = Store(None, "a", {})
    store.site("tanh/output", {"order": 0, "activation": "bounded"})
    for step in range(3):
        store.scalars(step, "tanh/output", "train", "value", ("saturated",), np.array([step / 4]))
    store.commit()
    assert prepared(store.record(), "propagation.saturated-units", "tanh/output")["y"].tolist() == [0, 0.25, 0.5]


def test_the_onset_shows_the_layer_and_what_leads_to_it(record):
    frame = prepared(record, "propagation.non-finite", "layer1.4.conv1/output")
    order = [site for site in record.sites["site"] if site.endswith("/output")]
    broken = {site: record.series(site, "nonfinite") for site in order[:-1]}
    step = min(int(series[series > 0].index[0]) for series in broken.values() if (series > 0).any())
    site = next(site for site in order if broken[site].loc[step] > 0)
    here = order.index(site)
    assert list(frame["c"].unique()) == [*order[here - 3 : here + 1][::-1], "first NaN or infinity seen"]
    assert frame["x"].iloc[-1] == step
    shown = frame[frame["c"] == site].set_index("x")["y"]
    assert shown.loc[step - 10] == pytest.approx(record.series(site, "max").loc[step - 10])
    assert math.isnan(shown.loc[step])


def test_the_onset_of_a_gradient_is_led_to_from_behind():
    store = Store(None, "a", {})
    for order, name in enumerate("abc"):
        store.site(f"{name}/output", {"order": order})
        for step in range(3):
            bad = name == "a" and step == 2
            row = np.array([math.nan if bad else 10.0 + order, float(bad)])
            store.scalars(step, f"{name}/output", "train", "gradient", ("max", "nonfinite"), row)
    store.commit()
    frame = prepared(store.record(), "propagation.non-finite")
    assert list(frame["c"].unique()) == ["a/output", "b/output", "c/output", "first NaN or infinity seen"]


def test_outlier_channels_are_the_last_array(record):
    frame = prepared(record, "propagation.outlier-channels", "stem.conv/output")
    steps, values = record.array("stem.conv/output", "rms")
    measured = frame[frame["c"] == f"stem.conv/output at step {steps[-1]}"]
    assert measured["y"].to_numpy() == pytest.approx(values[-1])
    assert set(frame[frame["c"] == "median channel"]["y"]) == {np.median(values[-1])}


def test_eps_is_compared_with_half(record):
    frame = prepared(record, "propagation.eps-dominates", "stem.bn/output")
    expected = record.series("stem.bn/input", "eps_weight.q50")
    assert frame[frame["c"] == "stem.bn/input"]["y"].to_numpy() == pytest.approx(expected.to_numpy())
    assert frame[frame["c"] != "stem.bn/input"]["y"].tolist() == [0.5, 0.5]


def test_drift_is_compared_with_what_sampling_explains(record):
    frame = prepared(record, "mismatch.running-statistics", "layer1.1.bn1/running")
    expected = record.series("layer1.1.bn1/running", "drift.q50")
    assert frame[frame["c"] == "layer1.1.bn1/running"]["y"].to_numpy() == pytest.approx(expected.to_numpy())
    # 128 samples, momentum 0.1: twice 1 / n from the batch and the running average of momentum m, (m / (2 - m)) / n
    assert frame["y"].iloc[-1] == pytest.approx((1 + 0.1 / 1.9) / 128)


def test_losses_are_those_of_both_phases(record):
    frame = prepared(record, "mismatch.train-eval-gap", "")
    for phase, name in (("batch", "batch statistics"), ("population", "running statistics")):
        expected = record.series("/output", "loss", phase=phase)
        shown = frame[frame["c"] == name]
        assert shown["x"].tolist() == expected.index.tolist()
        assert shown["y"].to_numpy() == pytest.approx(expected.to_numpy())


def test_updates_are_counted_from_the_first_sampled_step(record):
    frame = prepared(record, "mismatch.updated-twice", "stem.bn/running", "stem.bn/output")
    assert list(frame["c"].unique()) == ["stem.bn/running", "one update a training forward pass"]
    ends = frame.groupby("c", sort=False)[["x", "y"]].last()
    assert ends["y"].tolist() == [2 * ends["x"].iloc[0], ends["x"].iloc[0]]


def test_the_running_variance_is_beside_that_of_the_batch(record):
    frame = prepared(record, "mismatch.momentum", "stem.bn/running")
    for site, name in (
        ("stem.bn/input", "of the batch, used in training"),
        ("stem.bn/running", "running, kept for inference"),
    ):
        expected = record.series(site, "var").to_numpy()
        assert frame[frame["c"] == name]["y"].to_numpy() == pytest.approx(expected, nan_ok=True)


def test_variances_are_sorted_and_compared_with_eps(record):
    frame = prepared(record, "mismatch.tiny-variance", "stem.bn/running")
    steps, values = record.array("stem.bn/running", "var")
    running = frame[frame["c"] == f"running, at step {steps[-1]}"]
    batch = frame[frame["c"] == "of the batch"]
    assert running["y"].tolist() == pytest.approx(sorted(values[-1]))
    assert [values[-1][channel] for channel in running["channel"]] == pytest.approx(running["y"].tolist())
    assert batch["y"].tolist() == pytest.approx(
        record.array("stem.bn/input", "var")[1][-1][running["channel"].astype(int)]
    )
    assert set(frame[frame["c"] == "eps"]["y"]) == {1e-5}


def test_skipped_steps_are_marked_and_lasting_nan_once(record):
    frame = prepared(record, "run.skipped-steps")
    steps = record.context.drop_duplicates("step").set_index("step")
    assert frame[frame["c"] == "skipped step"]["x"].tolist() == steps.index[steps["skipped"]].tolist()
    shown = frame[frame["c"] == "norm"].set_index("x")["y"]
    assert shown.loc[10] == pytest.approx(steps["grad_norm"].loc[10])
    assert math.isnan(shown.loc[2])
    begins = frame[frame["c"] == "NaN or infinity from here"]["x"].tolist()
    assert len(begins) == 1
    assert not np.isfinite(steps["grad_norm"].loc[begins[0] :]).any()


def losing(losses, norms):
    store = Store(None, "a", {})
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        row = {"step": step, "sampled": True, "batch_size": 8, "loss_scale": 1.0, "skipped": False}
        store.step({**row, "loss": loss, "grad_norm": norm})
    store.commit()
    return store.record()


def test_divergence_marks_where_loss_or_gradient_is_lost_for_good():
    inf = math.inf
    frame = prepared(losing([1, inf, 3, 4, inf, inf], [5, 6, inf, inf, inf, inf]), "run.diverged")
    assert frame["c"].unique().tolist() == ["loss", "gradient norm", "NaN or infinity from here"]
    assert frame[frame["c"] == "NaN or infinity from here"]["x"].tolist() == [2]
    assert frame[frame["c"] == "loss"]["y"].tolist() == pytest.approx([1, math.nan, 3, 4, *[math.nan] * 2], nan_ok=True)
    recovered = prepared(losing([1, inf, 3], [1, 2, 3]), "run.diverged")
    assert recovered["c"].unique().tolist() == ["loss", "gradient norm"]


@pytest.mark.parametrize(
    ("losses", "log"),
    [
        ([1.8, 5e22, math.inf], True),
        ([2, 0.002], False),
        ([2, 0.0019], True),
        ([1e4, 1, -1], False),
        ([0, 0, 1], False),
    ],
)
def test_a_loss_is_logarithmic_where_its_range_asks_for_it(losses, log):
    figure = next(figure for figure in FIGURES if figure.id == "run.loss")
    frame = figure.prepare(losing(losses, losses), ())
    assert logarithmic(figure, frame) is log
    assert draw(figure, frame).get_yscale() == ("log" if log else "linear")


def test_a_fraction_is_never_logarithmic():
    figure = figure_for("propagation.dead-units")
    frame = pd.DataFrame({"step": [0, 1], "dead": [1e-6, 1.0], "site": ["a", "a"]})
    assert logarithmic(figure, frame) is False


def test_groups_of_one_learning_rate_share_a_curve(record):
    figure = next(figure for figure in FIGURES if figure.id == "run.learning-rate")
    frame = figure.prepare(record, ())
    group = record.context[record.context["group"] == 1].set_index("step")["lr"]
    assert frame["group"].unique().tolist() == ["SGD, group 0"]
    assert frame["rate"].tolist() == pytest.approx(group.tolist())


def test_preparing_needs_neither_matplotlib_nor_torch():
    code = "import sys, normscope.figures; print(sorted({'matplotlib', 'torch', 'plotly'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def linear(color):
    parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def luminance(color):
    return float(linear(color) @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("color", [*CURVES, REFERENCE, RULE])
@pytest.mark.parametrize("ground", ["#ffffff", "#14171b"])
def test_colors_are_seen_on_light_and_on_dark(color, ground):
    low, high = sorted((luminance(color), luminance(ground)))
    assert (high + 0.05) / (low + 0.05) >= 3


# what color-blind readers see, linear RGB: Machado, Oliveira, Fernandes 2009, severity 1
SEEN = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(rgb):
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SEEN)
def test_curves_are_told_apart_by_color_blind_readers(sight):
    colors = [lab(np.array(SEEN[sight]) @ linear(color)) for color in CURVES]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colors, 2)) > 15
