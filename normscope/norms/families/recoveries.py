"""Methods that differ in the recovery: conditional, adaptive, spatial, predicted from the input."""

from __future__ import annotations

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.norms.area import Area, Batch, Group, Instance, Layer
from normscope.norms.families.areas import largest_divisor
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
    PassportNorm,
    RepresentativeBatchNorm,
    SelfNorm,
)
from normscope.norms.families.recoveries_semantic import SemanticNorm
from normscope.norms.layer import Norm
from normscope.norms.operation import Standardize
from normscope.norms.part import require
from normscope.norms.population import Current, Population, Running
from normscope.norms.recovery import Affine, Conditional, Recovery
from normscope.norms.row import Row, image, labelled, tokens


def _dynamic_layer(
    num_features: int, *, size: int = 64, features: int = 0, eps: float = 1e-5, channels: str = "auto"
) -> Norm:
    return Norm(Layer(channels), Standardize(eps), Utterance(size, features), num_features=num_features)


def _adaptive_instance(
    num_features: int,
    *,
    style: int | None = None,
    equalized: bool = True,
    eps: float = 1e-5,
    unbiased: bool | None = None,
) -> Norm:
    recovery = StyleStatistics(eps) if style is None else Modulated(style, equalized=equalized)
    operation = Standardize(eps, style is None if unbiased is None else unbiased)
    return Norm(Instance(), operation, recovery, num_features=num_features)


def _layer_instance(
    num_features: int,
    *,
    adaptive: bool = False,
    eps: float = 1e-5,
    affine: bool = True,
    rho: float | None = None,
    unbiased: bool = True,
    smooth: float = 0.0,
) -> LayerInstanceNorm:
    return LayerInstanceNorm(num_features, adaptive, eps, affine, rho, unbiased, smooth)


BASES = ("group", "instance", "layer")


def _instance_meta(
    num_features: int,
    *,
    base: str = "group",
    groups: int | None = None,
    keys: int | None = None,
    hidden: int | None = None,
    eps: float = 1e-5,
) -> Norm:
    require(base, "base", BASES)
    count = largest_divisor(num_features, 32) if groups is None else groups
    area: Area = {"group": Group(count), "instance": Instance(), "layer": Layer("first")}[base]
    # groups of 16 channels, as published, where they fit
    number = largest_divisor(num_features, max(num_features // 16, 1)) if keys is None else keys
    few = number < 16 or (number == 16 and base != "group")
    recovery = InstanceMeta(number, (2 if few else number // 16) if hidden is None else hidden)
    return Norm(area, Standardize(eps, unbiased=True), recovery, num_features=num_features)


def _associate(
    num_features: int, *, base: str = "group", groups: int | None = None, hidden: int | None = None, eps: float = 1e-5
) -> Norm:
    require(base, "base", BASES[:2])
    count = largest_divisor(num_features, 32) if groups is None else groups
    number = num_features if base == "instance" else count
    recovery = InstanceMeta(number, max(number // 16, 1) if hidden is None else hidden, unbiased=False, crossed=True)
    return Norm(Group(number), Standardize(eps), recovery, num_features=num_features)


def _base(norm: str, momentum: float | None) -> tuple[Area, Population]:
    require(norm, "norm", ("batch", "instance"))
    return (Batch(), Running(momentum)) if norm == "batch" else (Instance(), Current())


def _spatially_adaptive(
    num_features: int,
    *,
    labels: int,
    norm: str = "batch",
    hidden: int = 128,
    kernel: int = 3,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
) -> Norm:
    area, population = _base(norm, momentum)
    recovery = SpatiallyAdaptive(labels, hidden, kernel)
    return Norm(area, Standardize(eps), recovery, population, num_features=num_features)


def _instance_enhancement(num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1) -> Norm:
    return Norm(Batch(), Standardize(eps), InstanceEnhancement(), Running(momentum), num_features=num_features)


def _attentive(
    num_features: int,
    *,
    mixtures: int = 10,
    attention: str | None = None,
    groups: int | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
) -> Norm:
    kind = ("bn-hsigmoid" if groups is None else "hsigmoid") if attention is None else attention
    require(kind, "attention", ATTENTIONS)
    if groups is None:
        return Norm(Batch(), Standardize(eps), Attentive(mixtures, kind), Running(momentum), num_features=num_features)
    if ATTENTIONS[kind][1]:
        free = [name for name, (_, normalized, _) in ATTENTIONS.items() if not normalized]
        raise ArgumentError(f"attention={kind!r} takes batch statistics, groups={groups} does not; try one of {free}.")
    return Norm(Group(groups), Standardize(eps), Attentive(mixtures, kind), num_features=num_features)


def _adanorm(
    num_features: int, *, scale: float = 1.0, slope: float = 0.1, eps: float = 1e-5, channels: str = "auto"
) -> ControlledNorm:
    operation = Standardize(eps, unbiased=True, inside=False)
    return ControlledNorm(Layer(channels), operation, Adaptive(scale, slope), num_features=num_features)


def _simple(num_features: int, *, eps: float = 1e-5, channels: str = "auto") -> Norm:
    return Norm(Layer(channels), Standardize(eps, unbiased=True, inside=False), num_features=num_features)


def _detached(num_features: int, *, eps: float = 1e-5, channels: str = "auto") -> ControlledNorm:
    operation = DetachedStandardize(eps, unbiased=True, inside=False)
    return ControlledNorm(Layer(channels), operation, num_features=num_features)


def _clipped(
    num_features: int, *, tail: float = 0.1, eps: float = 1e-5, affine: bool = True, channels: str = "auto"
) -> Norm:
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


def _conditional_batch(
    num_features: int,
    *,
    classes: int | None = None,
    style: int | None = None,
    hidden: int = 0,
    unbiased: bool = True,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
) -> Norm:
    population = Running(momentum, unbiased=unbiased)
    recovery = _conditional(classes, style, hidden)
    return Norm(Batch(), Standardize(eps), recovery, population, num_features=num_features)


def _conditional_instance(num_features: int, *, classes: int, eps: float = 1e-5) -> Norm:
    return Norm(Instance(), Standardize(eps), Conditional(classes), num_features=num_features)


def _conditional_group(
    num_features: int,
    *,
    classes: int | None = None,
    style: int | None = None,
    hidden: int = 0,
    groups: int | None = None,
    eps: float = 1e-5,
) -> Norm:
    area = Group(largest_divisor(num_features, 32) if groups is None else groups)
    return Norm(area, Standardize(eps), _conditional(classes, style, hidden), num_features=num_features)


def _dynamic_instance(num_features: int, *, style: int, kernel: int = 1, groups: int = 1, eps: float = 1e-5) -> Norm:
    recovery = DynamicConvolution(style, kernel, groups)
    return Norm(Instance(), Standardize(eps), recovery, num_features=num_features)


def _adaptive_convolution(
    num_features: int, *, style: int, kernel: int = 3, groups: int = 1, eps: float = 1e-5
) -> AdaptiveConvolutionNorm:
    return AdaptiveConvolutionNorm(num_features, style, kernel, groups, eps)


def _self_modulation(
    num_features: int, *, style: int, hidden: int = 32, eps: float = 1e-3, momentum: float | None = 1e-3
) -> Norm:
    recovery = Modulated(style, hidden)
    return Norm(Batch(), Standardize(eps), recovery, Running(momentum), num_features=num_features)


def _sandwich(num_features: int, *, classes: int, eps: float = 1e-5, momentum: float | None = 0.1) -> Norm:
    return Norm(Batch(), Standardize(eps), Sandwich(classes), Running(momentum), num_features=num_features)


def _representative(
    num_features: int,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    centering: str = "mean",
    scaling: str = "mean",
) -> RepresentativeBatchNorm:
    return RepresentativeBatchNorm(num_features, eps, momentum, affine, centering, scaling)


def _passport(
    num_features: int,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    reduction: int = 4,
    published: bool = False,
) -> PassportNorm:
    return PassportNorm(num_features, eps, momentum, affine, reduction, published)


def _selfnorm(num_features: int, *, both: bool = False, eps: float = 1e-12, momentum: float | None = 0.1) -> SelfNorm:
    return SelfNorm(num_features, eps, momentum, both)


def _crossnorm(num_features: int, *, probability: float = 0.5, eps: float = 1e-5) -> CrossNorm:
    return CrossNorm(num_features, probability, eps)


def _semantic(
    num_features: int,
    *,
    entities: int = 16,
    sampling: bool = True,
    temperature: float = 10.0,
    eps: float = 1e-5,
    affine: bool = True,
) -> SemanticNorm:
    return SemanticNorm(num_features, entities, sampling, temperature, eps, affine)


def styled_by_image(num_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images and an image as the style of each."""
    (x,) = image(num_features, generator)
    return x, torch.randn(x.shape[0], num_features, 3, 3, generator=generator, dtype=x.dtype)


def styled(num_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images and a style vector of length 5 for each."""
    (x,) = image(num_features, generator)
    return x, torch.randn(x.shape[0], 5, generator=generator, dtype=x.dtype)


def mapped(num_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images and a map of 3 labels for each."""
    (x,) = image(num_features, generator)
    return x, torch.randn(x.shape[0], 3, 8, 10, generator=generator, dtype=x.dtype)


def with_passports(num_features: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Return images, two passports, and which examples take the branch with passports."""
    (x,) = image(num_features, generator)
    first, second = torch.randn(2, 2, num_features, 3, 3, generator=generator, dtype=x.dtype)
    return x, (first, second), torch.arange(x.shape[0]) % 2 == 0


ROWS: tuple[Row, ...] = (
    Row(
        "dynamic-layer",
        "S040",
        _dynamic_layer,
        ("recovery:dynamic-layer",),
        inputs=tokens,
        options=(("size", 5),),
    ),
    Row(
        "adaptive-instance",
        "S041",
        _adaptive_instance,
        ("recovery:adaptive-instance",),
        ("adain",),
        inputs=styled_by_image,
    ),
    Row(
        "adaptive-layer-instance",
        "S042",
        _layer_instance,
        ("recovery:adaptive-layer-instance", "layer:adaptive-layer-instance"),
        ("adalin", "iln"),
        ("instance and layer", "standardize", "affine, learned or given", "current"),
        ("iln",),
    ),
    Row(
        "instance-level-meta",
        "S043",
        _instance_meta,
        ("recovery:instance-level-meta",),
        ("ilm",),
        keys=("ilm_gn",),
        options=(("groups", 4), ("keys", 4)),
    ),
    Row(
        "spatially-adaptive",
        "S044",
        _spatially_adaptive,
        ("recovery:spatially-adaptive",),
        ("spade",),
        keys=("spade_instance", "spade_batch"),
        inputs=mapped,
        options=(("labels", 3), ("hidden", 4)),
    ),
    Row(
        "instance-enhancement",
        "S045",
        _instance_enhancement,
        ("recovery:instance-enhancement",),
        ("iebn",),
        keys=("iebn",),
    ),
    Row(
        "attentive",
        "S046",
        _attentive,
        ("recovery:attentive",),
        ("attentive-norm",),
        keys=("an_bn_mode0", "an_bn_mode2", "an_bn_mode4"),
        options=(("mixtures", 3),),
    ),
    Row("adanorm", "S047", _adanorm, ("recovery:adanorm",), keys=("adanorm",), inputs=tokens),
    Row("simple-layer", "S047", _simple, aliases=("layernorm-simple",), keys=("ln_simple_nowb",), inputs=tokens),
    Row("detached-layer", "S047", _detached, aliases=("detachnorm",), keys=("ln_detach",), inputs=tokens),
    Row("clipped-layer", "S047", _clipped, aliases=("layernorm-topk",), keys=("ln_topk",), inputs=tokens),
    Row(
        "conditional-batch",
        "S048",
        _conditional_batch,
        ("recovery:conditional-batch",),
        ("ccbn",),
        inputs=labelled,
        options=(("classes", 3),),
    ),
    Row(
        "conditional-instance",
        "S049",
        _conditional_instance,
        ("recovery:conditional-instance",),
        ("cin",),
        inputs=labelled,
        options=(("classes", 3),),
    ),
    Row(
        "conditional-group",
        "S203",
        _conditional_group,
        ("recovery:conditional-group",),
        ("cgn",),
        inputs=labelled,
        options=(("classes", 3), ("groups", 4)),
    ),
    Row(
        "dynamic-instance",
        "S187",
        _dynamic_instance,
        ("recovery:dynamic-instance",),
        ("din",),
        inputs=styled,
        options=(("style", 5), ("kernel", 3), ("groups", 2)),
    ),
    Row(
        "adaptive-convolution",
        "S194",
        _adaptive_convolution,
        ("recovery:adaptive-convolution",),
        ("adacon",),
        ("patch of a channel", "standardize", "convolution from a style", "current"),
        inputs=styled,
        options=(("style", 5), ("groups", 2)),
    ),
    Row(
        "self-modulation",
        "S202",
        _self_modulation,
        ("recovery:self-modulation",),
        inputs=styled,
        options=(("style", 5), ("hidden", 4)),
    ),
    Row(
        "associate",
        "S244",
        _associate,
        ("recovery:associate", "layer:associate"),
        ("assocnorm",),
        options=(("groups", 4), ("hidden", 2)),
    ),
    Row(
        "sandwich",
        "S163",
        _sandwich,
        ("layer:sandwich",),
        ("sabn",),
        inputs=labelled,
        options=(("classes", 3),),
    ),
    Row(
        "representative-batch",
        "S062",
        _representative,
        ("layer:representative-batch",),
        ("rbn",),
        ("batch", "center, then standardize", "affine, calibrated", "running"),
        ("rbn",),
    ),
    Row(
        "passport-aware",
        "S243",
        _passport,
        ("layer:passport-aware",),
        ("passport",),
        ("batch", "standardize", "affine, or from passports", "running per branch"),
        inputs=with_passports,
    ),
    Row(
        "attentive-semantic",
        "S196",
        _semantic,
        ("layer:attentive-semantic",),
        parts=("soft regions of an instance", "standardize", "affine per region, residual", "current"),
        options=(("entities", 3),),
    ),
    Row(
        "self",
        "S046",
        _selfnorm,
        aliases=("selfnorm",),
        parts=("instance", "scale", "gate from the statistics", "running of the gate"),
    ),
    Row(
        "crossed-instance",
        "S046",
        _crossnorm,
        parts=("instance", "standardize", "statistics of another example", "current"),
        options=(("probability", 1.0),),
    ),
)
