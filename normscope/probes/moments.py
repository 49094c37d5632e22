"""Moments: per-channel mean and variance, exact, in one pass at memory bandwidth.

A state is a tensor [3, C] with rows count, mean and M2 = sum (x - mean)^2; states of two sets merge exactly (Chan,
Golub and LeVeque). `torch.var_mean` runs at a fortieth of memory bandwidth on a CPU, so there the sums are taken by
kernels that do not: `batch_norm_update_stats` for [rows, C], a row sum and a row norm for [N, C, S].
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from normscope.probes.layout import Channeled

_CANCELLED = 1e3  # mean square / var above which sum x^2 - n mean^2 has lost its digits in float32
_ROWS = 16384  # rows summed at once: the kernel adds them up one by one in float32, and a million would lose the mean


def observe(view: Channeled) -> torch.Tensor:
    """Return the state [3, C] of one tensor.

    Args:
        view: the tensor as [N, C, S] or [rows, C].

    Returns:
        Rows count, mean, M2, in float32, or float64 for float64 input.
    """
    x = view.x
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.device.type != "cpu":
        dims = (0,) if view.rows else (0, 2)
        variance, mean = torch.var_mean(x.to(wide), dims, correction=0)
        m2 = variance * view.count
    elif view.rows:
        mean, m2 = _rows(x if x.dtype == wide else x.to(wide))
    else:
        mean, m2 = _planes(x if x.dtype == wide else x.to(wide), view.count)
    return torch.stack((_counts(view.count, mean.shape[0], mean.dtype, mean.device), mean, m2))


@lru_cache(maxsize=256)
def _counts(count: int, channels: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((channels,), count, dtype=dtype, device=device)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count = x.shape[0]
    if count <= _ROWS:
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        return mean, variance * count
    parts = [(part.shape[0], *torch.batch_norm_update_stats(part, None, None, 0.0)) for part in torch.split(x, _ROWS)]
    sizes, means, variances = (
        torch.stack([torch.as_tensor(part[i], dtype=x.dtype, device=x.device) for part in parts]) for i in range(3)
    )
    mean = (means * (sizes / count)[:, None]).sum(0)
    return mean, (sizes[:, None] * (variances + (means - mean).square())).sum(0)


def _planes(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    sums, norms = x.sum(2), torch.linalg.vector_norm(x, dim=2)
    total, square = sums.sum(0, dtype=torch.float64), norms.square_().sum(0, dtype=torch.float64)
    mean = total / count
    m2 = (square - total * mean).clamp_(min=0)
    if bool((square > _CANCELLED * m2).any()) and bool(square.any()):
        m2 = torch.linalg.vector_norm(x - mean.to(x.dtype)[None, :, None], dim=2).square_().sum(0)
    return mean.to(x.dtype), m2.to(x.dtype)


def merge(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Merge the states of two sets of samples: exact, associative, commutative.

    Args:
        a: state [3, C].
        b: state [3, C].

    Returns:
        The state of both sets together.
    """
    n = a[0] + b[0]
    delta = b[1] - a[1]
    return torch.stack((n, a[1] + delta * (b[0] / n), a[2] + b[2] + delta.square() * (a[0] * b[0] / n)))


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


def pooled(stats: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the layer's scalars: mean over channels of mean and var, rms over everything, and counts.

    Args:
        stats: the result of `compute`, [..., C].

    Returns:
        name -> [...]: mean, var, rms, `nonfinite` (channels that hold a NaN or an infinity) and `dead` (fraction of
        channels that are zero throughout).
    """
    rms = stats["rms"]
    return {
        "mean": stats["mean"].mean(-1),
        "var": stats["var"].mean(-1),
        "rms": np.sqrt((rms**2).mean(-1)),
        "nonfinite": (~np.isfinite(stats["mean"])).sum(-1).astype(float),
        "dead": (rms == 0).mean(-1),
    }
