"""Moments: per-channel mean and variance, exact, in one pass at memory bandwidth.

A state is count, mean and variance, which merge exactly (Chan, Golub and LeVeque); on the host it is an array [3, C]
with rows count, mean and M2 = sum (x - mean)^2. `torch.var_mean` runs at a fortieth of memory bandwidth on a CPU, so
there the sums are taken by kernels that do not: `batch_norm_update_stats` for [rows, C], a row sum and a row norm for
[N, C, S].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from normscope.probes.layout import Channeled

_CANCELLED = 1e3  # mean square / var above which sum x^2 - n mean^2 has lost its digits in float32
_ROWS = 16384  # rows summed at once: the kernel adds them up one by one in float32, and a million would lose the mean


class Moments(NamedTuple):
    """The state of one tensor, or of several together.

    Attributes:
        n: values per channel.
        mean: [C], a tensor; a numpy array once it was copied to the host.
        var: [C] biased variance, the same.
    """

    n: int
    mean: Any
    var: Any


def observe(view: Channeled) -> Moments:
    """Return count, mean and variance of one tensor.

    Args:
        view: the tensor as [N, C, S] or [rows, C].

    Returns:
        The state, in float32 or float64.
    """
    x, n = view.x, view.count
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x if x.dtype == wide else x.to(wide)
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x, (0,) if view.rows else (0, 2), correction=0)
        return Moments(n, mean, var)
    return _rows(x) if view.rows else _planes(x, n)


def merge(a: Moments, b: Moments) -> Moments:
    """Return the state of two sets of samples together: exact, associative, commutative."""
    n = a.n + b.n
    delta = b.mean - a.mean
    var = a.var * (a.n / n) + b.var * (b.n / n) + delta.square() * (a.n / n * b.n / n)
    return Moments(n, a.mean + delta * (b.n / n), var)


def _rows(x: torch.Tensor) -> Moments:
    if x.shape[0] <= _ROWS:
        return Moments(x.shape[0], *torch.batch_norm_update_stats(x, None, None, 0.0))
    total, *others = (_rows(part) for part in torch.split(x, _ROWS))
    for part in others:
        total = merge(total, part)
    return total


def _planes(x: torch.Tensor, n: int) -> Moments:
    squares = torch.linalg.vector_norm(x, dim=2).square_().sum(0, dtype=torch.float64)
    mean = x.sum(2).sum(0, dtype=torch.float64).div_(n)
    square = squares.div_(n)
    var = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0)
    if bool((square > var * _CANCELLED).any()) and bool(square.any()):
        var = torch.linalg.vector_norm(x - mean.to(x.dtype)[None, :, None], dim=2).square_().sum(0).div_(n)
    return Moments(n, mean, var)


def compute(state: np.ndarray) -> dict[str, np.ndarray]:
    """Return per-channel statistics of states.

    mean; var = M2 / n (biased); rms = sqrt(mean^2 + var). All are NaN or infinite in a channel that holds a NaN or an
    infinity. In float32 squares overflow from 1e19 on and vanish below 1e-22: there var and rms say no more.

    Args:
        state: [..., 3, C].

    Returns:
        name -> [..., C].
    """
    count, mean, m2 = np.moveaxis(state, -2, 0)
    variance = m2 / count
    return {"mean": mean, "var": variance, "rms": np.sqrt(mean**2 + variance)}


def pooled(stats: dict[str, np.ndarray], state: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the scalars of layers whose channels stand side by side.

    Args:
        stats: the result of `compute`, [channels].
        state: [3, channels].
        starts: [layers] the first channel of each layer.

    Returns:
        name -> [layers]: mean, var (means over channels), rms over everything, `nonfinite` (channels that hold a NaN or
        an infinity), `dead` (fraction of channels that are zero throughout), `count` (values per channel).
    """
    mean, var, rms = stats.values()
    sums = np.add.reduceat(np.stack((mean, var, rms**2, ~np.isfinite(mean), rms == 0)), starts, axis=1)
    means = sums / np.diff(starts, append=len(mean))
    names = ("mean", "var", "rms", "nonfinite", "dead", "count")
    return dict(zip(names, (means[0], means[1], np.sqrt(means[2]), sums[3], means[4], state[0, starts]), strict=True))


def states(found: Sequence[Moments]) -> list[np.ndarray]:
    """Return states that were copied to the host as arrays [3, C] with rows count, mean, M2.

    Args:
        found: states whose mean and variance are numpy arrays.

    Returns:
        One array a state.
    """
    if not found:
        return []
    widths = [len(state.mean) for state in found]
    count = np.repeat([float(state.n) for state in found], widths)
    mean, var = (np.concatenate(part) for part in zip(*((s.mean, s.var) for s in found), strict=True))
    joined, ends = np.stack((count, mean, var * count)), np.cumsum(widths)
    return [joined[:, end - width : end] for width, end in zip(widths, ends, strict=True)]
