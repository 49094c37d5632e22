"""Moments over space."""

from __future__ import annotations

from torch import Tensor

from normscope.norms.average import LOCAL


def moments(z: Tensor, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Return mean and variance over the last axis.

    Args:
        z: `(N, C, L)`.
        unbiased: the variance divides by L - 1.

    Returns:
        Mean and variance, each `(N, C)`.

    >>> import torch
    >>> moments(torch.tensor([[[1.0, 1.0, 3.0, 3.0]]]))
    (tensor([[2.]]), tensor([[1.]]))
    """
    mean, var = LOCAL.moments(z)
    return mean, var * (z.shape[-1] / (z.shape[-1] - 1)) if unbiased else var
