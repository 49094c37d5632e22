"""Robust: how far a number lies above what came before, unmoved by single outliers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

WINDOW = 128  # steps that a step is compared with
MIN_HISTORY = 16  # steps below which nothing is compared
_SIGMA = 1.4826  # standard deviation of a Gaussian over its median absolute deviation
_LEAST = 1e-3  # standard deviation of a logarithm that counts at least: rounding makes none of constants


def logarithm(value: float) -> float:
    """Return the logarithm of a size; of zero that of the least float."""
    return math.log(max(abs(value), math.ulp(0.0)))


def robust_z(value: float, before: Iterable[float]) -> float:
    """Return (x - median) / (1.4826 MAD), how far a logarithm lies above those before it.

    Args:
        value: the logarithm.
        before: those before it, one at least.

    Returns:
        The distance in robust standard deviations, each at least 0.001.

    >>> round(robust_z(5.0, [1.0, 2.0, 3.0, 2.0, 2.5]), 2)
    4.05
    """
    known = sorted(before)
    middle = statistics.median(known)
    spread = _SIGMA * statistics.median(abs(x - middle) for x in known)
    return (value - middle) / max(spread, _LEAST)
