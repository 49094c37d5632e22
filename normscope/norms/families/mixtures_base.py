"""What layers over `(N, C, *)` that are no composition share: settings, an affine recovery, views."""

from __future__ import annotations

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.norms.affine import folded, scale_shift
from normscope.norms.area import Batch, Instance
from normscope.norms.average import LOCAL
from normscope.norms.layer import Normalization
from normscope.norms.operation import safe_sqrt
from normscope.norms.part import Traits, positive
from normscope.norms.population import keep, track, valid_momentum
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

    def pooled(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance `[1, C]` of examples together, from those of each `(n, C)`."""
        center = self.average.mean(mean.mT.unsqueeze(0))
        return center, self.average.mean((var + (mean - center).square()).mT.unsqueeze(0))

    def bessel(self, var: Tensor, z: Tensor) -> Tensor:
        """Return the unbiased variance for a biased one."""
        count = self.average.count(z)
        return var * (count / (count - 1))

    def normalized(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Return weight (x - mean) / sqrt(var + eps) + bias in one pass, mean and variance `(1, C)` or `(N, C)`."""
        factor = (var + self.eps).rsqrt()
        return self.mapped(x, factor, -mean * factor)

    def mapped(self, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        """Return weight (scale x + shift) + bias in one pass, scale and shift `(1, C)` or `(N, C)`."""
        return scale_shift(x, *folded(scale, shift, self.weight, self.bias))

    def recover(self, y: Tensor, x: Tensor) -> Tensor:
        """Scale and shift."""
        return Affine(self.affine, self.affine).apply(self, y, x, 1, None)


class RunningNorm(ChannelNorm):
    """Base of those that also store mean and variance of the batch for evaluation.

    Args:
        num_features: number of channels.
        eps: added before division.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True) -> None:
        """Register weight, bias and the stored statistics."""
        super().__init__(num_features, eps, affine)
        valid_momentum(momentum)
        self.momentum = momentum
        keep(self, mean=torch.zeros(num_features), var=torch.ones(num_features))

    @property
    def traits(self) -> Traits:
        """Those of batch normalization."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True)

    def stored(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stored mean and variance `[1, C]`."""
        return kept(self.running_mean, like).unsqueeze(0), kept(self.running_var, like).unsqueeze(0)

    def batch(self, x: Tensor, each: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of the batch `[1, C]`, after storing them; in evaluation the stored ones.

        Args:
            x: `(N, C, *)`.
            each: moments of each example `(N, C)`, if they are known.

        Returns:
            Mean and variance.
        """
        z = self.split(x)
        if not self.training:
            return self.stored(z)
        if each is None:
            _, mean, var = self.moments(x)
        else:
            enough(z.shape[2:].numel() if self.average is LOCAL else 2, x)
            mean, var = self.pooled(*each)
        track(self, self.momentum, mean=mean, var=self.bessel(var, z))
        return mean, var


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


def unbiased(var: Tensor, samples: int) -> Tensor:
    """Return the unbiased variance for a biased one of a number of samples."""
    return var * (samples / (samples - 1))


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
