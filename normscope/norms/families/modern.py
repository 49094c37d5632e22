"""Methods of later years that well-known models use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normscope.norms.area import Layer
from normscope.norms.families.modern_layers import (
    DeepNorm,
    FilterResponseNorm,
    GatedNorm,
    GlobalResponseNorm,
    HypersphereNorm,
    SandwichLayer,
)
from normscope.norms.families.modern_parts import (
    DepthScaled,
    Gain,
    HeadAffine,
    Heads,
    LayerScale,
    Saturating,
    SelfRescaled,
    UnitLength,
)
from normscope.norms.families.recoveries_condition import Modulated
from normscope.norms.layer import Norm
from normscope.norms.operation import RMS, Identity, Operation, Standardize
from normscope.norms.part import require
from normscope.norms.recovery import Affine, Recovery
from normscope.norms.row import Row, tokens

KINDS = ("rms", "layer")


def _filter_response(
    num_features: int,
    *,
    eps: float = 1e-6,
    affine: bool = True,
    threshold: bool = True,
    learn_eps: bool = False,
) -> FilterResponseNorm:
    return FilterResponseNorm(num_features, eps, affine, threshold, learn_eps)


def _query_key(num_features: int, *, heads: int = 1, kind: str = "rms", eps: float = 1e-6, affine: bool = True) -> Norm:
    require(kind, "kind", (*KINDS, "length"))
    if kind == "length":
        # queries and keys share the logit's scale: the product of both gains stands for sqrt(C / heads)
        gain = Gain((num_features / heads) ** 0.25) if affine else None
        return Norm(Heads(heads), UnitLength(eps), gain, num_features=num_features)
    recovery = HeadAffine(heads, kind == "layer") if affine else None
    operation = RMS(eps) if kind == "rms" else Standardize(eps)
    return Norm(Heads(heads), operation, recovery, num_features=num_features)


def _per_head(
    num_features: int, *, heads: int = 1, kind: str = "layer", eps: float = 1e-5, affine: bool = True
) -> Norm:
    require(kind, "kind", KINDS)
    operation: Operation = Standardize(eps) if kind == "layer" else RMS(eps)
    recovery: Recovery | None = Affine(shift=kind == "layer") if affine else None
    return Norm(Heads(heads), operation, recovery, num_features=num_features)


def _scale(num_features: int, *, eps: float = 1e-5, init: float | None = None, channels: str = "auto") -> Norm:
    gain = Gain(math.sqrt(num_features) if init is None else init)
    return Norm(Layer(channels), UnitLength(eps), gain, num_features=num_features)


def _deep(
    num_features: int,
    *,
    depth: int = 12,
    alpha: float | None = None,
    kind: str = "layer",
    eps: float = 1e-5,
    affine: bool = True,
) -> DeepNorm:
    return DeepNorm(num_features, depth, alpha, kind, eps, affine)


def _depth_scaled(num_features: int, *, depth: int = 1, kind: str = "rms", eps: float = 1e-5) -> Norm:
    require(kind, "kind", KINDS)
    operation: Operation = Standardize(eps) if kind == "layer" else RMS(eps)
    recovery = DepthScaled(shift=kind == "layer", depth=depth)
    return Norm(Layer("last"), operation, recovery, num_features=num_features)


def _simple_rms(num_features: int, *, eps: float = 1e-6, channels: str = "auto") -> Norm:
    return Norm(Layer(channels), RMS(eps), num_features=num_features)


def _self_rescaled(num_features: int, *, eps: float = 1e-6, channels: str = "auto") -> Norm:
    return Norm(Layer(channels), RMS(eps), SelfRescaled(), num_features=num_features)


def _hypersphere(
    num_features: int, *, init: float = 0.05, scale: float | None = None, eps: float = 1e-5
) -> HypersphereNorm:
    return HypersphereNorm(num_features, init, scale, eps)


def _sandwich(
    num_features: int, *, branch: nn.Module | None = None, kind: str = "layer", eps: float = 1e-5, affine: bool = True
) -> SandwichLayer:
    return SandwichLayer(num_features, branch, kind, eps, affine)


def _peri(
    num_features: int, *, branch: nn.Module | None = None, kind: str = "rms", eps: float = 1e-6, affine: bool = True
) -> SandwichLayer:
    return SandwichLayer(num_features, branch, kind, eps, affine)


def _layer_scale(num_features: int, *, init: float = 1e-5, channels: str = "auto") -> Norm:
    return Norm(Layer(channels), Identity(), LayerScale(init=init), num_features=num_features)


def _dynamic_tanh(num_features: int, *, alpha: float = 0.5, channels: str = "auto") -> Norm:
    return Norm(Layer(channels), Identity(), Saturating("tanh", alpha), num_features=num_features)


def _dynamic_erf(num_features: int, *, alpha: float = 0.5, channels: str = "auto") -> Norm:
    return Norm(Layer(channels), Identity(), Saturating("erf", alpha), num_features=num_features)


def _global_response(num_features: int, *, eps: float = 1e-6, channels: str = "auto") -> GlobalResponseNorm:
    return GlobalResponseNorm(num_features, eps, channels)


def _adaptive_layer(
    num_features: int, *, style: int, kind: str = "layer", eps: float = 1e-6, channels: str = "auto"
) -> Norm:
    require(kind, "kind", KINDS)
    operation: Operation = Standardize(eps) if kind == "layer" else RMS(eps)
    return Norm(Layer(channels), operation, Modulated(style, std=0.0, silu=True), num_features=num_features)


def _gated(
    num_features: int,
    *,
    kind: str = "rms",
    groups: int = 1,
    eps: float = 1e-5,
    affine: bool = True,
    before: bool = False,
) -> GatedNorm:
    return GatedNorm(num_features, kind, groups, eps, affine, before)


def two_tokens(num_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return two small batches of sequences, the second for a branch or a gate."""
    (x,) = tokens(num_features, generator)
    return x, torch.randn(x.shape, generator=generator, dtype=x.dtype)


def styled_tokens(num_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a small batch of sequences and a vector of length 5 for each."""
    (x,) = tokens(num_features, generator)
    return x, torch.randn(x.shape[0], 5, generator=generator, dtype=x.dtype)


ROWS: tuple[Row, ...] = (
    Row(
        "filter-response",
        "singh2020",
        _filter_response,
        aliases=("frn",),
        parts=("instance", "root mean square", "affine, thresholded", "current"),
        keys=("frn_gupta", "timm_frn_tlu", "timm_frn_act"),
    ),
    Row("query-key", "henry2020", _query_key, aliases=("qk", "qk-norm"), inputs=tokens, options=(("heads", 2),)),
    Row(
        "per-head-group",
        "sun2023",
        _per_head,
        aliases=("head-group", "multi-head"),
        inputs=tokens,
        options=(("heads", 2),),
    ),
    Row("scale", "nguyen2019", _scale, aliases=("scalenorm",), inputs=tokens),
    Row(
        "deep",
        "wang2022",
        _deep,
        aliases=("deepnorm",),
        parts=("token", "standardize", "affine", "current"),
        inputs=two_tokens,
    ),
    Row(
        "sandwich-layer",
        "ding2021",
        _sandwich,
        aliases=("sandwich-ln",),
        parts=("token, before and after a branch", "standardize", "affine", "current"),
        inputs=tokens,
    ),
    Row(
        "peri-layer",
        "kim2025",
        _peri,
        aliases=("peri-ln",),
        parts=("token, before and after a branch", "root mean square", "affine", "current"),
        inputs=tokens,
    ),
    Row("layer-scale", "touvron2021", _layer_scale, aliases=("layerscale",), inputs=tokens),
    Row("dynamic-tanh", "zhu2025", _dynamic_tanh, aliases=("dyt",), inputs=tokens),
    Row("dynamic-erf", "chen2025", _dynamic_erf, aliases=("derf",), inputs=tokens),
    Row(
        "global-response",
        "woo2023",
        _global_response,
        aliases=("grn",),
        parts=("channel of an instance", "divide by the mean norm", "affine, residual", "current"),
    ),
    Row(
        "adaptive-layer",
        "peebles2022",
        _adaptive_layer,
        aliases=("adaln",),
        inputs=styled_tokens,
        options=(("style", 5),),
    ),
    Row(
        "gated-rms",
        "dao2024",
        _gated,
        aliases=("gated",),
        parts=("token", "gate, then root mean square", "affine", "current"),
        inputs=two_tokens,
    ),
    Row("simple-rms", "qin2023", _simple_rms, aliases=("srms",), inputs=tokens),
    Row("depth-scaled", "sun2025", _depth_scaled, aliases=("lns",), inputs=tokens, options=(("depth", 4),)),
    Row("self-rescaled", "cai2025", _self_rescaled, aliases=("seednorm",), inputs=tokens),
    Row(
        "hypersphere",
        "loshchilov2024",
        _hypersphere,
        aliases=("ngpt",),
        parts=("token", "unit length", "step towards a branch", "current"),
        inputs=two_tokens,
    ),
)
