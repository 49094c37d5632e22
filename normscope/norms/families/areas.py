"""Methods that differ in the area: batch, layer, instance, group, position, sub-batches, windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normscope.norms.affine import scale_shift
from normscope.norms.area import Batch, BatchGroup, Group, Instance, Layer, Position
from normscope.norms.average import LOCAL
from normscope.norms.families.regions import LearnedRegionNorm, RegionNorm
from normscope.norms.families.sequences import RecurrentBatchNorm, SequenceBatchNorm
from normscope.norms.families.windows import DivisiveNorm, LocalContextNorm, LocalContrastNorm, LocalResponseNorm
from normscope.norms.layer import Norm, Normalization, in_float
from normscope.norms.operation import Standardize, safe_sqrt
from normscope.norms.part import Traits, divide, positive
from normscope.norms.population import Current, Population, Running
from normscope.norms.recovery import Affine, Recovery
from normscope.norms.row import Row, image, tokens


def _affine(affine: bool) -> Recovery | None:
    return Affine() if affine else None


def _batch(
    num_features: int,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    track_running_stats: bool = True,
) -> Norm:
    population: Population = Running(momentum) if track_running_stats else Current()
    return Norm(Batch(), Standardize(eps), _affine(affine), population, num_features=num_features)


def _layer(
    num_features: int | tuple[int, ...], *, eps: float = 1e-5, affine: bool = True, channels: str = "auto"
) -> Norm:
    if isinstance(num_features, int):
        return Norm(Layer(channels), Standardize(eps), _affine(affine), num_features=num_features)
    recovery = Affine(shape=tuple(num_features)) if affine else None
    return Norm(Layer(dims=len(num_features)), Standardize(eps), recovery, num_features=num_features[-1])


def _instance(
    num_features: int,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    track_running_stats: bool = False,
) -> Norm:
    population: Population = Running(momentum) if track_running_stats else Current()
    return Norm(Instance(), Standardize(eps), _affine(affine), population, num_features=num_features)


def _group(num_features: int, *, groups: int | None = None, eps: float = 1e-5, affine: bool = True) -> Norm:
    area = Group(largest_divisor(num_features, 32) if groups is None else groups)
    return Norm(area, Standardize(eps), _affine(affine), num_features=num_features)


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor that does not exceed a limit: the default number of groups where 32 does not fit."""
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


def _positional(
    num_features: int, *, eps: float = 1e-5, affine: bool = False, unbiased: bool = True, channels: str = "auto"
) -> Norm:
    return Norm(Position(channels), Standardize(eps, unbiased), _affine(affine), num_features=num_features)


def _batch_group(
    num_features: int,
    *,
    groups: int | None = None,
    examples: int = 32,
    eps: float = 1e-5,
    momentum: float | None = 0.01,
    affine: bool = True,
) -> Norm:
    area = BatchGroup(largest_divisor(num_features, 32) if groups is None else groups, examples)
    population = Running(momentum, track=("mean", "square"))
    return Norm(area, Standardize(eps), _affine(affine), population, num_features=num_features)


def _ghost(
    num_features: int,
    *,
    examples: int = 32,
    eps: float = 1e-5,
    momentum: float | None = 0.01,
    affine: bool = True,
) -> Norm:
    return _batch_group(num_features, groups=num_features, examples=examples, eps=eps, momentum=momentum, affine=affine)


@dataclass(frozen=True, repr=False)
class Floored(Standardize):
    """Subtract the mean and divide by the standard deviation, but by no less than eps: (z - mean) / max(sd, eps)."""

    eps: float = 1e-8

    def _inverse(self, var: Tensor) -> Tensor:
        return safe_sqrt(var).clamp_min(self.eps).reciprocal()


def _feature_standardization(
    num_features: int, *, eps: float = 1e-8, momentum: float | None = 0.1, affine: bool = False
) -> Norm:
    return Norm(Batch(), Floored(eps), _affine(affine), Running(momentum), num_features=num_features)


class ThumbnailInstanceNorm(Normalization):
    """Thumbnail instance normalization: an image cut into patches is normalized by the statistics of its thumbnail.

    y = weight (x - mean(t)) / sqrt(var(t) + eps) + bias, unbiased variance over space.

    Args:
        num_features: number of channels.
        eps: added to the variance.
        affine: weight and bias for each channel.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        """Register weight and bias."""
        super().__init__()
        positive(eps, "eps")
        self.num_features, self.eps, self.affine = num_features, eps, affine
        Affine(affine, affine).install(self, num_features)

    @property
    def traits(self) -> Traits:
        """Those of instance normalization, as long as the input is its own thumbnail."""
        return Traits(shift_invariant=True, scale_invariant=True, ranks=(3, 4, 5))

    @in_float
    def forward(self, x: Tensor, thumbnail: Tensor | None = None) -> Tensor:
        """Normalize patches `(N, C, *)` by thumbnails `(1 or N, C, *)`, by themselves without."""
        t = Instance().split(x if thumbnail is None else thumbnail.to(x.dtype))
        mean, var = LOCAL.moments(t)
        scale = (var * (t.shape[2] / max(t.shape[2] - 1, 1)) + self.eps).rsqrt()
        return Affine(self.affine, self.affine).apply(self, scale_shift(x, scale, -mean * scale), x, 1, None)


def _recurrent(
    num_features: int,
    *,
    steps: int = 1,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    init: float = 0.1,
) -> RecurrentBatchNorm:
    return RecurrentBatchNorm(num_features, steps, eps, momentum, affine, init)


def _sequence(
    num_features: int,
    *,
    per: str = "sequence",
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> SequenceBatchNorm:
    return SequenceBatchNorm(num_features, per, eps, momentum, affine)


def _local_context(
    num_features: int,
    *,
    groups: int | None = None,
    window: int | tuple[int, ...] = 227,
    eps: float = 1e-5,
    affine: bool = True,
    published: bool = False,
) -> LocalContextNorm:
    size = min(num_features, 2) if groups is None else divide(num_features, groups)
    return LocalContextNorm(num_features, size, window, eps, affine, published)


def _local_contrast(
    num_features: int, *, window: int = 9, sigma: float | None = None, eps: float = 1e-4
) -> LocalContrastNorm:
    return LocalContrastNorm(num_features, window, sigma, eps)


def _local_response(
    num_features: int, *, size: int = 5, alpha: float = 5e-4, beta: float = 0.75, k: float = 2.0
) -> LocalResponseNorm:
    return LocalResponseNorm(num_features, size, alpha, beta, k)


def _divisive(
    num_features: int,
    *,
    sum_window: int | tuple[int, ...] = 3,
    sup_window: int | tuple[int, ...] = 3,
    sigma: float = 1.0,
    learn_sigma: bool = False,
    affine: bool = True,
    published: bool = False,
) -> DivisiveNorm:
    return DivisiveNorm(num_features, sum_window, sup_window, sigma, learn_sigma, affine, published)


def _thumbnail(num_features: int, *, eps: float = 1e-5, affine: bool = True) -> ThumbnailInstanceNorm:
    return ThumbnailInstanceNorm(num_features, eps, affine)


def _region(
    num_features: int,
    *,
    learned: bool = False,
    threshold: float = 0.8,
    eps: float = 1e-5,
    affine: bool = True,
    published: bool = False,
) -> Normalization:
    if learned:
        return LearnedRegionNorm(num_features, threshold, eps)
    return RegionNorm(num_features, eps, affine, published)


def masked(num_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images and the mask of a region for each."""
    (x,) = image(num_features, generator)
    return x, (torch.rand(x.shape[0], 1, *x.shape[2:], generator=generator) < 0.4).to(x)


ROWS: tuple[Row, ...] = (
    Row("batch", "S007", _batch, ("layer:batch",), ("bn",), keys=("torch_bn1d", "torch_bn2d")),
    Row(
        "layer",
        "S011",
        _layer,
        ("layer:layer",),
        ("ln",),
        keys=("torch_ln", "torch_ln_last", "timm_groupnorm1"),
        inputs=tokens,
    ),
    Row("instance", "S013", _instance, ("layer:instance",), ("in",), keys=("torch_in2d",)),
    Row("group", "S012", _group, ("layer:group",), ("gn",), keys=("torch_gn",), options=(("groups", 4),)),
    Row("positional", "S014", _positional, ("layer:positional",), ("pono",), keys=("pono", "timm_layernorm2d")),
    Row(
        "batch-group",
        "S015",
        _batch_group,
        ("layer:batch-group",),
        ("bgn",),
        keys=("fourthings_batchgroup",),
        options=(("groups", 4), ("examples", 3)),
    ),
    Row(
        "ghost-batch",
        "S015",
        _ghost,
        ("layer:ghost-batch",),
        ("ghost", "gbn"),
        keys=("fourthings_ghostbn",),
        options=(("examples", 3),),
    ),
    Row("feature-standardization", "S008", _feature_standardization, ("layer:feature-standardization",)),
    Row(
        "recurrent-batch",
        "S009",
        _recurrent,
        ("layer:recurrent-batch",),
        parts=("batch", "standardize", "affine", "running per step"),
        options=(("steps", 3),),
    ),
    Row(
        "recurrent-batch-input",
        "S010",
        _sequence,
        ("layer:recurrent-batch-input",),
        parts=("batch and time", "standardize", "affine", "running"),
        inputs=tokens,
    ),
    Row(
        "local-context",
        "S016",
        _local_context,
        ("layer:local-context",),
        ("lcn",),
        ("window of a group", "standardize", "affine", "current"),
        ("lcn_local", "lcn_global"),
        options=(("window", 3),),
    ),
    Row(
        "local-contrast",
        "S017",
        _local_contrast,
        ("layer:local-contrast",),
        parts=("window of all channels", "center, then divide", "bare", "current"),
        options=(("window", 3),),
    ),
    Row(
        "local-response",
        "S018",
        _local_response,
        ("layer:local-response",),
        ("lrn",),
        ("neighboring channels", "divide", "bare", "current"),
        ("torch_lrn",),
    ),
    Row(
        "divisive",
        "S019",
        _divisive,
        ("layer:divisive",),
        ("dn",),
        ("window of all channels", "center, then divide", "affine", "current"),
        ("divnorm1d", "divnorm2d"),
    ),
    Row(
        "thumbnail-instance",
        "S191",
        _thumbnail,
        ("layer:thumbnail-instance",),
        parts=("instance", "standardize", "affine", "thumbnail"),
    ),
    Row(
        "region",
        "S195",
        _region,
        ("layer:region",),
        parts=("region of the batch", "standardize", "affine per region", "current"),
        keys=("rn_l",),
        inputs=masked,
    ),
)
