"""Gap: what other statistics do to a metric, measured on the same samples before and after, and divergence of norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from normscope.core.estimate import Estimate, Status

LEVEL = 0.01  # chance of a difference beyond `limit` where there is none, over all comparisons together
RATIO, NATS = 5.0, 0.1  # a channel diverges from so many times what sampling explains and so many nats on
_FEWEST = 2

# the rows: whose statistics the norms use
GIVEN = "as handed over"
RUNNING = "running"
BATCH = "batch"
TRAINING = "training data"
TARGET = "target data"


@dataclass(frozen=True, eq=False)
class Measured:
    """A metric of one pass over the data.

    Attributes:
        value: the metric of all the data.
        parts: the metric of every sample, or of groups of batches; their spread is that of the value.
    """

    value: float
    parts: np.ndarray


@dataclass(frozen=True, eq=False)
class Measurements:
    """All that was measured of a model; tables and findings follow from it.

    Attributes:
        model: name of the model's class.
        metric: name of the metric.
        sign: 1 where a higher metric is better, -1 where a lower one is.
        data: what the metric was measured on, "target" or "training".
        samples: number of samples of these data.
        batches: number of batches of these data.
        over: what a part of a `Measured` is, as "samples".
        rows: the metric by the statistics that all norms used.
        missing: why a row could not be measured, by its name.
        alone: the metric with one norm switched to statistics of the data, by the norm's path.
        norms: by path: class, channels, momentum, updates, initial (whether the statistics are still those that a new
            layer has), broken (how many stored numbers are NaN, infinite or negative variances), `summary` of the
            divergence of the data from the stored statistics, and kl_train, that of the training data in the median
            channel where the data are others.
        training: paths of norms that were in training mode when the model was handed over.
        dropping: number of modules that drop at random and were in training mode then.
        frozen: path to class of norms whose statistics no mode switches.
    """

    model: str
    metric: str
    sign: float
    data: str
    samples: int
    batches: int
    over: str
    rows: Mapping[str, Measured]
    missing: Mapping[str, str]
    alone: Mapping[str, Measured]
    norms: pd.DataFrame
    training: tuple[str, ...] = ()
    dropping: int = 0
    frozen: Mapping[str, str] = field(default_factory=dict)

    def norm(self, path: str) -> dict[str, Any]:
        """Return what is known of a norm."""
        return {str(name): self.norms[name].iloc[self.norms.index.get_loc(path)] for name in self.norms}

    def gain(self, row: str, over: str = RUNNING) -> Estimate | None:
        """Return by how much a row is better than another, None where one of them is missing."""
        if row not in self.rows or over not in self.rows:
            return None
        return change(self.rows[over], self.rows[row], self.sign)

    def gains(self) -> dict[str, Estimate]:
        """Return by how much each norm makes the metric better when it alone is switched, the most first."""
        found = {path: change(self.rows[RUNNING], measured, self.sign) for path, measured in self.alone.items()}
        return dict(sorted(found.items(), key=lambda item: -np.nan_to_num(item[1].value, nan=-math.inf)))


def table(measured: Measurements) -> pd.DataFrame:
    """Return the rows: the metric by the statistics that all norms used.

    Args:
        measured: the measurements.

    Returns:
        Columns statistics, metric, standard_error, recovered (how much better than with running statistics; positive
        is better, whatever the metric), recovered_error (of the paired difference), n, over and caveat.
    """
    rows: list[tuple[object, ...]] = []
    for name in (GIVEN, RUNNING, BATCH, TRAINING, TARGET):
        if name in measured.rows:
            value, gain = level(measured.rows[name]), measured.gain(name) or Estimate(math.nan)
            numbers = (value.value, value.standard_error, gain.value, gain.standard_error, value.n)
            if name == RUNNING:
                numbers = (*numbers[:2], 0.0, 0.0, value.n)
            rows.append((name, *numbers, measured.over, caveat(name, measured.data)))
        elif name in measured.missing:
            rows.append((name, *[math.nan] * 4, 0, measured.over, f"not measured: {measured.missing[name]}"))
    columns = ("statistics", "metric", "standard_error", "recovered", "recovered_error", "n", "over", "caveat")
    return pd.DataFrame(rows, columns=list(columns))


def caveat(row: str, data: str) -> str:
    """Return what must be known of a row to believe it, "" where there is nothing.

    Args:
        row: its name.
        data: what was measured, "target" or "training".
    """
    if row == BATCH:
        return "leakage: a prediction depends on the other samples of its batch; holds for batches like these only"
    own = TARGET if data == "target" else TRAINING
    if row == own:
        return "leakage: statistics are of the inputs that are measured (no labels); confirm on batches held out"
    return ""


def ranking(measured: Measurements) -> pd.DataFrame:
    """Return the norms, the one that recovers most when it alone is switched to statistics of the data first.

    Args:
        measured: the measurements.

    Returns:
        Columns norm, recovered, standard_error, chance (the size that chance alone reaches, see `limit`), metric, and
        those of `Measurements.norms`. Norms that were not switched are last, the most divergent first.
    """
    gains = measured.gains()
    rest = measured.norms.drop(index=list(gains)).sort_values("kl", ascending=False, kind="stable").index
    rows: list[tuple[object, ...]] = [
        (path, gain.value, gain.standard_error, limit(gain, len(gains)), measured.alone[path].value)
        for path, gain in gains.items()
    ]
    rows += [(str(path), *[math.nan] * 4) for path in rest]
    frame = pd.DataFrame(rows, columns=["norm", "recovered", "standard_error", "chance", "metric"])
    return frame.join(measured.norms, on="norm")


def level(measured: Measured) -> Estimate:
    """Return a metric with its standard error s / sqrt(n), s the standard deviation of the n parts.

    >>> level(Measured(0.5, np.array([0.0, 1.0, 0.0, 1.0]))).standard_error.__round__(4)
    0.2887
    """
    return _estimate(measured.value, measured.parts)


def change(before: Measured, after: Measured, sign: float = 1.0) -> Estimate:
    """Return by how much a metric got better, with the standard error of the paired difference.

    Args:
        before: the metric in one condition.
        after: the metric of the same parts in the other.
        sign: 1 where higher is better, -1 where lower is.

    Returns:
        sign (after - before); its standard error is that of the mean difference of the parts, which is far below that
        of either metric where both judge the same samples alike.
    """
    return _estimate(sign * (after.value - before.value), sign * (after.parts - before.parts))


def _estimate(value: float, parts: np.ndarray) -> Estimate:
    n = len(parts)
    if not (math.isfinite(value) and np.isfinite(parts).all()):
        return Estimate(value, n=n, status=Status.NON_FINITE)
    if n < _FEWEST:
        return Estimate(value, n=n, status=Status.FEW_SAMPLES)
    return Estimate(value, float(parts.std(ddof=1)) / math.sqrt(n), n=n)


def limit(estimate: Estimate, comparisons: int = 1) -> float:
    """Return the size that a difference reaches by chance.

    |d| < t(1 - LEVEL / (2 k); n - 1) standard errors with probability 1 - LEVEL / k, so of k comparisons with no
    difference none is beyond its limit with probability at least 1 - LEVEL (Bonferroni).

    Args:
        estimate: the difference, of n parts.
        comparisons: how many differences are judged together, k.

    Returns:
        The limit in units of the estimate, NaN where it has no standard error.

    >>> round(limit(Estimate(0.0, 1.0, n=10_000)), 2)
    2.58
    """
    if not estimate.usable:
        return math.nan
    quantile = stats.t.ppf(1 - LEVEL / (2 * max(comparisons, 1)), estimate.n - 1)
    return float(quantile) * estimate.standard_error


def expected_divergence(samples: float, batch: float, momentum: float) -> float:
    """Return the divergence that sampling alone brings about between running statistics and those of a data set.

    As `normscope.metrics.mismatch.expected_drift`, to second order: 1 / n from the n samples of the data set, and
    m / (2 - m) / b from the running average of batches of b.

    Args:
        samples: independent samples of the data set, n.
        batch: independent samples of a training batch, b.
        momentum: weight m of the newest batch.

    Returns:
        1 / n + m / ((2 - m) b), in nats.

    >>> round(expected_divergence(1000, 64, 0.1), 5)
    0.00182
    """
    return 1 / samples + momentum / ((2 - momentum) * batch)


def summary(divergence: np.ndarray, expected: float) -> dict[str, float]:
    """Summarize the divergence of a norm's channels.

    Args:
        divergence: KL of the data's Gaussian from the stored one, [channels], in nats.
        expected: what sampling alone brings about.

    Returns:
        kl, of the median channel; kl_max, of the worst; kl_expected; beyond, the fraction of channels whose divergence
        is more than `RATIO` times the expected one and more than `NATS` nats.
    """
    known = divergence[~np.isnan(divergence)]
    if not len(known):
        return {"kl": math.nan, "kl_max": math.nan, "kl_expected": expected, "beyond": math.nan}
    return {
        "kl": float(np.median(known)),
        "kl_max": float(known.max()),
        "kl_expected": expected,
        "beyond": float((known > max(RATIO * expected, NATS)).mean()),
    }
