"""Methods that differ in the recovery: conditional, adaptive, spatial, predicted from the input."""

from __future__ import annotations

import torch
from torch import Tensor

from normscope.norms.families import recoveries_make as make
from normscope.norms.row import Row, image, labelled, tokens


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
        make.dynamic_layer,
        ("recovery:dynamic-layer",),
        inputs=tokens,
        options=(("size", 5),),
    ),
    Row(
        "adaptive-instance",
        "S041",
        make.adaptive_instance,
        ("recovery:adaptive-instance",),
        ("adain",),
        inputs=styled_by_image,
    ),
    Row(
        "adaptive-layer-instance",
        "S042",
        make.layer_instance,
        ("recovery:adaptive-layer-instance", "layer:adaptive-layer-instance"),
        ("adalin", "iln"),
        ("instance and layer", "standardize", "affine, learned or given", "current"),
        ("iln",),
    ),
    Row(
        "instance-level-meta",
        "S043",
        make.instance_meta,
        ("recovery:instance-level-meta",),
        ("ilm",),
        keys=("ilm_gn",),
        options=(("groups", 4), ("keys", 4)),
    ),
    Row(
        "spatially-adaptive",
        "S044",
        make.spatially_adaptive,
        ("recovery:spatially-adaptive",),
        ("spade",),
        keys=("spade_instance", "spade_batch"),
        inputs=mapped,
        options=(("labels", 3), ("hidden", 4)),
    ),
    Row(
        "instance-enhancement",
        "S045",
        make.instance_enhancement,
        ("recovery:instance-enhancement",),
        ("iebn",),
        keys=("iebn",),
    ),
    Row(
        "attentive",
        "S046",
        make.attentive,
        ("recovery:attentive",),
        ("attentive-norm",),
        keys=("an_bn_mode0", "an_bn_mode2", "an_bn_mode4"),
        options=(("mixtures", 3),),
    ),
    Row("adanorm", "S047", make.adanorm, ("recovery:adanorm",), keys=("adanorm",), inputs=tokens),
    Row("simple-layer", "S047", make.simple, aliases=("layernorm-simple",), keys=("ln_simple_nowb",), inputs=tokens),
    Row("detached-layer", "S047", make.detached, aliases=("detachnorm",), keys=("ln_detach",), inputs=tokens),
    Row("clipped-layer", "S047", make.clipped, aliases=("layernorm-topk",), keys=("ln_topk",), inputs=tokens),
    Row(
        "conditional-batch",
        "S048",
        make.conditional_batch,
        ("recovery:conditional-batch",),
        ("ccbn",),
        inputs=labelled,
        options=(("classes", 3),),
    ),
    Row(
        "conditional-instance",
        "S049",
        make.conditional_instance,
        ("recovery:conditional-instance",),
        ("cin",),
        inputs=labelled,
        options=(("classes", 3),),
    ),
    Row(
        "conditional-group",
        "S203",
        make.conditional_group,
        ("recovery:conditional-group",),
        ("cgn",),
        inputs=labelled,
        options=(("classes", 3), ("groups", 4)),
    ),
    Row(
        "dynamic-instance",
        "S187",
        make.dynamic_instance,
        ("recovery:dynamic-instance",),
        ("din",),
        inputs=styled,
        options=(("style", 5), ("kernel", 3), ("groups", 2)),
    ),
    Row(
        "adaptive-convolution",
        "S194",
        make.adaptive_convolution,
        ("recovery:adaptive-convolution",),
        ("adacon",),
        ("patch of a channel", "standardize", "convolution from a style", "current"),
        inputs=styled,
        options=(("style", 5), ("groups", 2)),
    ),
    Row(
        "self-modulation",
        "S202",
        make.self_modulation,
        ("recovery:self-modulation",),
        inputs=styled,
        options=(("style", 5), ("hidden", 4)),
    ),
    Row(
        "associate",
        "S244",
        make.associate,
        ("recovery:associate", "layer:associate"),
        ("assocnorm",),
        options=(("groups", 4), ("hidden", 2)),
    ),
    Row(
        "sandwich",
        "S163",
        make.sandwich,
        ("layer:sandwich",),
        ("sabn",),
        inputs=labelled,
        options=(("classes", 3),),
    ),
    Row(
        "representative-batch",
        "S062",
        make.representative,
        ("layer:representative-batch",),
        ("rbn",),
        ("batch", "center, then standardize", "affine, calibrated", "running"),
        ("rbn",),
    ),
    Row(
        "passport-aware",
        "S243",
        make.passport,
        ("layer:passport-aware",),
        ("passport",),
        ("batch", "standardize", "affine, or from passports", "running per branch"),
        inputs=with_passports,
    ),
    Row(
        "attentive-semantic",
        "S196",
        make.semantic,
        ("layer:attentive-semantic",),
        parts=("soft regions of an instance", "standardize", "affine per region, residual", "current"),
        options=(("entities", 3),),
    ),
    Row(
        "self",
        "tang2021",
        make.selfnorm,
        aliases=("selfnorm",),
        parts=("instance", "scale", "gate from the statistics", "running of the gate"),
    ),
    Row(
        "crossed-instance",
        "tang2021",
        make.crossnorm,
        parts=("instance", "standardize", "statistics of another example", "current"),
        options=(("probability", 1.0),),
    ),
)
