"""y = a x + b with a value for each channel, or for each channel of each example, in one pass forth and one back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from normscope.norms.average import by_hand, lined

# shortest row for which torch's sums over rows are worth a call
_LONG = 64


def scale_shift(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Return scale * x + shift, differentiable in all three.

    Args:
        x: `(N, C, *)`.
        scale: `(1, C)` or `(N, C)`, None for 1.
        shift: `(1, C)` or `(N, C)`, None for 0.

    Returns:
        A tensor of the shape of x.

    >>> import torch
    >>> x = torch.ones(2, 3, 4)
    >>> scale_shift(x, torch.tensor([[1.0, 2.0, 3.0]]), None)[0, :, 0]
    tensor([1., 2., 3.])
    """
    if scale is None and shift is None:
        return x
    # a row for each channel of each example: sums over long rows are several times as fast
    long = x.shape[2:].numel() >= _LONG
    rows = len(x) if long else max(len(v) for v in (scale, shift) if v is not None)
    shape = (len(x) // rows, rows * x.shape[1], *x.shape[2:])
    zero, one = x.new_zeros(shape[1]), x.new_ones(shape[1])
    # the second derivative of the kernel needs both
    weight = one if scale is None else scale.expand(rows, -1).flatten().to(x.dtype)
    bias = zero if shift is None else shift.expand(rows, -1).flatten().to(x.dtype)
    if long and lined(x) and by_hand(x):
        return _scale_shift(x.reshape(1, shape[1], -1), weight, bias).reshape(x.shape)
    # torch's batch normalization with mean 0 and variance 1 is this map, too
    return F.batch_norm(x.reshape(shape), zero, one, weight, bias, False, 0.0, 0.0).reshape(x.shape)


def row_sums(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of y x and of y over each row of `[..., L]`, without gradient.

    >>> row_sums(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    (tensor([11.]), tensor([3.]))
    """
    if not lined(x):
        return (y * x).sum(-1), y.sum(-1)
    # the gradients of weight and bias of a group normalization with mean 0 and deviation 1 of rows for groups
    length, rows = x.shape[-1], x.shape[:-1].numel()
    zero, one = x.new_zeros(1, rows), x.new_ones(1, rows)
    _, products, sums = torch.ops.aten.native_group_norm_backward(
        y.contiguous(), x.contiguous(), zero, one, one[0], 1, rows, length, rows, [False, True, True]
    )
    return products.reshape(x.shape[:-1]), sums.reshape(x.shape[:-1])


class _ScaleShift(torch.autograd.Function):
    """Map each row of `[1, R, L]`; backward takes both sums of a row in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return F.batch_norm(x, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, False, 0.0, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        grad_x = grad * scale.unsqueeze(-1) if ctx.needs_input_grad[0] else None
        if torch.is_grad_enabled():
            return grad_x, (grad * x).sum((0, 2)), grad.sum((0, 2))
        products, sums = row_sums(grad, x)
        return grad_x, products[0], sums[0]


_scale_shift: Callable[..., Tensor] = _ScaleShift.apply


def folded(
    scale: Tensor | None, shift: Tensor | None, gain: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return a and b `(1 or N, C)` of a x + b = gain (scale x + shift) + bias, gain and bias `(C,)` or `(N, C)`."""
    if gain is not None:
        scale = gain.reshape(-1, gain.shape[-1]) if scale is None else scale * gain
        shift = None if shift is None else shift * gain
    if bias is not None:
        shift = bias.reshape(-1, bias.shape[-1]) if shift is None else shift + bias
    return scale, shift
