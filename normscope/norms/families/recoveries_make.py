"""Compositions of the methods that differ in the recovery, with their published settings."""

from __future__ import annotations

from normscope.core.errors import ArgumentError
from normscope.norms.area import Area, Batch, Group, Instance, Layer
from normscope.norms.families.areas import largest_divisor
from normscope.norms.families.recoveries_branches import PassportNorm, SandwichBranchNorm
from normscope.norms.families.recoveries_condition import (
    DynamicConvolution,
    Modulated,
    Sandwich,
    SpatiallyAdaptive,
    StyleStatistics,
)
from normscope.norms.families.recoveries_detached import (
    Adaptive,
    ClippedStandardize,
    ControlledNorm,
    DetachedStandardize,
)
from normscope.norms.families.recoveries_input import (
    ATTENTIONS,
    Attentive,
    InstanceEnhancement,
    InstanceMeta,
    Utterance,
)
from normscope.norms.families.recoveries_layers import (
    AdaptiveConvolutionNorm,
    CrossNorm,
    LayerInstanceNorm,
    RepresentativeBatchNorm,
    SelfNorm,
)
from normscope.norms.families.recoveries_semantic import SemanticNorm
from normscope.norms.layer import Norm, Normalization
from normscope.norms.operation import Standardize
from normscope.norms.part import require
from normscope.norms.population import Current, Population, Running
from normscope.norms.recovery import Affine, Conditional, Recovery


def dynamic_layer(
    num_features: int, *, size: int = 64, features: int = 0, eps: float = 1e-5, channels: str = "auto"
) -> Norm:
    """Make layer normalization whose scale and shift sum up the sequence."""
    return Norm(Layer(channels), Standardize(eps), Utterance(size, features), num_features=num_features)


def adaptive_instance(
    num_features: int,
    *,
    style: int | None = None,
    equalized: bool = True,
    eps: float = 1e-5,
    unbiased: bool | None = None,
) -> Norm:
    """Make adaptive instance normalization, by the statistics of a style or by a style vector of length `style`."""
    recovery = StyleStatistics(eps) if style is None else Modulated(style, equalized=equalized)
    operation = Standardize(eps, style is None if unbiased is None else unbiased)
    return Norm(Instance(), operation, recovery, num_features=num_features)


def layer_instance(
    num_features: int,
    *,
    adaptive: bool = False,
    eps: float = 1e-5,
    affine: bool = True,
    rho: float | None = None,
    unbiased: bool = True,
    smooth: float = 0.0,
) -> LayerInstanceNorm:
    """Make layer-instance normalization, adaptive or with an affine map of its own."""
    return LayerInstanceNorm(num_features, adaptive, eps, affine, rho, unbiased, smooth)


BASES = ("group", "instance", "layer")


def instance_meta(
    num_features: int,
    *,
    base: str = "group",
    groups: int | None = None,
    keys: int | None = None,
    hidden: int | None = None,
    eps: float = 1e-5,
) -> Norm:
    """Make instance-level meta normalization on group, instance or layer normalization."""
    require(base, "base", BASES)
    count = largest_divisor(num_features, 32) if groups is None else groups
    area: Area = {"group": Group(count), "instance": Instance(), "layer": Layer("first")}[base]
    # groups of 16 channels, as published, where they fit
    number = largest_divisor(num_features, max(num_features // 16, 1)) if keys is None else keys
    few = number < 16 or (number == 16 and base != "group")
    recovery = InstanceMeta(number, (2 if few else number // 16) if hidden is None else hidden)
    return Norm(area, Standardize(eps, unbiased=True), recovery, num_features=num_features)


def associate(
    num_features: int, *, base: str = "group", groups: int | None = None, hidden: int | None = None, eps: float = 1e-5
) -> Norm:
    """Make associate normalization on group or instance normalization."""
    require(base, "base", BASES[:2])
    count = largest_divisor(num_features, 32) if groups is None else groups
    number = num_features if base == "instance" else count
    recovery = InstanceMeta(number, max(number // 16, 1) if hidden is None else hidden, unbiased=False, crossed=True)
    return Norm(Group(number), Standardize(eps), recovery, num_features=num_features)


def _base(norm: str, momentum: float | None) -> tuple[Area, Population]:
    require(norm, "norm", ("batch", "instance"))
    return (Batch(), Running(momentum)) if norm == "batch" else (Instance(), Current())


def spatially_adaptive(
    num_features: int,
    *,
    labels: int,
    norm: str = "batch",
    hidden: int = 128,
    kernel: int = 3,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
) -> Norm:
    """Make spatially-adaptive normalization for maps with so many labels."""
    area, population = _base(norm, momentum)
    recovery = SpatiallyAdaptive(labels, hidden, kernel)
    return Norm(area, Standardize(eps), recovery, population, num_features=num_features)


def instance_enhancement(num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1) -> Norm:
    """Make instance enhancement batch normalization."""
    return Norm(Batch(), Standardize(eps), InstanceEnhancement(), Running(momentum), num_features=num_features)


def attentive(
    num_features: int,
    *,
    mixtures: int = 10,
    attention: str | None = None,
    groups: int | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
) -> Norm:
    """Make attentive normalization, of the batch or with groups of channels."""
    kind = ("bn-hsigmoid" if groups is None else "hsigmoid") if attention is None else attention
    require(kind, "attention", ATTENTIONS)
    if groups is None:
        return Norm(Batch(), Standardize(eps), Attentive(mixtures, kind), Running(momentum), num_features=num_features)
    if ATTENTIONS[kind][1]:
        free = [name for name, (_, normalized, _) in ATTENTIONS.items() if not normalized]
        raise ArgumentError(f"attention={kind!r} takes batch statistics, groups={groups} does not; try one of {free}.")
    return Norm(Group(groups), Standardize(eps), Attentive(mixtures, kind), num_features=num_features)


def adanorm(
    num_features: int, *, scale: float = 1.0, slope: float = 0.1, eps: float = 1e-5, channels: str = "auto"
) -> ControlledNorm:
    """Make AdaNorm."""
    operation = Standardize(eps, unbiased=True, inside=False)
    return ControlledNorm(Layer(channels), operation, Adaptive(scale, slope), num_features=num_features)


def simple(num_features: int, *, eps: float = 1e-5, channels: str = "auto") -> Norm:
    """Make layer normalization without affine map, eps added to the unbiased deviation."""
    return Norm(Layer(channels), Standardize(eps, unbiased=True, inside=False), num_features=num_features)


def detached(num_features: int, *, eps: float = 1e-5, channels: str = "auto") -> ControlledNorm:
    """Make layer normalization whose statistics are constants in the backward pass."""
    operation = DetachedStandardize(eps, unbiased=True, inside=False)
    return ControlledNorm(Layer(channels), operation, num_features=num_features)


def clipped(
    num_features: int, *, tail: float = 0.1, eps: float = 1e-5, affine: bool = True, channels: str = "auto"
) -> Norm:
    """Make layer normalization of values whose extremes are clipped."""
    recovery = Affine() if affine else None
    return Norm(Layer(channels), ClippedStandardize(eps, tail=tail), recovery, num_features=num_features)


def _conditional(classes: int | None, style: int | None, hidden: int) -> Recovery:
    if (classes is None) == (style is None):
        raise ArgumentError(
            f"classes={classes!r} and style={style!r}: give the number of classes, or the length of a vector, not both."
        )
    return (
        Conditional(classes) if classes is not None else Modulated(style or 0, hidden, shared=False, shift=hidden > 0)
    )


def conditional_batch(
    num_features: int,
    *,
    classes: int | None = None,
    style: int | None = None,
    hidden: int = 0,
    unbiased: bool = True,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
) -> Norm:
    """Make batch normalization conditioned on classes or on a vector of length `style`."""
    population = Running(momentum, unbiased=unbiased)
    recovery = _conditional(classes, style, hidden)
    return Norm(Batch(), Standardize(eps), recovery, population, num_features=num_features)


def conditional_instance(num_features: int, *, classes: int, eps: float = 1e-5) -> Norm:
    """Make instance normalization conditioned on classes."""
    return Norm(Instance(), Standardize(eps), Conditional(classes), num_features=num_features)


def conditional_group(
    num_features: int,
    *,
    classes: int | None = None,
    style: int | None = None,
    hidden: int = 0,
    groups: int | None = None,
    eps: float = 1e-5,
) -> Norm:
    """Make group normalization conditioned on classes or on a vector of length `style`."""
    area = Group(largest_divisor(num_features, 32) if groups is None else groups)
    return Norm(area, Standardize(eps), _conditional(classes, style, hidden), num_features=num_features)


def dynamic_instance(num_features: int, *, style: int, kernel: int = 1, groups: int = 1, eps: float = 1e-5) -> Norm:
    """Make dynamic instance normalization for style vectors of length `style`."""
    recovery = DynamicConvolution(style, kernel, groups)
    return Norm(Instance(), Standardize(eps), recovery, num_features=num_features)


def adaptive_convolution(
    num_features: int, *, style: int, kernel: int = 3, groups: int = 1, eps: float = 1e-5
) -> AdaptiveConvolutionNorm:
    """Make adaptive convolution for style vectors of length `style`."""
    return AdaptiveConvolutionNorm(num_features, style, kernel, groups, eps)


def self_modulation(
    num_features: int, *, style: int, hidden: int = 32, eps: float = 1e-3, momentum: float | None = 1e-3
) -> Norm:
    """Make self-modulated batch normalization for vectors of length `style`."""
    recovery = Modulated(style, hidden)
    return Norm(Batch(), Standardize(eps), recovery, Running(momentum), num_features=num_features)


def sandwich(
    num_features: int, *, classes: int, separate: bool = False, eps: float = 1e-5, momentum: float | None = 0.1
) -> Normalization:
    """Make sandwich batch normalization, with statistics for each class if they are separate."""
    if separate:
        return SandwichBranchNorm(num_features, classes, eps, momentum)
    return Norm(Batch(), Standardize(eps), Sandwich(classes), Running(momentum), num_features=num_features)


def representative(
    num_features: int,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    centering: str = "mean",
    scaling: str = "mean",
) -> RepresentativeBatchNorm:
    """Make representative batch normalization."""
    return RepresentativeBatchNorm(num_features, eps, momentum, affine, centering, scaling)


def passport(
    num_features: int,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    reduction: int = 4,
    published: bool = False,
) -> PassportNorm:
    """Make passport-aware normalization."""
    return PassportNorm(num_features, eps, momentum, affine, reduction, published)


def selfnorm(num_features: int, *, both: bool = False, eps: float = 1e-12, momentum: float | None = 0.1) -> SelfNorm:
    """Make self normalization."""
    return SelfNorm(num_features, eps, momentum, both)


def crossnorm(num_features: int, *, probability: float = 0.5, eps: float = 1e-5) -> CrossNorm:
    """Make crossed instance statistics."""
    return CrossNorm(num_features, probability, eps)


def semantic(
    num_features: int,
    *,
    entities: int = 16,
    sampling: bool = True,
    temperature: float = 10.0,
    eps: float = 1e-5,
    affine: bool = True,
) -> SemanticNorm:
    """Make attentive normalization over soft regions."""
    return SemanticNorm(num_features, entities, sampling, temperature, eps, affine)
