"""y = a x + b with a value for each channel, or for each channel of each example, in one pass forth and one back."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

_LONG = 64


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
    # a row for each channel of each example: the kernel's gradient is several times as fast over long rows
    rows = len(x) if x.shape[2:].numel() >= _LONG else max(len(v) for v in (scale, shift) if v is not None)
    shape = (len(x) // rows, rows * x.shape[1], *x.shape[2:])
    zero, one = x.new_zeros(shape[1]), x.new_ones(shape[1])
    # the second derivative of the kernel needs both
    weight = one if scale is None else scale.expand(rows, -1).flatten().to(x.dtype)
    bias = zero if shift is None else shift.expand(rows, -1).flatten().to(x.dtype)
    return F.batch_norm(x.reshape(shape), zero, one, weight, bias, False, 0.0, 0.0).reshape(x.shape)


def folded(
    scale: Tensor | None, shift: Tensor | None, gain: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return a and b of a x + b = gain (scale x + shift) + bias: `(1 or N, C)`, from gain and bias `(C,)`."""
    if gain is not None:
        scale = gain.unsqueeze(0) if scale is None else scale * gain
        shift = None if shift is None else shift * gain
    if bias is not None:
        shift = bias.unsqueeze(0) if shift is None else shift + bias
    return scale, shift
