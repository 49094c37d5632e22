"""Paired statistics: intervals of Student, differences paired by seed, sensitivity to the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with its confidence interval.

    Attributes:
        mean: the mean; NaN without a value, infinite where one is.
        low: lower end, NaN below two values and where one is infinite.
        high: upper end.
        deviation: standard deviation of the values, of n - 1 degrees of freedom.
        n: number of values.
    """

    mean: float
    low: float
    high: float
    deviation: float
    n: int

    @property
    def separated(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def student(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """Return mean +- t s / sqrt(n), t the quantile of Student's distribution with n - 1 degrees of freedom.

    Args:
        values: independent values; NaN are left out.
        level: probability that the interval holds the true mean, for normal values.

    Returns:
        The interval.

    >>> [round(value, 3) for value in student([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484, 1.0, 3]
    """
    found = np.asarray(values, float)
    found = found[~np.isnan(found)]
    n = len(found)
    if n == 0:
        return Interval(np.nan, np.nan, np.nan, np.nan, 0)
    with np.errstate(invalid="ignore"):  # of infinities of both signs
        mean = float(found.mean())
    if n == 1 or not np.isfinite(found).all():
        return Interval(mean, np.nan, np.nan, np.nan, n)
    deviation = float(found.std(ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * deviation / n**0.5
    return Interval(mean, mean - half, mean + half, deviation, n)


def paired(values: pd.Series, others: pd.Series, level: float = LEVEL) -> Interval:
    """Return the interval of the differences values - others of what was seeded alike.

    What seeds share, as the order of the data, cancels; so this interval may exclude zero where those of both means
    overlap.

    Args:
        values: by seed.
        others: by seed; seeds that only one of them has are left out.
        level: probability that the interval holds the true difference, for normal differences.

    Returns:
        The interval.
    """
    both = pd.concat([values, others], axis=1, join="inner").dropna()
    with np.errstate(invalid="ignore"):  # infinity less infinity
        return student((both.iloc[:, 0] - both.iloc[:, 1]).to_numpy(float), level)


def leader(values: pd.DataFrame, higher: bool, level: float = LEVEL) -> str | None:
    """Return the column that is better than every other one beyond doubt.

    It has the best mean, and the paired interval of its difference to each of the others excludes zero. No correction
    for their number is needed: the statement fails as soon as one of its parts does. A column that is infinite for
    every seed counts as worse.

    Args:
        values: a row a seed, a column an entry; NaN where not measured.
        higher: whether more is better.
        level: of each interval.

    Returns:
        The column; None where no column is so, or only one has values.
    """
    sign = 1.0 if higher else -1.0
    known = values.loc[:, values.notna().any()] * sign
    if known.shape[1] < 2:
        return None
    best = known.mean().idxmax()
    if not np.isfinite(known[best].dropna()).all():
        return None
    for name in [column for column in known.columns if column != best]:
        lost = bool(np.isneginf(known[name].dropna()).all())
        if not lost and not paired(known[best], known[name], level).low > 0:
            return None
    return str(best)


def sensitivity(losses: Sequence[float], start: float) -> float:
    """Return how much is lost on average by not knowing the best learning rate.

    E_eta[min(loss(eta), loss_0) - loss*], the mean over the grid, with loss_0 the loss at the start and loss* the best
    one of the grid; what diverged counts as not trained.

    Args:
        losses: final losses, one a learning rate; NaN and infinity where training diverged or failed.
        start: the loss before training.

    Returns:
        At least 0; NaN for a single learning rate or an unknown start. Source: wortsman2023.

    >>> round(sensitivity([0.5, 0.2, float("inf")], 2.3), 6)
    0.8
    """
    found = np.asarray(losses, float)
    if len(found) < 2 or not np.isfinite(start):
        return float("nan")
    capped = np.minimum(np.where(np.isfinite(found), found, np.inf), start)
    return float((capped - capped.min()).mean())
