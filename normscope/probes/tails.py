"""Tails: per-channel maximum, exact zeros, kurtosis and saturation on a fixed subsample.

Sorting, histograms and fourth moments cost many passes over a tensor; on at most 32 values per channel they cost
little. The subsample is not random: it strides by the golden ratio of the number of positions, modulo it, so that no
random state is touched, the same positions are seen at every step, and they fall on all samples and all places. A state
is a tensor [9, C] of counts, a maximum, a mean and central sums, which merge exactly (Pebay); raw powers would cancel
where the mean is large.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from normscope.probes.layout import Channeled

SAMPLES = 32
_SMALLEST = 1e-37  # about the smallest normal number of float32
_EDGE = 0.01  # a bounded unit is saturated within 1 % of its range from either end


def observe(view: Channeled, bounds: tuple[float, float] | None = None) -> torch.Tensor:
    """Return the state [9, C] of one tensor: `reduce(subsample(view), bounds)`."""
    return reduce(subsample(view), bounds)


def subsample(view: Channeled) -> torch.Tensor:
    """Return at most `SAMPLES` values per channel, [n, C], at fixed positions spread over samples and places.

    Args:
        view: the tensor as [N, C, S] or [rows, C].

    Returns:
        A copy of all values where there are no more than that, else of those at positions
        floor(n frac((i + 1/2) golden ratio)).
    """
    x = view.x
    if view.count <= SAMPLES:
        return (x if view.rows else x.movedim(1, -1).reshape(-1, x.shape[1])).clone()
    if view.rows:
        return x.index_select(0, _positions(view.count, x.device))
    samples, places = _places(view.count, x.shape[2], x.device)
    return x[samples, :, places]


@torch.no_grad()
def reduce(sample: torch.Tensor, bounds: tuple[float, float] | None = None) -> torch.Tensor:
    """Return the state [9, C] of subsamples; those of several tensors may stand side by side.

    Args:
        sample: [n, C].
        bounds: lower and upper bound of the values, for bounded activations.

    Returns:
        Rows: n, maximum of |x|, zeros, saturated, mean, the sums of (x - mean)^2, ^3 and ^4; then 1 if bounded.
    """
    narrow = sample.device.type == "mps"
    x = sample.clone() if sample.dtype == torch.float64 and not narrow else sample.to(torch.float32, copy=True)
    largest = x.abs().amax(0)
    nothing = torch.zeros_like(largest)
    saturated, bounded = nothing, nothing
    if bounds is not None:
        edge = _EDGE * (bounds[1] - bounds[0])
        saturated = ((x < bounds[0] + edge) | (x > bounds[1] - edge)).sum(0).to(x.dtype)
        bounded = torch.ones_like(largest)
    first = x[0].clone()
    centered = x - first  # first, for a mean far above the deviation
    zeros = x.eq_(0).sum(0)
    mean = centered.mean(0)
    scale = largest.clamp(min=_SMALLEST)  # fourth powers of what is divided by it hold in float32
    centered.sub_(mean).div_(scale)
    square = torch.mul(centered, centered, out=x)
    second = square.sum(0)
    third, fourth = centered.mul_(square).sum(0), square.mul_(square).sum(0)
    count = torch.full_like(largest, len(x))
    rows = (count, largest, zeros, saturated, nothing, second, third, fourth, bounded)
    state = torch.stack(rows).to(torch.float32 if narrow else torch.float64)
    torch.add(mean.to(state.dtype), first, out=state[4])
    scale = scale.to(state.dtype)
    power = scale * scale
    for row in state[5:8]:
        row.mul_(power)
        power = power * scale
    return state


@lru_cache(maxsize=256)
def _positions(count: int, device: torch.device) -> torch.Tensor:
    golden = (math.sqrt(5) - 1) / 2
    places = sorted({int((i + 0.5) * golden % 1 * count) for i in range(SAMPLES)})
    return torch.tensor(places, device=device)


@lru_cache(maxsize=256)
def _places(count: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    positions = _positions(count, device)
    return positions.div(size, rounding_mode="floor"), positions % size


def merge(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Merge two states: counts add, the maximum is the larger one, central sums move to the common mean."""
    n_a, max_a, zeros_a, saturated_a, mean_a, m2_a, m3_a, m4_a, bounded_a = a
    n_b, max_b, zeros_b, saturated_b, mean_b, m2_b, m3_b, m4_b, bounded_b = b
    n = n_a + n_b
    p, q, delta = n_a / n, n_b / n, mean_b - mean_a
    step = delta * delta * p * n_b
    m3 = m3_a + m3_b + step * delta * (p - q) + 3 * delta * (p * m2_b - q * m2_a)
    m4 = m4_a + m4_b + step * delta * delta * (p * p - p * q + q * q)
    m4 = m4 + 6 * delta * delta * (p * p * m2_b + q * q * m2_a) + 4 * delta * (p * m3_b - q * m3_a)
    return torch.stack((
        n,
        torch.maximum(max_a, max_b),
        zeros_a + zeros_b,
        saturated_a + saturated_b,
        mean_a + q * delta,
        m2_a + m2_b + step,
        m3,
        m4,
        torch.maximum(bounded_a, bounded_b),
    ))


def compute(state: np.ndarray) -> dict[str, np.ndarray]:
    """Return per-channel statistics of states.

    max |x|; zeros and saturated as fractions; kurtosis m4 / m2^2, 3 for a Gaussian, NaN for a constant channel.

    Args:
        state: [..., 9, C].

    Returns:
        name -> [..., C]; saturated is NaN where the values are not bounded.
    """
    n, largest, zeros, saturated, mean, m2, _, m4, bounded = np.moveaxis(state, -2, 0)
    constant = m2 <= 1e-20 * n * mean**2
    with np.errstate(divide="ignore", invalid="ignore"):
        kurtosis = np.where(constant, np.nan, n * m4 / m2**2)
        held = np.where(bounded > 0, saturated / n, np.nan)
    return {"max": largest, "zeros": zeros / n, "kurtosis": kurtosis, "saturated": held}


def pooled(stats: dict[str, np.ndarray], state: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the scalars of layers whose channels stand side by side.

    Args:
        stats: the result of `compute`, [channels].
        state: [9, channels].
        starts: [layers] the first channel of each layer.

    Returns:
        name -> [layers]: the largest maximum, the means over channels of the rest, and the sample size.
    """
    largest, zeros, kurtosis, saturated = stats.values()
    finite = np.isfinite(kurtosis)
    summed = np.add.reduceat(np.stack((zeros, np.where(finite, kurtosis, 0.0), finite, saturated)), starts, axis=1)
    width = np.diff(starts, append=len(zeros))
    return {
        "max": np.maximum.reduceat(largest, starts),
        "zeros": summed[0] / width,
        "kurtosis": np.divide(summed[1], summed[2], out=np.full(len(starts), np.nan), where=summed[2] > 0),
        "sample_n": state[0, starts],
        "saturated": summed[3] / width,
    }
