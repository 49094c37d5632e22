"""What layers over `(N, C, *)` that are no composition share: settings, an affine recovery, views."""

from __future__ import annotations

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.norms.area import Batch, Instance
from normscope.norms.average import LOCAL, rows
from normscope.norms.layer import Normalization
from normscope.norms.operation import safe_sqrt
from normscope.norms.part import positive
from normscope.norms.recovery import Affine


class ChannelNorm(Normalization):
    """Base of the layers with a weight and a bias for each channel on axis 1.

    Args:
        num_features: number of channels.
        eps: added before division.
        affine: weight and bias for each channel.
    """

    def __init__(self, num_features: int, eps: float, affine: bool) -> None:
        """Register weight and bias."""
        super().__init__()
        positive(eps, "eps")
        self.num_features, self.eps, self.affine = num_features, eps, affine
        Affine(affine, affine).install(self, num_features)

    def split(self, x: Tensor) -> Tensor:
        """Return `[1, C, N, L]`; an input with other channels is an ArgumentError."""
        Batch().axis(x, self.num_features)
        return Batch().split(x)

    def moments(self, x: Tensor, needed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """Return the view `[1, C, N, L]`, mean and biased variance `[1, C]`; too few samples are an ArgumentError."""
        z = self.split(x)
        enough(z.shape[2:].numel() if self.average is LOCAL else needed, x, needed)
        return (z, *self.average.moments(z))

    def bessel(self, var: Tensor, z: Tensor) -> Tensor:
        """Return the unbiased variance for a biased one."""
        count = self.average.count(z)
        return var * (count / (count - 1))

    def standardized(self, z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Return (z - mean) / sqrt(var + eps)."""
        return (z - rows(mean, z)) * rows((var + self.eps).rsqrt(), z)

    def finish(self, z: Tensor, x: Tensor) -> Tensor:
        """Undo `split`, scale and shift."""
        return self.recover(Batch().merge(z, x), x)

    def recover(self, y: Tensor, x: Tensor) -> Tensor:
        """Scale and shift."""
        return Affine(self.affine, self.affine).apply(self, y, x, 1, None)


def enough(samples: int, x: Tensor, needed: int = 2) -> None:
    """Refuse an input with too few samples.

    Args:
        samples: number of samples of each statistic.
        x: the input, for the message.
        needed: fewest samples.

    Raises:
        ArgumentError: there are fewer than needed.
    """
    if samples < needed:
        raise ArgumentError(
            f"x of shape {tuple(x.shape)} gives {samples} samples to each statistic, which needs {needed}; "
            "use a larger input, or evaluation mode."
        )


def instances(x: Tensor, num_features: int) -> Tensor:
    """Return `[N, C, L]`; an input with other channels is an ArgumentError."""
    Instance().axis(x, num_features)
    return Instance().split(x)


def deviation(var: Tensor, eps: float) -> Tensor:
    """Return sqrt(var) + eps, with a finite gradient at 0."""
    return safe_sqrt(var) + eps


def pooled(x: Tensor) -> Tensor:
    """Average over space: `(N, C)`."""
    return Instance().split(x).mean(2)


def kept(value: Tensor, like: Tensor) -> Tensor:
    """Return a stored value in the type of a tensor, or the wider of the two types."""
    return value.to(torch.promote_types(value.dtype, like.dtype))
