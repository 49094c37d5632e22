"""Penalties on a weight matrix or kernel that pull it towards orthogonality."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from normscope.core.errors import ArgumentError
from normscope.norms.part import require
from normscope.weights.orthogonal import correlation, self_correlation_error

SIDES = ("short", "out", "in")


def gram_error(rows: Tensor, side: str = "short") -> Tensor:
    """Return the Gram matrix of a weight minus the identity.

    Args:
        rows: `(out, fan_in)`.
        side: "out" for W W^T, "in" for W^T W, "short" for the smaller; squared norms of both differ by a constant.

    Returns:
        A square matrix.
    """
    require(side, "side", SIDES)
    by_rows = side == "out" or (side == "short" and rows.shape[0] <= rows.shape[1])
    gram = rows @ rows.mT if by_rows else rows.mT @ rows
    return gram - torch.eye(len(gram), dtype=rows.dtype, device=rows.device)


def soft(rows: Tensor, *, side: str = "short") -> Tensor:
    """Soft orthogonality: |W^T W - I|_F^2."""
    return gram_error(rows, side).square().sum()


def double_soft(rows: Tensor) -> Tensor:
    """Double soft orthogonality: |W^T W - I|_F^2 + |W W^T - I|_F^2."""
    return soft(rows, side="in") + soft(rows, side="out")


def coherence(rows: Tensor, *, norm: str = "entry", side: str = "short") -> Tensor:
    """Mutual coherence: |W^T W - I|_inf.

    Args:
        rows: `(out, fan_in)`.
        norm: "entry" for the largest entry, which bounds the coherence of units, "row-sum" for the matrix norm.
        side: which Gram matrix.

    Returns:
        A scalar.
    """
    require(norm, "norm", ("entry", "row-sum"))
    error = gram_error(rows, side).abs()
    return error.amax() if norm == "entry" else error.sum(1).amax()


def restricted_isometry(
    rows: Tensor,
    *,
    side: str = "short",
    style: str = "rayleigh",
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Spectral restricted isometry: sigma(W^T W - I)^2 by one step of power iteration, gradients through the step.

    Args:
        rows: `(out, fan_in)`.
        side: which Gram matrix.
        style: with A = W^T W - I and start b: "rayleigh" takes u = A v with v = A b, both of length 1, and (u^T A v)^2;
            "growth" takes |A v|^2.
        start: b; None draws it, normal for "rayleigh" and uniform for "growth".
        generator: of the draw; None for a new one, so that each call draws the same.

    Returns:
        A scalar.
    """
    require(style, "style", ("rayleigh", "growth"))
    error = gram_error(rows, side)
    if start is None:
        generator = generator or torch.Generator().manual_seed(0)
        draw = torch.randn if style == "rayleigh" else torch.rand
        start = draw(len(error), generator=generator, dtype=torch.float64).to(error)
    v = F.normalize(error @ start, dim=0)
    if style == "growth":
        return (error @ v).square().sum()
    u = F.normalize(error @ v, dim=0)
    return (u @ error @ v).square()


def spectral(rows: Tensor) -> Tensor:
    """Spectral norm regularization: sigma(W)^2 / 2, sigma the largest singular value."""
    value: Tensor = torch.linalg.matrix_norm(rows, 2).square() / 2
    return value


def biggan(rows: Tensor, *, diagonal: bool = False) -> Tensor:
    """Orthogonal regularization of BigGAN: |W W^T * (1 - I)|_F^2 / 2, whose gradient is 2 (W W^T * (1 - I)) W.

    Args:
        rows: `(out, fan_in)`.
        diagonal: use W W^T - I instead, so that lengths are pulled to 1 as well.

    Returns:
        A scalar.
    """
    gram = rows @ rows.mT
    diag = torch.eye(len(gram), dtype=rows.dtype, device=rows.device)
    return (gram - diag if diagonal else gram * (1 - diag)).square().sum() / 2


def parseval(rows: Tensor) -> Tensor:
    """Parseval penalty: |W^T W - I|_F^2 / 2, of which the retraction is a step of gradient descent."""
    return gram_error(rows).square().sum() / 2


def orthogonal_convolution(
    kernel: Tensor, *, side: str = "out", stride: int = 1, padding: int | None = None, squared: bool = False
) -> Tensor:
    """Orthogonal convolution: |conv(K, K) - I0|_F, for the whole operator on a map and not the kernel's matrix alone.

    Args:
        kernel: `(out, in, *)`; one of a single tap gives |W^T W - I|_F of the smaller Gram matrix.
        side: "out" for orthogonal rows of the operator, "in" for orthogonal columns (of two-dimensional kernels).
        stride: of the layer.
        padding: of the correlation, for "out"; None for floor((k - 1) / stride) stride.
        squared: square the norm, as the paper does and its code does not.

    Returns:
        A scalar.

    Raises:
        ArgumentError: there is no such side, or columns of a kernel that is not two-dimensional are asked for.
    """
    require(side, "side", ("out", "in"))
    if kernel[0, 0].numel() == 1:
        error = gram_error(kernel.flatten(1))
    elif side == "out":
        pad = (kernel.shape[-1] - 1) // stride * stride if padding is None else padding
        error = correlation(kernel, stride, pad)
    elif kernel.ndim == 4:
        error = columns_error(kernel, stride)
    else:
        raise ArgumentError(f"side='in' needs a kernel of 2 dimensions, not {kernel.ndim - 2}; take side='out'.")
    return error.square().sum() if squared else torch.linalg.vector_norm(error)


def columns_error(kernel: Tensor, stride: int = 1) -> Tensor:
    """Return the Gram matrix of the columns of a convolution, for the input at the middle of a map, minus the identity.

    Args:
        kernel: `(out, in, k, k)`.
        stride: of the layer.

    Returns:
        `(in, in, *)`: what the transposed convolution makes of the outputs of an impulse in each channel, minus it.
    """
    channels, size = kernel.shape[1], kernel.shape[2] + stride * (kernel.shape[2] - 1)
    impulse = torch.zeros(channels, channels, size * size, dtype=kernel.dtype, device=kernel.device)
    impulse[range(channels), range(channels), size * size // 2] = 1
    impulse = impulse.reshape(channels, channels, size, size)
    return F.conv_transpose2d(F.conv2d(impulse, kernel, stride=stride), kernel, stride=stride) - impulse


def isometric(kernel: Tensor, *, stride: int = 1) -> Tensor:
    """Isometric penalty: |conv(K, K; padding k - 1, stride) - I0|_F^2 / 2, on the side with fewer channels.

    Args:
        kernel: `(out, in, *)`.
        stride: of the layer.

    Returns:
        A scalar.
    """
    return self_correlation_error(kernel, stride).square().sum() / 2
