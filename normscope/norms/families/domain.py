"""Methods for several domains, tasks, widths or roles: statistics of each, or shared in part."""

from __future__ import annotations

import torch
from torch import Tensor

from normscope.norms.families.domain_borrowed import AdversarialStatisticsNorm, BorrowingNorm, PopArt
from normscope.norms.families.domain_branches import DomainAgnosticNorm, DomainNorm, SwitchableWidthNorm
from normscope.norms.families.domain_moments import AutoDial, DomainOptimizedNorm, GatedBatchNorm
from normscope.norms.families.domain_shared import (
    DomainInvariantNorm,
    FineGrainedNorm,
    MetaNorm,
    SeparableNorm,
    TransferableNorm,
)
from normscope.norms.row import Row, image


def _autodial(
    num_features: int,
    *,
    init: float = 1.0,
    eps: float = 1e-5,
    momentum: float | None = 0.001,
    affine: bool = True,
) -> AutoDial:
    return AutoDial(num_features, eps, momentum, affine, init)


def _specific(
    num_features: int,
    *,
    domains: int = 2,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> DomainNorm:
    return DomainNorm(num_features, domains, None, eps, momentum, affine)


def _dual(
    num_features: int,
    *,
    branches: int = 2,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> DomainNorm:
    return DomainNorm(num_features, branches, 0, eps, momentum, affine)


def _agnostic(
    num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True
) -> DomainAgnosticNorm:
    return DomainAgnosticNorm(num_features, eps, momentum, affine)


def _transferable(
    num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True
) -> TransferableNorm:
    return TransferableNorm(num_features, eps, momentum, affine)


def _optimized(
    num_features: int,
    *,
    domains: int = 2,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> DomainOptimizedNorm:
    return DomainOptimizedNorm(num_features, domains, eps, momentum, affine)


def _adversarial(num_features: int, *, bound: float = 1.1) -> AdversarialStatisticsNorm:
    return AdversarialStatisticsNorm(num_features, bound)


def _gated(
    num_features: int,
    *,
    domains: int = 2,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> GatedBatchNorm:
    return GatedBatchNorm(num_features, domains, eps, momentum, affine)


def _invariant(num_features: int, *, eps: float = 1e-5, affine: bool = True) -> DomainInvariantNorm:
    return DomainInvariantNorm(num_features, eps, affine)


def _separable(num_features: int, *, maps: int = 2, eps: float = 1e-5, momentum: float | None = 0.1) -> SeparableNorm:
    return SeparableNorm(num_features, maps, eps, momentum)


def _width(
    num_features: int,
    *,
    widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0),
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> SwitchableWidthNorm:
    return SwitchableWidthNorm(num_features, widths, eps, momentum, affine)


def _fine_grained(
    num_features: int,
    *,
    parts: int = 2,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> FineGrainedNorm:
    return FineGrainedNorm(num_features, parts, eps, momentum, affine)


def _meta(num_features: int, *, hidden: int = 64, eps: float = 1e-5, affine: bool = True) -> MetaNorm:
    return MetaNorm(num_features, hidden, eps, affine)


def _pop_art(
    num_features: int,
    *,
    momentum: float | None = 3e-4,
    smallest: float = 1e-4,
    largest: float = 1e6,
) -> PopArt:
    return PopArt(num_features, momentum, smallest, largest)


def _cross(
    num_features: int,
    *,
    share: float = 0.5,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> BorrowingNorm:
    return BorrowingNorm(num_features, share, eps, momentum, affine)


def _unsupervised(
    num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True
) -> BorrowingNorm:
    return BorrowingNorm(num_features, 0.0, eps, momentum, affine)


def _two_domains(num_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return *image(num_features, generator), torch.arange(6) % 2


def _two_batches(num_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return *image(num_features, generator), *image(num_features, generator)


ROWS: tuple[Row, ...] = (
    Row(
        "domain-specific",
        "S157",
        _specific,
        ("layer:domain-specific",),
        ("dsbn",),
        ("batch of a domain", "standardize", "affine per domain", "running per domain"),
        ("dsbn",),
        inputs=_two_domains,
    ),
    Row(
        "dual-batch",
        "S159",
        _dual,
        ("layer:dual-batch",),
        ("auxiliary-batch",),
        ("batch of a role", "standardize", "affine per role", "running per role"),
        ("aux_bn",),
        inputs=_two_domains,
    ),
    Row(
        "mixture-batch",
        "S241",
        _dual,
        ("layer:mixture-batch",),
        (),
        ("batch of a role", "standardize", "affine per role", "running per role"),
        inputs=_two_domains,
    ),
    Row(
        "transferable",
        "S161",
        _transferable,
        ("layer:transferable",),
        ("transnorm",),
        ("half of the batch", "standardize", "affine, channels weighted", "running per domain"),
    ),
    Row(
        "autodial",
        "S156",
        _autodial,
        ("layer:autodial",),
        (),
        ("both domains, mixed", "standardize", "affine", "running per domain"),
        inputs=_two_domains,
    ),
    Row(
        "domain-agnostic",
        "S158",
        _agnostic,
        ("layer:domain-agnostic",),
        (),
        ("source examples", "standardize", "affine", "running"),
        inputs=_two_domains,
    ),
    Row(
        "domain-optimized",
        "S162",
        _optimized,
        ("layer:domain-optimized",),
        ("dson",),
        ("batch of a domain and instance", "standardize", "affine per domain", "running per domain"),
        inputs=_two_domains,
    ),
    Row(
        "adversarial-statistics",
        "S164",
        _adversarial,
        ("layer:adversarial-statistics",),
        (),
        ("batch", "move", "bare", "current"),
    ),
    Row(
        "gated-batch",
        "S172",
        _gated,
        ("layer:gated-batch",),
        (),
        ("batch of a domain", "standardize, gated", "affine", "running per domain"),
        inputs=_two_domains,
    ),
    Row(
        "domain-invariant",
        "S176",
        _invariant,
        ("layer:domain-invariant",),
        (),
        ("instance, then position", "standardize, then length", "affine", "current"),
    ),
    Row(
        "separable-batch",
        "S177",
        _separable,
        ("layer:separable-batch",),
        (),
        ("batch", "standardize", "several affine, by attention", "running"),
    ),
    Row(
        "switchable-width-batch",
        "S207",
        _width,
        ("layer:switchable-width-batch",),
        ("slimmable",),
        ("batch", "standardize", "affine per width", "running per width"),
    ),
    Row(
        "fine-grained-batch",
        "S208",
        _fine_grained,
        ("layer:fine-grained-batch",),
        (),
        ("batch of partial sums", "standardize", "affine per part", "running"),
    ),
    Row(
        "meta",
        "S222",
        _meta,
        ("layer:meta",),
        ("metanorm",),
        ("support set", "standardize, inferred", "affine", "last support set"),
    ),
    Row(
        "pop-art",
        "S223",
        _pop_art,
        ("layer:pop-art",),
        ("popart",),
        ("targets", "scale back", "affine, preserving", "running"),
    ),
    Row(
        "cross",
        "S224",
        _cross,
        ("layer:cross",),
        (),
        ("two batches", "standardize", "affine", "running"),
        inputs=_two_batches,
    ),
    Row(
        "unsupervised-batch",
        "S227",
        _unsupervised,
        ("layer:unsupervised-batch",),
        (),
        ("another batch", "standardize", "affine", "running"),
        inputs=_two_batches,
    ),
)
