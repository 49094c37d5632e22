"""Normalization operations: what is done to `[areas, features, *samples]`, with which statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.norms.average import LOCAL, Average, rows
from normscope.norms.part import Part, Stats, positive


@dataclass(frozen=True, repr=False)
class Operation(Part):
    """Base of the operations: `measure` statistics, `apply` them, measured just now or stored.

    Attributes:
        tracked: names of the statistics that a population stores by default.
        centers: the mean becomes 0.
        scales: the variance, or the mean square where the mean stays, becomes 1.
        whitens: the covariance of the features becomes the identity.
        shifts: an added constant cancels.
        homogeneous: a positive factor on the input cancels, up to eps.
        minimum: fewest samples for which the statistics exist.
    """

    tracked: ClassVar[tuple[str, ...]] = ()
    centers: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    whitens: ClassVar[bool] = False
    shifts: ClassVar[bool] = False
    homogeneous: ClassVar[bool] = False
    minimum: ClassVar[int] = 1

    def measure(self, z: Tensor, average: Average = LOCAL) -> Stats:
        """Take the statistics of `[areas, features, *samples]`.

        Args:
            z: the reordered input.
            average: how to average over samples, for instance across ranks.

        Returns:
            Name to tensor: "mean", "var", "square" (second moment), "scale" (a factor) are `[areas, features]`,
            "covariance" and "matrix" (of whitening) `[areas, features, features]`.
        """
        return {}

    def coefficients(self, stats: Stats) -> tuple[Tensor | None, Tensor | None] | None:
        """Return a and b, each `[areas, features]`, of an operation a z + b; a None for 1, b None for 0.

        Args:
            stats: as for `apply`.

        Returns:
            a and b, or None for an operation that mixes features.
        """
        return None

    def apply(self, z: Tensor, stats: Stats) -> Tensor:
        """Normalize with given statistics.

        Args:
            z: the reordered input.
            stats: as `measure` returns them, or as a population stored them.

        Returns:
            The normalized values, of the shape of z.

        Raises:
            NotImplementedError: an operation of yours has neither `coefficients` nor `apply`.
        """
        pair = self.coefficients(stats)
        if pair is None:
            raise NotImplementedError(f"{type(self).__name__} needs coefficients() or apply().")
        scale, shift = pair
        if scale is None:
            return z if shift is None else z + rows(shift, z)
        return z * rows(scale, z) if shift is None else torch.addcmul(rows(shift, z), z, rows(scale, z))

    def quantity(self, name: str, stats: Stats, count: int | Tensor | None) -> Tensor:
        """Return what a population stores under a name, from measured statistics.

        Args:
            name: "var" means the unbiased variance if a count is given; other names as in `measure`.
            stats: measured statistics.
            count: number of samples, None to store the biased variance.

        Returns:
            The value to average over batches.

        Raises:
            ArgumentError: the operation has no such statistic.
        """
        if name == "square" and "var" in stats:
            return stats["var"] + stats["mean"].square()
        if name not in stats:
            raise ArgumentError(f"track={name!r} is no statistic of {self!r}; it has {', '.join(stats) or 'none'}.")
        if name == "var" and count is not None:
            return stats["var"] * (count / (count - 1))
        return stats[name]

    def initial(self, name: str, areas: int, features: int) -> Tensor:
        """Return the value that a stored statistic starts from: mean 0, variance and factor 1, matrix the identity."""
        if name in {"matrix", "sigma", "covariance"}:
            return torch.eye(features).repeat(areas, 1, 1)
        return torch.zeros(areas, features) if name == "mean" else torch.ones(areas, features)


@dataclass(frozen=True, repr=False)
class Identity(Operation):
    """Leave the values as they are."""

    def coefficients(self, stats: Stats) -> tuple[Tensor | None, Tensor | None] | None:
        """Return a = 1, b = 0."""
        return None, None


@dataclass(frozen=True, repr=False)
class Center(Operation):
    """Subtract the mean."""

    tracked: ClassVar[tuple[str, ...]] = ("mean",)
    centers: ClassVar[bool] = True

    def measure(self, z: Tensor, average: Average = LOCAL) -> Stats:
        """Take the mean."""
        return {"mean": average.mean(z)}

    def coefficients(self, stats: Stats) -> tuple[Tensor | None, Tensor | None] | None:
        """Return a = 1, b = -mean."""
        return None, -stats["mean"]


def safe_sqrt(v: Tensor) -> Tensor:
    """Take the square root with gradient 0, not infinity, at 0."""
    return v.clamp_min(torch.finfo(v.dtype).tiny).sqrt()


def variance(stats: Stats) -> Tensor:
    """Return the variance, from the second moment where only that is stored."""
    return stats["var"] if "var" in stats else (stats["square"] - stats["mean"].square()).clamp_min(0)


@dataclass(frozen=True, repr=False)
class Standardize(Operation):
    """Subtract the mean and divide by the standard deviation: (z - mean) / sqrt(var + eps).

    Attributes:
        eps: added to the variance, or to the standard deviation.
        unbiased: the variance divides by n - 1.
        inside: eps stands inside the root.
    """

    eps: float = 1e-5
    unbiased: bool = False
    inside: bool = True
    tracked: ClassVar[tuple[str, ...]] = ("mean", "var")
    centers: ClassVar[bool] = True
    scales: ClassVar[bool] = True
    homogeneous: ClassVar[bool] = True
    minimum: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Refuse eps that is not above 0 with an ArgumentError."""
        positive(self.eps, "eps")

    def measure(self, z: Tensor, average: Average = LOCAL) -> Stats:
        """Take the mean and the biased variance."""
        mean, var = average.moments(z)
        if not self.unbiased:
            return {"mean": mean, "var": var}
        count = average.count(z)
        return {"mean": mean, "var": var * (count / (count - 1))}

    def coefficients(self, stats: Stats) -> tuple[Tensor | None, Tensor | None] | None:
        """Return a = 1 / deviation, b = -mean / deviation."""
        inverse = self._inverse(variance(stats))
        return inverse, -stats["mean"] * inverse

    def _inverse(self, var: Tensor) -> Tensor:
        return (var + self.eps).rsqrt() if self.inside else (safe_sqrt(var) + self.eps).reciprocal()

    def quantity(self, name: str, stats: Stats, count: int | Tensor | None) -> Tensor:
        """Return what a population stores: "var" is unbiased if a count is given."""
        if not self.unbiased or name == "mean":
            return super().quantity(name, stats, count)
        if name == "var" and count is not None:
            return stats["var"]
        raise ArgumentError(f"track={name!r} needs the biased variance; use {type(self).__name__}(unbiased=False).")


@dataclass(frozen=True, repr=False)
class Scale(Standardize):
    """Divide by the standard deviation and keep the mean: z / sqrt(var + eps)."""

    tracked: ClassVar[tuple[str, ...]] = ("var",)
    centers: ClassVar[bool] = False
    scales: ClassVar[bool] = False

    def coefficients(self, stats: Stats) -> tuple[Tensor | None, Tensor | None] | None:
        """Return a = 1 / deviation, b = 0."""
        return self._inverse(variance(stats)), None


@dataclass(frozen=True, repr=False)
class RMS(Operation):
    """Divide by the root of the mean square: z / sqrt(mean z^2 + eps).

    Attributes:
        eps: added to the mean square, or to its root.
        inside: eps stands inside the root.
        fraction: part of the samples, from the first on, whose mean square is taken.
    """

    eps: float = 1e-5
    inside: bool = True
    fraction: float = 1.0
    tracked: ClassVar[tuple[str, ...]] = ("square",)
    scales: ClassVar[bool] = True
    homogeneous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse eps or fraction out of range.

        Raises:
            ArgumentError: eps is not above 0, or fraction not in (0, 1].
        """
        positive(self.eps, "eps", "an input of zeros would be divided by zero")
        if not 0 < self.fraction <= 1:
            raise ArgumentError(f"fraction={self.fraction!r} must be above 0 and at most 1.")

    def measure(self, z: Tensor, average: Average = LOCAL) -> Stats:
        """Take the mean square."""
        if self.fraction < 1:
            z = z.flatten(2)
            z = z[..., : max(int(z.shape[-1] * self.fraction), 1)]
        return {"square": average.square(z)}

    def coefficients(self, stats: Stats) -> tuple[Tensor | None, Tensor | None] | None:
        """Return a = 1 / root of the mean square, b = 0."""
        square = stats["square"]
        factor = (square + self.eps).rsqrt() if self.inside else (safe_sqrt(square) + self.eps).reciprocal()
        return factor, None


@dataclass(frozen=True, repr=False)
class Rescale(Operation):
    """Base of the operations (z - mean) * scale, with a scale from another measure of spread than the variance.

    Attributes:
        eps: added where the scale divides.
        spread: name of that measure; a population can store it, or "scale".
        about: the measure needs the deviations from the mean; else the values do.
    """

    eps: float = 1e-5
    spread: ClassVar[str] = "deviation"
    about: ClassVar[bool] = True
    tracked: ClassVar[tuple[str, ...]] = ("mean", "scale")
    centers: ClassVar[bool] = True
    homogeneous: ClassVar[bool] = True
    minimum: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Refuse eps that is not above 0 with an ArgumentError."""
        positive(self.eps, "eps")

    def spreads(self, centered: Tensor, average: Average) -> Tensor:
        """Return the measure of spread `[areas, features]`, from the deviations from the mean or the values."""
        raise NotImplementedError

    def scale(self, spread: Tensor) -> Tensor:
        """Return the factor for a spread."""
        return (spread + self.eps).reciprocal()

    def measure(self, z: Tensor, average: Average = LOCAL) -> Stats:
        """Take the mean, the spread and the factor."""
        mean = average.mean(z)
        spread = self.spreads(z - rows(mean, z) if self.about else z, average)
        return {"mean": mean, self.spread: spread, "scale": self.scale(spread)}

    def coefficients(self, stats: Stats) -> tuple[Tensor | None, Tensor | None] | None:
        """Return a = the factor, b = -mean times the factor."""
        scale = stats["scale"] if "scale" in stats else self.scale(stats[self.spread])
        return scale, -stats["mean"] * scale


@dataclass(frozen=True, repr=False)
class Lp(Rescale):
    """Divide by the p-norm of the deviations: (z - mean) * (mean |z - mean|^p + eps)^(-1/p).

    Attributes:
        eps: added to the mean power.
        p: the power, at least 1.
    """

    p: float = 2.0
    spread: ClassVar[str] = "power"

    def __post_init__(self) -> None:
        """Refuse a power below 1.

        Raises:
            ArgumentError: p is below 1, or eps not above 0.
        """
        super().__post_init__()
        if not self.p >= 1:
            raise ArgumentError(f"p={self.p!r} must be at least 1; 1 is the mean absolute deviation, 2 the usual one.")

    def spreads(self, centered: Tensor, average: Average) -> Tensor:
        """Return mean |d|^p."""
        return average.mean(centered.abs().pow(self.p))

    def scale(self, spread: Tensor) -> Tensor:
        """Return (power + eps)^(-1/p)."""
        return (spread + self.eps).pow(-1 / self.p)


@dataclass(frozen=True, repr=False)
class L1(Rescale):
    """Divide by the mean absolute deviation: (z - mean) / (c mean |z - mean| + eps).

    Attributes:
        eps: added to the deviation.
        gaussian: c = sqrt(pi / 2), which makes the deviation of a Gaussian its standard deviation; else 1.
    """

    gaussian: bool = True

    def spreads(self, centered: Tensor, average: Average) -> Tensor:
        """Return c mean |d|."""
        return average.mean(centered.abs()) * (math.sqrt(math.pi / 2) if self.gaussian else 1.0)


@dataclass(frozen=True, repr=False)
class TopK(Rescale):
    """Divide by the mean of the k largest deviations: (z - mean) / (c mean top-k |z - mean| + eps).

    c = (1 + sqrt(pi ln 4)) / (2 sqrt(2 ln n)) follows the growth of the maximum of n Gaussian values; with it and k = 1
    they come out with a standard deviation of about 0.7 for any n.

    Attributes:
        eps: added to the deviation.
        k: how many; 1 is the L-infinity norm. Capped to the number of samples.
    """

    k: int = 10

    def spreads(self, centered: Tensor, average: Average) -> Tensor:
        """Return c mean top-k |d|."""
        k = min(self.k, centered.shape[2:].numel())
        constant = growth(average.count(centered))
        spread: Tensor = constant * average.largest(centered.abs(), k).mean(-1)
        return spread


def growth(count: int | Tensor) -> Any:
    """Return (1 + sqrt(pi ln 4)) / (2 sqrt(2 ln n)), which follows the growth of the maximum of n Gaussian values."""
    log = count.log() if isinstance(count, Tensor) else math.log(count)
    return 0.5 * (1 + math.sqrt(math.pi * math.log(4))) / (2 * log) ** 0.5
