"""Parts of later years: heads, unit length, a scalar gain, a saturating function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from normscope.norms.area import Area, checked_axis
from normscope.norms.average import LOCAL, Average
from normscope.norms.operation import Operation, safe_sqrt
from normscope.norms.part import Stats, divide, known_features, positive, require
from normscope.norms.recovery import Affine, Recovery, channels


@dataclass(frozen=True, repr=False)
class Heads(Area):
    """Each head of each token: `[N * L, heads, C / heads]` from `(N, *, C)`.

    Attributes:
        heads: number of heads, groups of consecutive channels.
    """

    heads: int = 1
    channels: ClassVar[str] = "last"

    def axis(self, x: Tensor, num_features: int | None) -> int:
        """Return -1."""
        return checked_axis(x, num_features, (-1,))

    def rows(self, num_features: int) -> tuple[int, int]:
        """Return one area and the heads."""
        divide(num_features, self.heads)
        return 1, self.heads

    def split(self, x: Tensor, axis: int = 1) -> Tensor:
        """Reorder to `[N * L, heads, C / heads]`."""
        return x.reshape(-1, self.heads, divide(x.shape[-1], self.heads))

    def merge(self, z: Tensor, x: Tensor, axis: int = 1) -> Tensor:
        """Undo `split`."""
        return z.reshape(x.shape)


@dataclass(frozen=True, repr=False)
class HeadAffine(Recovery):
    """Scale and shift each channel of a head, alike for all heads: y * weight + bias, `(C / heads,)`.

    Attributes:
        heads: number of heads.
        shift: there is a bias.
    """

    heads: int = 1
    shift: bool = False

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register weight and bias `(C / heads,)`."""
        Affine(shift=self.shift).install(host, divide(known_features(num_features, self), self.heads))

    def apply(self, host: Any, y: Tensor, x: Tensor, axis: int, condition: Any) -> Tensor:
        """Scale and shift."""
        z: Tensor = y.reshape(*y.shape[:-1], self.heads, -1) * host.weight
        return (z if host.bias is None else z + host.bias).flatten(-2)


@dataclass(frozen=True, repr=False)
class UnitLength(Operation):
    """Divide by the Euclidean length: z / max(||z||, eps).

    Attributes:
        eps: least length.
    """

    eps: float = 1e-5
    tracked: ClassVar[tuple[str, ...]] = ("length",)
    homogeneous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse eps that is not above 0 with an ArgumentError."""
        positive(self.eps, "eps", "an input of zeros would be divided by zero")

    def measure(self, z: Tensor, average: Average = LOCAL) -> Stats:
        """Take the length of each row."""
        return {"length": safe_sqrt(average.square(z) * z.shape[2:].numel())}

    def coefficients(self, stats: Stats) -> tuple[Tensor | None, Tensor | None]:
        """Return a = 1 / length, b = 0."""
        return stats["length"].clamp_min(self.eps).reciprocal(), None


@dataclass(frozen=True, repr=False)
class LayerScale(Affine):
    """Scale each channel by a small weight, so that a residual branch starts near 0: y * weight.

    Attributes:
        scale: there is a weight.
        shift: there is a bias.
        init: initial weight.
    """

    shift: bool = False
    init: float = 1e-5


@dataclass(frozen=True, repr=False)
class DepthScaled(Affine):
    """Divide by the root of the layer's depth: (y * weight + bias) / sqrt(depth), so that variance does not grow.

    Attributes:
        scale: there is a weight.
        shift: there is a bias.
        depth: place of the layer, from 1.
    """

    depth: int = 1

    def __post_init__(self) -> None:
        """Refuse a depth below 1 with an ArgumentError."""
        positive(self.depth, "depth", "layers are counted from 1")

    def gain(self, host: Any) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias over the root of the depth."""
        factor = self.depth**-0.5
        weight, bias = super().gain(host)
        return (weight if weight is None else weight * factor), (bias if bias is None else bias * factor)


@dataclass(frozen=True, repr=False)
class SelfRescaled(Recovery):
    """Scale by a weight that follows the input: y * (weight + tanh(x . direction) rescale), x before normalization.

    weight starts from 1, rescale from 1 and direction from 0, so that at first the scale is 1.
    """

    pointwise: ClassVar[bool] = False

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register weight, rescale and direction, all `(C,)`."""
        count = known_features(num_features, self)
        for name, start in (("weight", 1.0), ("rescale", 1.0), ("direction", 0.0)):
            host.register_parameter(name, nn.Parameter(torch.full((count,), start)))

    def apply(self, host: Any, y: Tensor, x: Tensor, axis: int, condition: Any) -> Tensor:
        """Scale."""
        if axis == -1 or x.ndim == 2:
            wide = host.weight + torch.tanh((x @ host.direction).unsqueeze(-1)) * host.rescale
        else:
            # sums over channels as products: those of a strided axis are slow
            direction, rescale = (v.expand(len(x), -1).unsqueeze(1) for v in (host.direction, host.rescale))
            gate = torch.tanh(direction @ x.flatten(2))
            wide = torch.baddbmm(host.weight.unsqueeze(-1), rescale.mT, gate).reshape(y.shape)
        return y * cast(Tensor, wide)


@dataclass(frozen=True, repr=False)
class Gain(Recovery):
    """Multiply everything by one learned number: y * weight.

    Attributes:
        init: initial weight.
    """

    init: float = 1.0

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register weight `(1,)`."""
        host.register_parameter("weight", nn.Parameter(torch.full((1,), self.init)))

    def apply(self, host: Any, y: Tensor, x: Tensor, axis: int, condition: Any) -> Tensor:
        """Multiply."""
        out: Tensor = y * host.weight
        return out


SATURATING = {"tanh": torch.tanh, "erf": torch.erf}


@dataclass(frozen=True, repr=False)
class Saturating(Recovery):
    """Squash instead of normalizing: weight * f(alpha y + offset) + bias, f = tanh or erf.

    Attributes:
        function: "tanh" (without offset, dynamic tanh) or "erf" (with one).
        alpha: initial alpha, one number for all channels.
    """

    function: str = "tanh"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Refuse an unknown function with an ArgumentError."""
        require(self.function, "function", SATURATING)

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register alpha `(1,)`, offset `(1,)` for erf, weight and bias `(C,)`."""
        Affine().install(host, known_features(num_features, self))
        host.register_parameter("alpha", nn.Parameter(torch.full((1,), self.alpha)))
        if self.function == "erf":
            host.register_parameter("offset", nn.Parameter(torch.zeros(1)))

    def apply(self, host: Any, y: Tensor, x: Tensor, axis: int, condition: Any) -> Tensor:
        """Squash, scale and shift."""
        value = host.alpha * y + host.offset if self.function == "erf" else host.alpha * y
        return SATURATING[self.function](value) * channels(host.weight, y, axis) + channels(host.bias, y, axis)
