"""Paired differences, their limits and divergences against closed forms, scipy and simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from normscope.core.estimate import Estimate, Status
from normscope.metrics import gap
from normscope.metrics.gap import Measured, Measurements


def drawn(n=200, seed=0, shift=0.0):
    values = np.random.default_rng(seed).normal(shift, 1, n)
    return Measured(values.mean(), values)


def measurements(rows, alone=None, sign=1.0, data="target", **options):
    """Measurements of a model with norms a, b, ... as many as there are alone; all channels as sampling explains."""
    alone = alone or {}
    known = {
        "class": "BatchNorm2d",
        "channels": 8,
        "momentum": 0.1,
        "updates": 1000.0,
        "initial": False,
        "broken": 0,
        "kl": 0.001,
        "kl_max": 0.002,
        "kl_expected": 0.001,
        "beyond": 0.0,
        "kl_train": 0.001,
    }
    norms = pd.DataFrame([known] * len(alone), index=pd.Index(list(alone), name="norm"))
    made = {"missing": {}, "over": "samples", "batches": 4, "samples": 100, "model": "Net", "metric": "accuracy"}
    return Measurements(**(made | options), sign=sign, data=data, rows=rows, alone=alone, norms=norms)


def test_a_difference_is_paired():
    before, after = drawn(), drawn(seed=1, shift=0.3)
    change = gap.change(before, after)
    reference = stats.ttest_rel(after.parts, before.parts)
    assert change.value / change.standard_error == pytest.approx(reference.statistic, rel=1e-12)
    assert gap.level(before).standard_error == pytest.approx(stats.sem(before.parts), rel=1e-12)
    assert gap.change(before, after, -1.0).value == -change.value


@pytest.mark.parametrize("k", [1, 7])
def test_the_limit_is_that_of_student_and_bonferroni(k):
    change = gap.change(drawn(12), drawn(12, seed=3))
    reached = stats.ttest_1samp(drawn(12, seed=3).parts - drawn(12).parts, 0.0)
    assert gap.limit(change, k) == pytest.approx(stats.t.isf(0.005 / k, 11) * change.standard_error, rel=1e-10)
    beyond = abs(change.value) > gap.limit(change, k)
    assert beyond == (reached.pvalue < 0.01 / k)


def test_chance_exceeds_the_limit_as_often_as_it_says():
    generator = np.random.default_rng(0)
    beyond = 0
    for _ in range(1000):
        parts = generator.normal(size=(5, 10))  # five comparisons of ten parts, no difference in any
        changes = [Estimate(row.mean(), stats.sem(row), n=10) for row in parts]
        beyond += any(abs(c.value) > gap.limit(c, 5) for c in changes)
    assert beyond / 1000 == pytest.approx(0.01, abs=3 * math.sqrt(0.01 * 0.99 / 1000))


@pytest.mark.parametrize(
    ("values", "status"),
    [([1.0], Status.FEW_SAMPLES), ([1.0, math.nan], Status.NON_FINITE), ([1.0, 0.0], Status.SAMPLED)],
)
def test_what_has_no_standard_error_is_not_judged(values, status):
    estimate = gap.level(Measured(float(np.mean(values)), np.array(values)))
    assert estimate.status is status
    assert math.isnan(gap.limit(estimate)) == (status is not Status.SAMPLED)


@pytest.mark.parametrize(("samples", "batch", "momentum"), [(256, 64, 0.1), (256, 32, 0.5)])
def test_the_expected_divergence_is_that_of_a_simulation(samples, batch, momentum):
    generator = np.random.default_rng(0)
    channels = 1500
    mean, var = np.zeros(channels), np.ones(channels)
    for _ in range(round(6 / momentum)):
        x = generator.normal(size=(batch, channels))
        mean += momentum * (x.mean(0) - mean)
        var += momentum * (x.var(0, ddof=1) - var)
    x = generator.normal(size=(samples, channels))
    divergence = 0.5 * (np.log(var / x.var(0)) + (x.var(0) + (x.mean(0) - mean) ** 2) / var - 1)
    error = divergence.std() / math.sqrt(channels)
    assert gap.expected_divergence(samples, batch, momentum) == pytest.approx(divergence.mean(), abs=4 * error, rel=0.1)


def test_a_summary_counts_channels_beyond_what_sampling_explains():
    found = gap.summary(np.array([0.001, 0.09, 0.2, 3.0, np.nan]), 0.01)
    assert found == {"kl": pytest.approx(0.145), "kl_max": 3.0, "kl_expected": 0.01, "beyond": 0.5}
    assert gap.summary(np.array([0.2]), 0.05)["beyond"] == 0.0  # less than five times what sampling explains
    assert math.isnan(gap.summary(np.empty(0), 0.01)["kl"])


def test_tables_order_rows_and_norms():
    rows = {gap.RUNNING: drawn(), gap.BATCH: drawn(seed=1, shift=0.5), gap.TARGET: drawn(seed=2, shift=-0.5)}
    m = measurements(
        rows, {"a": drawn(seed=4, shift=0.1), "b": drawn(seed=5, shift=1.0)}, missing={gap.TRAINING: "why"}
    )
    table = gap.table(m).set_index("statistics")
    assert list(table.index) == [gap.RUNNING, gap.BATCH, gap.TRAINING, gap.TARGET]
    assert table.loc[gap.BATCH, "recovered"] == pytest.approx(rows[gap.BATCH].value - rows[gap.RUNNING].value)
    assert table.loc[gap.TRAINING, "caveat"] == "not measured: why"
    assert "leakage" in table.loc[gap.TARGET, "caveat"]
    assert not table.loc[gap.RUNNING, "caveat"]
    ranking = gap.ranking(m)
    assert list(ranking["norm"]) == ["b", "a"]
    assert ranking["chance"].tolist() == pytest.approx([gap.limit(change, 2) for change in m.gains().values()])


def test_training_statistics_leak_where_training_data_are_measured():
    assert "leakage" in gap.caveat(gap.TRAINING, "training")
    assert gap.caveat(gap.TRAINING, "target") == ""
