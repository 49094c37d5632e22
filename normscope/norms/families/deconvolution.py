"""Network deconvolution: the input of a convolution or linear layer is whitened, the matrix folded into its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope.core.errors import ArgumentError
from normscope.norms.layer import Normalization, in_float
from normscope.norms.part import Traits, divide, positive
from normscope.norms.population import keep, track, valid_momentum
from normscope.norms.whiten import Whiten


class _Deconvolving(Normalization):
    """Base: statistics of rows of `size` coordinates, stored as mean and whitening matrix."""

    running_matrix: Tensor
    eps: float
    iterations: int
    momentum: float | None

    def adopt(self, start: nn.Module) -> None:
        """Take over the initial weight and bias of a layer of torch."""
        self.weight, self.bias = start.get_parameter("weight"), start.get_parameter("bias")

    def prepare(self, size: int) -> None:
        """Register the stored statistics."""
        positive(self.eps, "eps")
        valid_momentum(self.momentum)
        keep(self, mean=torch.zeros(size), matrix=torch.eye(size))

    def whitening(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and whitening matrix of `(samples, size)`, the stored ones in evaluation."""
        if not self.training:
            return self.running_mean, self.running_matrix
        operation = Whiten("newton", self.eps, iterations=self.iterations, divisor="frobenius")
        stats = operation.measure(samples.mT.unsqueeze(0), self.average)
        mean, matrix = stats["mean"][0], stats["matrix"][0]
        track(self, self.momentum, mean=mean, matrix=matrix)
        return mean, matrix

    @property
    def traits(self) -> Traits:
        """The output is that of the convolution or linear layer."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True)


def pooled(x: Tensor, size: int) -> Tensor:
    """Divide the last axis: feature f becomes coordinate f // (n / size) of one of n / size samples."""
    return x.reshape(-1, size, x.shape[-1] // size).mT.reshape(-1, size)


class Deconv2d(_Deconvolving):
    """A convolution that whitens the patches it sees: w' = w D, b' = b - w' mean, D = covariance^(-1/2) of the patches.

    A patch has k^2 C entries; they are divided into blocks of k^2 block coordinates, which share D.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: of the convolution.
        stride: of the convolution.
        padding: of the convolution; the zeros enter the statistics.
        dilation: of the convolution.
        block: input channels of a block, the greatest common divisor with in_channels is taken.
        sampling_stride: every so many-th patch along each dimension enters the statistics.
        eps: added to the diagonal of the covariance.
        iterations: of the coupled Newton-Schulz iteration.
        momentum: weight of the newest batch, None for a plain average.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        *,
        block: int = 64,
        sampling_stride: int = 3,
        eps: float = 1e-5,
        iterations: int = 5,
        momentum: float | None = 0.1,
    ) -> None:
        """Register weight, bias and the stored statistics."""
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.block, self.sampling_stride = block, sampling_stride
        self.eps, self.iterations, self.momentum = eps, iterations, momentum
        self.adopt(nn.Conv2d(in_channels, out_channels, _pair(kernel_size)))
        self.size = math.gcd(block, in_channels) * math.prod(_pair(kernel_size))
        self.prepare(self.size)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Convolve `(N, C, H, W)`."""
        weight, bias = self.weight, self.bias
        if weight is None or bias is None:
            raise ArgumentError("weight and bias must not be None: the mean is folded into the bias.")
        step = tuple(self.sampling_stride * s for s in _pair(self.stride))
        patches = F.unfold(x, _pair(self.kernel_size), _pair(self.dilation), _pair(self.padding), step)
        mean, matrix = self.whitening(pooled(patches.mT, self.size))
        folded = pooled(weight.flatten(1), self.size) @ matrix
        shift = (folded @ mean).reshape(self.out_channels, -1).sum(1)
        whole = folded.reshape(self.out_channels, -1, self.size).mT.reshape(weight.shape)
        return F.conv2d(x, whole, bias - shift, _pair(self.stride), _pair(self.padding), _pair(self.dilation))


class DeconvLinear(_Deconvolving):
    """A linear layer that whitens blocks of its input: w' = w D, b' = b - w' mean.

    Args:
        in_features: number of inputs, a multiple of the block.
        out_features: number of outputs.
        block: consecutive inputs of a block; all blocks share D.
        eps: added to the diagonal of the covariance.
        iterations: of the coupled Newton-Schulz iteration.
        momentum: weight of the newest batch, None for a plain average.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: int = 512,
        *,
        eps: float = 1e-5,
        iterations: int = 5,
        momentum: float | None = 0.1,
    ) -> None:
        """Register weight, bias and the stored statistics."""
        super().__init__()
        self.in_features, self.out_features, self.block = in_features, out_features, block
        self.eps, self.iterations, self.momentum = eps, iterations, momentum
        self.size = min(block, in_features)
        divide(in_features, in_features // self.size)
        self.adopt(nn.Linear(in_features, out_features))
        self.prepare(self.size)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_features)` to `(N, out_features)`."""
        weight, bias = self.weight, self.bias
        if weight is None or bias is None:
            raise ArgumentError("weight and bias must not be None: the mean is folded into the bias.")
        mean, matrix = self.whitening(x.reshape(-1, self.size))
        folded = weight.reshape(-1, self.size) @ matrix
        shift = (folded @ mean).reshape(self.out_features, -1).sum(1)
        return F.linear(x, folded.reshape(weight.shape), bias - shift)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return first, second
