"""A claim of the literature as data: what is expected, what was measured, and the verdict that follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

import pandas as pd

from normscope.core.gallery import VERDICTS, Claim

REPRODUCED, PARTLY, NOT_REPRODUCED, UNTESTABLE = VERDICTS

__all__ = ["VERDICTS", "Claim", "at_least", "at_most", "by_seed", "equal", "untestable"]


def equal(
    statement: str,
    source: str,
    statistic: str,
    values: Sequence[float],
    expected: float,
    *,
    tolerance: float,
    reason: str = "",
) -> Claim:
    """Judge a value: reproduced where every seed is within the tolerance, partly where some are, not where none is.

    Args:
        statement: the claim.
        source: key of the bibliography and place.
        statistic: what the values are.
        values: one for each seed.
        expected: what they should be.
        tolerance: largest absolute distance.
        reason: why it fails, shown only if it does.

    Returns:
        The claim.
    """
    held = [abs(value - expected) <= tolerance for value in values]
    return _judged((statement, source, statistic), values, (expected, tolerance), held, reason)


def at_most(
    statement: str, source: str, statistic: str, values: Sequence[float], bound: float, *, reason: str = ""
) -> Claim:
    """Judge an upper bound, seed by seed as `equal` does."""
    return _judged((statement, source, statistic), values, (f"<= {bound:g}", 0.0), [v <= bound for v in values], reason)


def at_least(
    statement: str, source: str, statistic: str, values: Sequence[float], bound: float, *, reason: str = ""
) -> Claim:
    """Judge a lower bound, seed by seed as `equal` does."""
    return _judged((statement, source, statistic), values, (f">= {bound:g}", 0.0), [v >= bound for v in values], reason)


def untestable(
    statement: str, source: str, statistic: str, values: Sequence[float], expected: float | str, *, reason: str
) -> Claim:
    """State a claim that this scale cannot test, with what was measured and the reason."""
    return Claim(statement, source, statistic, expected, 0.0, *_summary(values), UNTESTABLE, reason)


def _judged(
    words: tuple[str, str, str],
    values: Sequence[float],
    expected: tuple[float | str, float],
    held: list[bool],
    reason: str,
) -> Claim:
    verdict = REPRODUCED if all(held) else PARTLY if any(held) else NOT_REPRODUCED
    measured, spread, seeds = _summary(values)
    return Claim(*words, *expected, measured, spread, seeds, verdict, "" if verdict == REPRODUCED else reason)


def _summary(values: Sequence[float]) -> tuple[float, float, int]:
    numbers = [float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        return math.nan, math.nan, len(numbers)
    return median(numbers), max(numbers) - min(numbers), len(numbers)


def by_seed(frame: pd.DataFrame, statistic: Callable[[pd.DataFrame], float]) -> list[float]:
    """Compute a statistic of each seed's part of a frame, in the order of the seeds.

    Args:
        frame: a frame with a column `seed`.
        statistic: from the part of one seed to a number.

    Returns:
        One number for each seed.
    """
    return [float(statistic(part)) for _, part in frame.groupby("seed")]
