"""Methods that differ in the operation: norms other than the second, centering or scaling alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from normscope.norms.area import Batch, Layer, Position
from normscope.norms.average import LOCAL, Average, rows
from normscope.norms.layer import Norm
from normscope.norms.operation import L1, RMS, Center, Lp, Operation, Rescale, Scale, TopK, growth
from normscope.norms.part import Stats, require
from normscope.norms.population import Current, Population, Running, track
from normscope.norms.recovery import Affine, Recovery
from normscope.norms.row import Row, tokens


def _affine(affine: bool) -> Recovery | None:
    return Affine() if affine else None


def _shaped(num_features: int | tuple[int, ...], channels: str) -> tuple[Layer, tuple[int, ...], int]:
    if isinstance(num_features, int):
        return Layer(channels), (), num_features
    return Layer(dims=len(num_features)), tuple(num_features), num_features[-1]


def _rms(
    num_features: int | tuple[int, ...],
    *,
    eps: float = 1e-6,
    affine: bool = True,
    inside: bool = True,
    fraction: float = 1.0,
    shift: bool = False,
    offset: float = 0.0,
    channels: str = "auto",
    position: bool = False,
) -> Norm:
    area, shape, count = _shaped(num_features, channels)
    recovery = Affine(shift=shift, init=1 - offset, offset=offset, shape=shape) if affine else None
    return Norm(Position(channels) if position else area, RMS(eps, inside, fraction), recovery, num_features=count)


def _variance_only(
    num_features: int | tuple[int, ...], *, eps: float = 1e-5, affine: bool = False, channels: str = "auto"
) -> Norm:
    area, shape, count = _shaped(num_features, channels)
    return Norm(area, Scale(eps), Affine(shape=shape) if affine else None, num_features=count)


def _pixel(num_features: int, *, eps: float = 1e-8, affine: bool = False, channels: str = "auto") -> Norm:
    return Norm(Position(channels), RMS(eps), Affine(shift=False) if affine else None, num_features=num_features)


def _l1(
    num_features: int,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    gaussian: bool = False,
) -> Norm:
    population = Running(momentum, track=("mean", "deviation"))
    return Norm(Batch(), L1(eps, gaussian), _affine(affine), population, num_features=num_features)


def _lp(
    num_features: int,
    *,
    p: float = 1.0,
    top: int | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> Norm:
    operation: Operation = L1(eps) if p == 1 else Lp(eps, p)
    if top is not None or math.isinf(p):
        operation = TopK(eps, top or 1)
    return Norm(Batch(), operation, _affine(affine), Running(momentum), num_features=num_features)


def _mean_only(num_features: int, *, momentum: float | None = 0.1, affine: bool = True) -> Norm:
    recovery = Affine(scale=False) if affine else None
    return Norm(Batch(), Center(), recovery, Running(momentum), num_features=num_features)


Pair = Callable[[Tensor, Average, float], tuple[Tensor, Tensor]]


def _semideviation(z: Tensor, average: Average, level: float) -> tuple[Tensor, Tensor]:
    mean = average.mean(z)
    return mean, average.mean((z - rows(mean, z)).clamp_min(0))


def _absolute(z: Tensor, average: Average, level: float) -> tuple[Tensor, Tensor]:
    mean = average.mean(z)
    return mean, average.mean((z - rows(mean, z)).abs())


def _range(z: Tensor, average: Average, level: float) -> tuple[Tensor, Tensor]:
    top, bottom = extremes(z, average)
    return (top + bottom) / 2, top - bottom


def _superquantile(z: Tensor, average: Average, level: float) -> tuple[Tensor, Tensor]:
    k = max(math.ceil((1 - level) * float(average.count(z))), 1)
    if average is not LOCAL:
        largest = average.largest(z, k)
        return largest[..., -1], largest.mean(-1) - average.mean(z)
    # finding one quantile is cheaper than sorting; what lies above it counts once, the quantile fills up to k
    flat = z.flatten(2)
    quantile = flat.kthvalue(flat.shape[2] - k + 1).values
    above = (flat - quantile.unsqueeze(-1)).clamp_min(0).sum(-1)
    return quantile, quantile + above / k - average.mean(z)


def _worst(z: Tensor, average: Average, level: float) -> tuple[Tensor, Tensor]:
    top = average.largest(z, 1)[..., 0]
    return top, top - average.mean(z)


def extremes(z: Tensor, average: Average) -> tuple[Tensor, Tensor]:
    """Return the largest and the smallest sample of each row."""
    return average.largest(z, 1)[..., 0], -average.largest(-z, 1)[..., 0]


PAIRS: dict[str, Pair] = {
    "absolute": _absolute,
    "semideviation": _semideviation,
    "range": _range,
    "superquantile": _superquantile,
    "worst-case": _worst,
}


@dataclass(frozen=True, repr=False)
class Deviation(Operation):
    """Subtract a statistic and divide by the deviation measure that it minimizes: (z - S) / (D + eps).

    Pairs (S, D): "absolute" (mean, mean |d|), "semideviation" (mean, mean of the positive part of d), "range" (middle,
    maximum - minimum), "superquantile" (the quantile at `level`, the mean above it less the mean), "worst-case"
    (maximum, maximum - mean).

    Attributes:
        pair: which pair.
        eps: added to the deviation.
        level: of the quantile.
    """

    pair: str = "superquantile"
    eps: float = 1e-5
    level: float = 0.25
    tracked: ClassVar[tuple[str, ...]] = ("center", "deviation")
    homogeneous: ClassVar[bool] = True
    shifts: ClassVar[bool] = True
    minimum: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Refuse an unknown pair with an ArgumentError."""
        require(self.pair, "pair", PAIRS)

    def measure(self, z: Tensor, average: Average = LOCAL) -> Stats:
        """Take the statistic and the deviation."""
        center, deviation = PAIRS[self.pair](z, average, self.level)
        return {"center": center, "deviation": deviation}

    def coefficients(self, stats: Stats) -> tuple[Tensor | None, Tensor | None] | None:
        """Return a = 1 / (deviation + eps), b = -statistic times a."""
        scale = (stats["deviation"] + self.eps).reciprocal()
        return scale, -stats["center"] * scale

    def initial(self, name: str, areas: int, features: int) -> Tensor:
        """Return 0 for the statistic and 1 for the deviation."""
        return super().initial("mean" if name == "center" else name, areas, features)


def _generalized(
    num_features: int,
    *,
    pair: str = "superquantile",
    level: float = 0.25,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> Norm:
    operation = Deviation(pair, eps, level)
    return Norm(Batch(), operation, _affine(affine), Running(momentum), num_features=num_features)


@dataclass(frozen=True, repr=False)
class Streaming(Running):
    """Mix the statistics of the batch with their moving averages, in training too; evaluation uses the averages.

    used = short * batch + (1 - short) * average, where the average already holds the batch. The first batch stands for
    its own history.

    Attributes:
        short: weight of the batch.
    """

    short: float = 0.3

    def choose(self, host: Any, z: Tensor) -> Stats:
        """Return the mixed statistics in training, after storing the batch's, and the averages in evaluation."""
        if not host.training:
            return self.stored(host, z)
        measured: Stats = host.measure(z)
        count = int(host.num_batches_tracked)
        momentum = 1 / (count + 1) if self.momentum is None or count == 0 else self.momentum
        before = {name: value.clone() for name, value in self.stored(host, z).items()}
        track(host, momentum, **{name: measured[name] for name in before})
        weight = self.short + (1 - self.short) * momentum
        return {name: torch.lerp(value, measured[name], weight) for name, value in before.items()}


def _streaming(
    num_features: int,
    *,
    p: float = 1.0,
    short: float = 0.3,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> Norm:
    operation: Rescale = L1(eps, gaussian=False) if p == 1 else Lp(eps, p)
    population = Streaming(momentum, ("mean", operation.spread), short=short)
    return Norm(Batch(), operation, _affine(affine), population, num_features=num_features)


@dataclass(frozen=True, repr=False)
class Range(Rescale):
    """Divide by the range: (z - mean) / (c range + eps), the range averaged over chunks of the batch.

    c = 0.175 (1 + sqrt(pi ln 4)) / sqrt(2 ln n), n samples in a chunk.

    Attributes:
        eps: added to the range.
        chunks: at most so many parts of equal size.
    """

    chunks: int = 16
    about: ClassVar[bool] = False

    def spreads(self, centered: Tensor, average: Average) -> Tensor:
        """Return c times the mean range of the chunks."""
        flat = centered.flatten(2)
        parts = max(d for d in range(1, self.chunks + 1) if flat.shape[2] % d == 0 and flat.shape[2] // d > 1)
        pieces = flat.reshape(*flat.shape[:2], parts, -1)
        ranges = average.over((pieces.amax(-1) - pieces.amin(-1)).sum(-1), parts)
        constant: float = 0.35 * growth(pieces.shape[-1])
        return constant * ranges


def _range_batch(
    num_features: int,
    *,
    chunks: int = 16,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> Norm:
    return Norm(Batch(), Range(eps, chunks), _affine(affine), Running(momentum), num_features=num_features)


@dataclass(frozen=True, repr=False)
class PowerRange(Rescale):
    """Divide by a power of the range: (z - mean) / ((max - min)^power + eps).

    Attributes:
        eps: added to the power.
        power: exponent, below 1 so that the scale of the input is not lost altogether.
    """

    power: float = 0.2
    spread: ClassVar[str] = "range"
    about: ClassVar[bool] = False
    homogeneous: ClassVar[bool] = False

    def spreads(self, centered: Tensor, average: Average) -> Tensor:
        """Return the range."""
        top, bottom = extremes(centered, average)
        return top - bottom

    def scale(self, spread: Tensor) -> Tensor:
        """Return 1 / (range^power + eps)."""
        return (spread.clamp_min(torch.finfo(spread.dtype).tiny).pow(self.power) + self.eps).reciprocal()


@dataclass(frozen=True, repr=False)
class RunningMean(Running):
    """Evaluation uses the stored mean, and the spread of the input at hand."""

    def stored(self, host: Any, z: Tensor) -> Stats:
        """Return the stored mean and the measured rest."""
        measured: Stats = host.measure(z)
        return measured | super().stored(host, z)


ROBUST = ("batch", "running", "mean")


def _robust(
    num_features: int,
    *,
    power: float = 0.2,
    statistics: str = "batch",
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> Norm:
    require(statistics, "statistics", ROBUST)
    population: Population = {
        "batch": Current(),
        "running": Running(momentum, ("mean", "range")),
        "mean": RunningMean(momentum, ("mean",)),
    }[statistics]
    return Norm(Batch(), PowerRange(eps, power), _affine(affine), population, num_features=num_features)


ROWS: tuple[Row, ...] = (
    Row(
        "rms",
        "S036",
        _rms,
        ("layer:rms",),
        ("rmsnorm",),
        keys=("rmsnorm", "torch_rmsnorm", "timm_rmsnorm2d"),
        inputs=tokens,
    ),
    Row("variance-only-layer", "S038", _variance_only, ("layer:variance-only-layer",), ("vo-ln",), inputs=tokens),
    Row("pixel", "S035", _pixel, ("layer:pixel",)),
    Row("l1-batch", "S029", _l1, ("layer:l1-batch",), ("l1bn",)),
    Row("lp-batch", "S030", _lp, ("layer:lp-batch",), ("lpbn",), keys=("l1bn", "lpbn_p2", "topkbn", "linfbn")),
    Row("mean-only-batch", "S032", _mean_only, ("layer:mean-only-batch",), ("mobn",), keys=("meanbn", "centernorm")),
    Row("generalized-batch", "S031", _generalized, ("layer:generalized-batch",), ("generalized-bn",)),
    Row("streaming", "S028", _streaming, ("layer:streaming",)),
    Row("range-batch", "S209", _range_batch, ("layer:range-batch",), ("range-bn",)),
    Row("robust", "S240", _robust, ("layer:robust",), ("robustnorm",), keys=("robustnorm_rnt",)),
)
