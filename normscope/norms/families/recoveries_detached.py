"""Layer normalization taken apart: gradients of statistics cut, extreme values clipped, a fixed function at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.norms.average import LOCAL, Average, rows
from normscope.norms.layer import Norm
from normscope.norms.operation import Standardize
from normscope.norms.part import Stats, Traits
from normscope.norms.recovery import Recovery


class ControlledNorm(Norm):
    """A composition whose backward pass is not the gradient of its forward pass, on purpose."""

    @property
    def traits(self) -> Traits:
        """Those of the parts, without a true gradient."""
        return replace(super().traits, true_gradient=False)


@dataclass(frozen=True, repr=False)
class Adaptive(Recovery):
    """Scale by a decreasing function of the value: scale * (1 - slope y) * y, the bracket constant in backward.

    Attributes:
        scale: factor of all values.
        slope: how fast large values shrink.
    """

    scale: float = 1.0
    slope: float = 0.1

    def apply(self, host: Any, y: Tensor, x: Tensor, axis: int, condition: Any) -> Tensor:
        """Scale."""
        return self.scale * (1 - (self.slope * y).detach()) * y


@dataclass(frozen=True, repr=False)
class DetachedStandardize(Standardize):
    """Standardize by a mean and a standard deviation that are constants in the backward pass."""

    def measure(self, z: Tensor, average: Average = LOCAL) -> Stats:
        """Take the statistics, without their gradients."""
        return {name: value.detach() for name, value in super().measure(z, average).items()}


@dataclass(frozen=True, repr=False)
class ClippedStandardize(Standardize):
    """Set the k largest and the k smallest samples to the k-th one, then standardize.

    Attributes:
        tail: k as a part of the samples, at least one.
    """

    tail: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a tail out of range.

        Raises:
            ArgumentError: it is not in (0, 1/2).
        """
        super().__post_init__()
        if not 0 < self.tail < 0.5:
            raise ArgumentError(f"tail={self.tail!r} must be above 0 and below 0.5, half of the samples.")

    def clip(self, z: Tensor) -> Tensor:
        """Clip the extreme samples of each row."""
        flat = z.flatten(2)
        k = max(int(flat.shape[2] * self.tail), 1)
        bottom, top = (flat.kthvalue(place, 2, keepdim=True).values for place in (k, flat.shape[2] - k + 1))
        return flat.clamp(bottom, top).reshape(z.shape)

    def measure(self, z: Tensor, average: Average = LOCAL) -> Stats:
        """Take the statistics of the clipped values, and these, which are dear."""
        clipped = self.clip(z)
        return super().measure(clipped, average) | {"clipped": clipped}

    def coefficients(self, stats: Stats) -> None:
        """Return None: clipping is not linear."""

    def apply(self, z: Tensor, stats: Stats) -> Tensor:
        """Standardize the clipped values."""
        z = stats["clipped"] if "clipped" in stats else self.clip(z)
        return (z - rows(stats["mean"], z)) * rows(self._inverse(stats["var"]), z)
