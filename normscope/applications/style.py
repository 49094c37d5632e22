"""Style: second moments of features are the style of an image, and matching them transfers it."""

from __future__ import annotations

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError


def gram(features: Tensor, *, average: bool = False) -> Tensor:
    """Return the Gram matrix of features over their places, G_ij = sum_k F_ik F_jk.

    Source: gatys2016, equation 3.

    Args:
        features: `(N, C, *)`.
        average: divide by the number of places, so that images of different size compare.

    Returns:
        `(N, C, C)`.

    >>> gram(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]))
    tensor([[[5., 2.],
             [2., 1.]]])
    """
    f = _flat(features, "features")
    return f @ f.mT / (f.shape[-1] if average else 1)


def gram_error(features: Tensor, style: Tensor) -> Tensor:
    """Return how far features are from a style: |G - G_s| / |G_s|, Frobenius norms of averaged Gram matrices.

    Args:
        features: `(N, C, *)`.
        style: `(N, C, *)`; the places may be others.

    Returns:
        `(N,)`.
    """
    target = gram(style, average=True)
    error: Tensor = torch.linalg.matrix_norm(gram(features, average=True) - target) / torch.linalg.matrix_norm(target)
    return error


def style_loss(features: Tensor, style: Tensor) -> Tensor:
    """Return the style loss of one layer, sum_ij (G_ij / M - G^s_ij / M_s)^2 / (4 C^2), M the number of places.

    With as many places in both images this is sum (G - G^s)^2 / (4 C^2 M^2). Source: gatys2016, equation 4.

    Args:
        features: `(N, C, *)`.
        style: `(N, C, *)`.

    Returns:
        `(N,)`.
    """
    difference = gram(features, average=True) - gram(style, average=True)
    return difference.square().sum((1, 2)) / (4 * features.shape[1] ** 2)


def content_loss(features: Tensor, content: Tensor) -> Tensor:
    """Return the content loss of one layer, 1/2 sum (F - P)^2.

    Source: gatys2016, equation 1.

    Args:
        features: `(N, C, *)`.
        content: features of the content image, of the same shape.

    Returns:
        `(N,)`.
    """
    return 0.5 * (features - content).flatten(1).square().sum(1)


def adain(content: Tensor, style: Tensor, *, alpha: float = 1.0, eps: float = 1e-5) -> Tensor:
    """Give each channel of the content mean and standard deviation of the style's (AdaIN).

    y = s_style (content - mean_content) / s_content + mean_style, s = sqrt(unbiased variance over places + eps). With
    eps = 0 mean and variance are matched exactly. Source: S185 (AdaIN), equation 8.

    Args:
        content: `(N, C, *)`.
        style: `(N, C, *)`; the places may be others.
        alpha: 1 for the style, 0 for the content.
        eps: added to both variances.

    Returns:
        A tensor of the content's shape.
    """
    c, s = _flat(content, "content"), _flat(style, "style")
    variances, means = zip(*(torch.var_mean(f, -1, keepdim=True) for f in (c, s)), strict=True)
    scale = ((variances[1] + eps) / (variances[0] + eps)).sqrt()
    return _blended(content, (c - means[0]) * scale + means[1], alpha)


def wct(content: Tensor, style: Tensor, *, alpha: float = 1.0, cut: float = 1e-5) -> Tensor:
    """Give the content mean and covariance of the style's channels: whitening, then coloring (WCT).

    y = S_s^(1/2) S_c^(-1/2) (content - mean_c) + mean_s with the covariances S over places. So the averaged Gram matrix
    becomes that of the style, exactly where the content's covariance has full rank; directions whose eigenvalue is
    below `cut` times the largest are left out. Source: S188 (WCT), section 3.2.

    Args:
        content: `(N, C, *)`.
        style: `(N, C, *)`; the places may be others.
        alpha: 1 for the style, 0 for the content.
        cut: relative size of eigenvalues that count as zero.

    Returns:
        A tensor of the content's shape; computed in float64.
    """
    c, s = _flat(content, "content").double(), _flat(style, "style").double()
    means = [f.mean(-1, keepdim=True) for f in (c, s)]
    white = _power(c - means[0], -0.5, cut) @ (c - means[0])
    colored = _power(s - means[1], 0.5, cut) @ white + means[1]
    return _blended(content, colored.to(content.dtype), alpha)


def _power(centered: Tensor, power: float, cut: float) -> Tensor:
    """Return a power of the covariance, on the span of its eigenvalues that are not zero."""
    values, vectors = torch.linalg.eigh(centered @ centered.mT / centered.shape[-1])
    kept = values > cut * values[..., -1:]
    scaled = torch.where(kept, values, 1.0) ** power * kept
    powered: Tensor = (vectors * scaled.unsqueeze(-2)) @ vectors.mT
    return powered


def _flat(features: Tensor, name: str) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim < 3:
        got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"type {type(features).__name__}"
        raise ArgumentError(f"{name} of {got} must be a tensor (N, C, *): images by channels by places.")
    return features.flatten(2)


def _blended(content: Tensor, styled: Tensor, alpha: float) -> Tensor:
    if not 0 <= alpha <= 1:
        raise ArgumentError(f"alpha={alpha!r} must be between 0 (the content) and 1 (the style).")
    return torch.lerp(content, styled.reshape(content.shape), alpha)
