"""Thinning: fewer points of a series that still show its extremes."""

from __future__ import annotations

import numpy as np


def edges(n: int, buckets: int) -> np.ndarray:
    """Return where each of so many buckets of nearly equal size begins, [min(n, buckets)].

    >>> edges(5, 2).tolist()
    [0, 3]
    """
    return np.ceil(np.linspace(0, n, min(n, buckets), endpoint=False)).astype(np.int64)


def extremes(values: np.ndarray, points: int) -> np.ndarray:
    """Choose points of a curve: of each bucket its smallest and its largest, and both ends of the curve.

    Args:
        values: [n], NaN where there is none.
        points: about how many to keep; a curve with no more is kept whole.

    Returns:
        Indices, increasing.
    """
    n = len(values)
    if n <= points:
        return np.arange(n)
    starts = edges(n, points // 2)
    low, high = np.where(np.isfinite(values), values, np.inf), np.where(np.isfinite(values), values, -np.inf)
    chosen = {0, n - 1}
    for start, end in zip(starts, [*starts[1:], n], strict=True):
        chosen |= {int(start + low[start:end].argmin()), int(start + high[start:end].argmax())}
    return np.array(sorted(chosen))


def paired(values: np.ndarray, columns: int) -> np.ndarray:
    """Thin a matrix along its last axis to pairs of columns: smallest and largest of each bucket.

    Args:
        values: [rows, n]; NaN is passed over, infinity is not.
        columns: how many columns to keep, even.

    Returns:
        [rows, columns]; within a pair the smaller comes first where the bucket rises from its first value to its last.
    """
    starts = edges(values.shape[1], columns // 2)
    ends = np.append(starts[1:], values.shape[1]) - 1
    low, high = np.fmin.reduceat(values, starts, axis=1), np.fmax.reduceat(values, starts, axis=1)
    falls = values[:, starts] > values[:, ends]
    return np.stack([np.where(falls, high, low), np.where(falls, low, high)], axis=2).reshape(len(values), -1)
