"""Paired statistics against scipy's own tests and numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from normscope.metrics.paired import Interval, leader, paired, sensitivity, student

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_is_that_of_scipy(n, level):
    values = RNG.normal(3.0, 2.0, n)
    expected = stats.t.interval(level, n - 1, loc=values.mean(), scale=stats.sem(values))
    found = student(values, level)
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)
    assert (found.mean, found.deviation, found.n) == pytest.approx((values.mean(), values.std(ddof=1), n))


def test_the_interval_by_hand():
    # t of 2 degrees of freedom at 97.5 % is 4.302653, s = 1
    assert student([1.0, 2.0, 3.0]).high == pytest.approx(2 + 4.302652729911275 / 3**0.5, rel=1e-9)


def test_a_paired_interval_excludes_zero_exactly_where_the_paired_test_of_scipy_rejects():
    rejected = 0
    for _ in range(60):
        shared = RNG.normal(0, 3, 4)
        one, other = (pd.Series(shared + RNG.normal(shift, 0.5, 4)) for shift in (0.0, 0.6))
        found = paired(one, other)
        p = stats.ttest_rel(one, other).pvalue
        assert found.separated == (p < 0.05)
        rejected += p < 0.05
    assert 5 < rejected < 55


def test_pairing_sees_what_the_spread_over_seeds_hides():
    noise = np.array([0.0, 5.0, -5.0])
    one, other = pd.Series(noise + np.array([1.0, 1.1, 0.9])), pd.Series(noise)
    assert paired(one, other).separated
    assert student(one).low < student(other).high


def test_seeds_that_one_of_both_lacks_are_left_out():
    one, other = pd.Series([1.0, 2.0, 9.0], index=[0, 1, 7]), pd.Series([0.0, 1.0, np.nan], index=[0, 1, 7])
    assert paired(one, other) == Interval(1.0, 1.0, 1.0, 0.0, 2)


def test_below_two_values_there_is_no_interval():
    assert student([2.0]).mean == 2.0
    assert not student([2.0]).separated
    assert np.isnan(student([2.0]).low)
    assert student([]).n == 0
    assert student([1.0, np.inf]).mean == np.inf
    assert np.isnan(student([1.0, np.inf]).high)


CASES = {
    "separated": ({"a": [0.90, 0.91, 0.92], "b": [0.80, 0.81, 0.82]}, True, "a"),
    "less is better": ({"a": [0.90, 0.91, 0.92], "b": [0.80, 0.81, 0.82]}, False, "b"),
    "overlapping differences": ({"a": [0.90, 0.70, 0.92], "b": [0.80, 0.81, 0.82]}, True, None),
    "better than one, not than the other": ({"a": [3.0, 3.1], "b": [1.0, 1.1], "c": [2.0, 3.5]}, True, None),
    "equal": ({"a": [1.0, 1.0], "b": [1.0, 1.0]}, True, None),
    "exact": ({"a": [2.0, 2.0], "b": [1.0, 1.0]}, False, "b"),
    "one seed": ({"a": [2.0], "b": [1.0]}, True, None),
    "one entry": ({"a": [2.0, 2.1]}, True, None),
    "the other diverged": ({"a": [2.0, 2.1], "b": [np.inf, np.inf]}, False, "a"),
    "the other diverged once": ({"a": [2.0, 2.1], "b": [np.inf, 2.0]}, False, None),
    "the other was not measured": ({"a": [2.0, 2.1], "b": [np.nan, np.nan], "c": [3.0, 3.1]}, False, "a"),
    "nothing measured": ({"a": [np.nan], "b": [np.nan]}, True, None),
}


@pytest.mark.parametrize(("columns", "higher", "expected"), CASES.values(), ids=CASES)
def test_who_leads_beyond_doubt(columns, higher, expected):
    assert leader(pd.DataFrame(columns), higher) == expected


def test_sensitivity_by_hand():
    # (0.5 - 0.2) + 0 + (1.0 - 0.2), over 3: the last is worse than no training and counts as that
    assert sensitivity([0.5, 0.2, 7.0], 1.0) == pytest.approx(1.1 / 3)
    assert sensitivity([0.5, 0.2, np.nan], 1.0) == pytest.approx(1.1 / 3)
    assert sensitivity([0.3, 0.3], 1.0) == 0.0
    assert sensitivity([np.inf, np.inf], 1.0) == 0.0


def test_sensitivity_needs_a_grid_and_a_start():
    assert np.isnan(sensitivity([0.3], 1.0))
    assert np.isnan(sensitivity([0.3, 0.4], np.nan))
