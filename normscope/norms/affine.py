"""y = a x + b with a value for each channel, or for each channel of each example, in one pass forth and one back."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def scale_shift(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Return scale * x + shift, differentiable in all three.

    torch's batch normalization with mean 0 and variance 1 is this map with a fused gradient.

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
    rows = max(len(v) for v in (scale, shift) if v is not None)
    shape = (len(x) // rows, rows * x.shape[1], *x.shape[2:])
    zero, one = x.new_zeros(shape[1]), x.new_ones(shape[1])
    # the second derivative of the kernel needs both
    weight = one if scale is None else scale.expand(rows, -1).flatten().to(x.dtype)
    bias = zero if shift is None else shift.expand(rows, -1).flatten().to(x.dtype)
    return F.batch_norm(x.reshape(shape), zero, one, weight, bias, False, 0.0, 0.0).reshape(x.shape)
