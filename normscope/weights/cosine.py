"""Cosine normalization: layers that divide by the lengths of the weight and of the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CosineLinear(nn.Linear):
    """Cosine of weight and input: y = <x, w> / (|x| |w|), in [-1, 1].

    With `centered` it is Pearson's correlation: the means of x and of w are subtracted first.

    Args:
        in_features: number of inputs.
        out_features: number of outputs.
        centered: subtract means.
        eps: least length that is divided by.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        centered: bool = False,
        eps: float = 1e-8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Register the weight; there is no bias."""
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.centered, self.eps = centered, eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the cosines `(*, out_features)` of `(*, in_features)`."""
        w = self.weight
        if self.centered:
            x, w = x - x.mean(-1, keepdim=True), w - w.mean(1, keepdim=True)
        return F.linear(F.normalize(x, dim=-1, eps=self.eps), F.normalize(w, dim=1, eps=self.eps))


class CosineConv2d(nn.Conv2d):
    """Cosine of kernel and patch: y = <x, w> / (|x| |w|) for each patch x, in [-1, 1]; padding counts as zeros.

    Takes the arguments of nn.Conv2d, without bias and with padding_mode "zeros", and:

    Args:
        centered: subtract the means of patch and kernel: Pearson's correlation.
        eps: least length that is divided by.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        centered: bool = False,
        eps: float = 1e-8,
    ) -> None:
        """Register the kernel; there is no bias."""
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
        self.centered, self.eps = centered, eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the cosines `(N, out_channels, *)` of `(N, in_channels, *)`."""
        w = self.weight.flatten(1)
        if self.centered:
            w = w - w.mean(1, keepdim=True)
        y: Tensor = self._conv_forward(x, F.normalize(w, dim=1, eps=self.eps).reshape(self.weight.shape), None)
        square = self._sums(x.square())
        if self.centered:
            square = square - self._sums(x).square() / w.shape[1]
        length = square.clamp_min(self.eps**2).sqrt()
        cosines: Tensor = y / length.repeat_interleave(self.out_channels // self.groups, 1)
        return cosines

    def _sums(self, x: Tensor) -> Tensor:
        """Return the sum over each patch of each group of channels."""
        ones = x.new_ones(self.groups, *self.weight.shape[1:])
        return F.conv2d(x, ones, None, self.stride, self.padding, self.dilation, self.groups)
