"""Normalization layers: the statistics they compute, the running ones they keep, and how much eps weighs against them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from normscope.norms.recognize import NormParts

AREAS = 256  # areas (tokens, or samples x groups) looked at per step, at a fixed stride


def attributes(parts: NormParts) -> dict[str, object]:
    """Return what the record keeps of a normalization layer's parts."""
    return {
        "norm": parts.kind,
        "eps": parts.eps,
        "momentum": parts.momentum,
        "groups": parts.groups,
        "has_running": parts.has_running,
    }


@torch.no_grad()
def running(module: nn.Module) -> torch.Tensor:
    """Return a copy of the running mean and variance, [2, C]."""
    mean, variance = module.running_mean, module.running_var
    return torch.stack((mean.detach(), variance.detach()))  # type: ignore[union-attr,operator]  # buffers by their names


@torch.no_grad()
def areas(x: torch.Tensor, parts: NormParts) -> torch.Tensor:
    """Return mean and variance over the layer's own areas, on at most `AREAS` of them.

    Layer and RMS norms: an area is a token, the normalized trailing dimensions; group and instance norms: a sample and group.

    Args:
        x: input of the layer.
        parts: its parts.

    Returns:
        [3, areas]: size of an area, mean, M2 of each.
    """
    if parts.kind in ("group", "instance"):
        groups = parts.groups or (x.shape[1] if parts.kind == "instance" else 1)
        rows = x.reshape(x.shape[0] * groups, -1)
    elif parts.axis == -1:
        rows = x.reshape(-1, x.shape[x.dim() - max(parts.normalized_ndim, 1) :].numel())
    else:
        rows = x.movedim(parts.axis, -1).flatten(0, -2)
    rows = rows[:: -(-len(rows) // AREAS)]
    rows = rows if rows.dtype == torch.float64 else rows.to(torch.float32)
    mean = rows.mean(1)
    m2 = (rows - mean[:, None]).square_().sum(1)
    return torch.stack((torch.full_like(mean, rows.shape[1]), mean, m2))


def merge_areas(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Keep the areas of the first of several passes: a step's areas stay bounded."""
    return a


def eps_weight(mean: np.ndarray, variance: np.ndarray, eps: float, rms: bool) -> np.ndarray:
    """Return eps / (v + eps), v the variance, or the mean square for a layer that does not center.

    Args:
        mean: means of the areas.
        variance: biased variances of the areas.
        eps: the layer's eps.
        rms: whether the layer divides by the root mean square.

    Returns:
        The fraction of the denominator that is eps: 0 normal, 1 when the layer no longer normalizes.
    """
    power = variance + mean**2 if rms else variance
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(eps > 0, eps / (power + eps), np.where(power > 0, 0.0, np.nan))


def drift(mean: np.ndarray, variance: np.ndarray, running_mean: np.ndarray, running_var: np.ndarray) -> np.ndarray:
    """Return the Kullback-Leibler divergence of the batch's Gaussian from the running one, per channel, in nats.

    KL = 1/2 [ln(var_r / var_b) + (var_b + (mean_b - mean_r)^2) / var_r - 1]

    Args:
        mean: batch means.
        variance: batch variances, unbiased, as the running ones are.
        running_mean: running means.
        running_var: running variances.

    Returns:
        KL per channel: 0 where both agree, infinite where one variance is 0 and the other is not, NaN where both are.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = variance / running_var
        return 0.5 * (ratio - np.log(ratio) + (mean - running_mean) ** 2 / running_var - 1)
