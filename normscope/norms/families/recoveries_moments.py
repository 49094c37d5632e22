"""Moments over space in few passes, with a gradient written by hand that can be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normscope.norms.average import LOCAL


class _MeanSquare(torch.autograd.Function):
    """Mean of z^2 over the last axis; no square is ever stored."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        result: Tensor = torch.linalg.vector_norm(z, dim=-1).square() / z.shape[-1]
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        result: Tensor = z * (grad * (2 / z.shape[-1])).unsqueeze(-1)
        return result


mean_square: Callable[[Tensor], Tensor] = _MeanSquare.apply


def moments(z: Tensor, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Return mean and variance over the last axis.

    Args:
        z: `(N, C, L)`.
        unbiased: the variance divides by L - 1.

    Returns:
        Mean and variance, each `(N, C)`.

    >>> moments(torch.tensor([[[1.0, 1.0, 3.0, 3.0]]]))
    (tensor([[2.]]), tensor([[1.]]))
    """
    mean, var = LOCAL.moments(z)
    return mean, var * (z.shape[-1] / (z.shape[-1] - 1)) if unbiased else var
