"""Penalties on features: their covariance, and their distance from stored statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope.core.errors import ArgumentError
from normscope.norms.part import require


def instance_covariance(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the covariance of channels of each instance-normalized image: F F^T / (HW - 1) + eps I.

    Args:
        x: features `(N, C, *)`.
        eps: of the normalization, and added to the diagonal.

    Returns:
        `(N, C, C)`.
    """
    return covariance(F.instance_norm(x, eps=eps), eps)


def covariance(f: Tensor, eps: float = 1e-5) -> Tensor:
    """Return F F^T / (HW - 1) + eps I of each image, whose channels have mean 0 already."""
    rows = f.flatten(2)
    eye = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
    return rows @ rows.mT / (rows.shape[2] - 1) + eps * eye


def instance_whitening(x: Tensor, *, mask: Tensor | None = None, margin: float = 0.0, eps: float = 1e-5) -> Tensor:
    """Instance (selective) whitening: `suppression` of the covariance of instance-normalized features.

    Args:
        x: features `(N, C, *)`.
        mask: `(C, C)`, which covariances to suppress; None for all above the diagonal. `selective_mask` selects those
            that change with the style.
        margin: what is tolerated in sum.
        eps: of normalization and covariance.

    Returns:
        A scalar.
    """
    return suppression(instance_covariance(x, eps), mask, margin)


def suppression(cov: Tensor, mask: Tensor | None = None, margin: float = 0.0) -> Tensor:
    """Return the mean over images of relu(sum |cov * mask| - margin) / (entries of the mask)."""
    chosen = torch.ones_like(cov[0]).triu(1) if mask is None else mask.to(cov)
    excess = ((cov * chosen).abs().sum((1, 2)) - margin).clamp_min(0) / chosen.sum().clamp_min(1)
    return excess.mean()


def selective_mask(covariances: Tensor, transformed: Tensor, clusters: int = 3, kept: int = 1) -> Tensor:
    """Return which covariances change most between images and their photometric transforms.

    The variance of each covariance over the two, averaged over images, is split by k-means; the clusters of the lowest
    variances are left alone.

    Args:
        covariances: of the images, `(N, C, C)`.
        transformed: of the same images transformed.
        clusters: number of clusters.
        kept: how many of them, from the lowest, are left alone.

    Returns:
        `(C, C)` of 0 and 1, above the diagonal.

    Raises:
        ArgumentError: there are fewer covariances than clusters.
    """
    variance = torch.stack([covariances, transformed]).var(0, correction=0).mean(0)
    above = torch.ones_like(variance).triu(1).bool()
    values = variance[above]
    if values.numel() < clusters or not 0 < kept < clusters:
        raise ArgumentError(
            f"clusters={clusters}, kept={kept}: {values.numel()} covariances cannot be split like this."
        )
    centers = torch.quantile(values, torch.linspace(0, 1, clusters, dtype=values.dtype, device=values.device))
    for _ in range(100):
        label = (values[:, None] - centers).abs().argmin(1)
        moved = torch.stack([values[label == k].mean() if (label == k).any() else centers[k] for k in range(clusters)])
        if torch.equal(moved, centers):
            break
        centers = moved
    mask = torch.zeros_like(variance)
    mask[above] = (label >= kept).to(variance.dtype)
    return mask


def statistics_matching(norm: nn.Module, x: Tensor, *, direction: str = "stored-batch") -> Tensor:
    """Matching of batch normalization statistics: KL divergence of Gaussians, the mean over channels.

    KL(N(m, v) || N(m', v')) = (log(v' / v) + (v + (m - m')^2) / v' - 1) / 2.

    Args:
        norm: a batch normalization with running statistics, (m, v).
        x: its input `(N, C, *)`, whose mean and biased variance are (m', v').
        direction: "stored-batch" for the above, "batch-stored" for the two exchanged.

    Returns:
        A scalar; the norm's statistics are not updated.

    Raises:
        ArgumentError: the norm stores none.
    """
    require(direction, "direction", ("stored-batch", "batch-stored"))
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise ArgumentError(f"norm={type(norm).__name__} stores no running_mean and running_var to match.")
    eps = getattr(norm, "eps", 1e-5)
    now_var, now_mean = torch.var_mean(x.movedim(1, 0).flatten(1), 1, correction=0)
    (m, v), (n, w) = (mean, var + eps), (now_mean, now_var + eps)
    if direction == "batch-stored":
        (m, v), (n, w) = (n, w), (m, v)
    return 0.5 * ((w / v).log() + (v + (m - n).square()) / w - 1).mean()
