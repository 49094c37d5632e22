"""Methods that whiten, over batch, groups or instances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.area import Batch, BatchGroup, Group
from normscope.norms.families.areas import largest_divisor
from normscope.norms.families.concepts import ConceptWhitening
from normscope.norms.families.decorrelation import (
    ChannelEquilibrium,
    DomainWhitening,
    GroupColoring,
    IsotropicBatchNorm,
    ShuffledWhitening,
)
from normscope.norms.layer import Norm, Normalization
from normscope.norms.operation import Standardize
from normscope.norms.part import Stats, known_features
from normscope.norms.population import Running
from normscope.norms.recovery import Affine, Coloring, Recovery, channels, mixed
from normscope.norms.row import Row, image
from normscope.norms.split import Split, in_groups
from normscope.norms.whiten import Whiten


def _affine(affine: bool) -> Recovery | None:
    return Affine() if affine else None


def _batch_whitening(
    num_features: int,
    operation: Whiten,
    recovery: Recovery | None,
    population: Running,
    group_size: int | None,
    groups: int | None,
) -> Normalization:
    def make(count: int, parts: int) -> Norm:
        return Norm(Batch(parts), operation, recovery, population, num_features=count)

    if groups is not None:
        return make(num_features, groups)
    return in_groups(num_features, group_size or num_features, make)


def _decorrelated(
    num_features: int,
    *,
    groups: int | None = None,
    group_size: int | None = 16,
    method: str = "zca",
    eps: float = 1e-3,
    momentum: float | None = 0.1,
    affine: bool = True,
    population: str = "matrix",
) -> Normalization:
    operation = Whiten(method, eps, population=population)
    return _batch_whitening(num_features, operation, _affine(affine), Running(momentum), group_size, groups)


def _iterative(
    num_features: int,
    *,
    groups: int | None = None,
    group_size: int | None = None,
    iterations: int = 5,
    coupled: bool = True,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    population: str = "matrix",
) -> Normalization:
    operation = Whiten("newton", eps, iterations=iterations, coupled=coupled, population=population)
    return _batch_whitening(num_features, operation, _affine(affine), Running(momentum), group_size, groups)


def _variants(
    num_features: int,
    *,
    method: str = "cholesky",
    groups: int | None = None,
    group_size: int | None = 16,
    eps: float | None = None,
    momentum: float | None = 0.1,
    affine: bool = True,
    population: str = "matrix",
) -> Normalization:
    ridge = (1e-5 if method == "newton" else 1e-3) if eps is None else eps
    operation = Whiten(method, ridge, population=population)
    return _batch_whitening(num_features, operation, _affine(affine), Running(momentum), group_size, groups)


def _group_whitening(
    num_features: int,
    *,
    groups: int | None = None,
    method: str = "newton",
    iterations: int = 5,
    eps: float | None = None,
    affine: bool = True,
) -> Norm:
    ridge = (0.0 if method == "newton" else 1e-5) if eps is None else eps
    area = Group(largest_divisor(num_features, 32) if groups is None else groups)
    return Norm(area, Whiten(method, ridge, iterations=iterations), _affine(affine), num_features=num_features)


@dataclass(frozen=True, repr=False)
class ClassColoring(Recovery):
    """Mix the channels by a matrix for all and one for the class of the example: (M + M_class) y + bias + bias_class.

    Attributes:
        classes: number of classes.
        kernels: the classes' matrices are combinations of so many, None for one each.
    """

    classes: int
    kernels: int | None = None
    condition: ClassVar[str] = "labels"

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register the matrices; the one for all is the identity at first, those of the classes are 0."""
        count = known_features(num_features, self)
        host.register_parameter("weight", nn.Parameter(torch.eye(count)))
        host.register_parameter("bias", nn.Parameter(torch.zeros(count)))
        number = self.classes if self.kernels is None else self.kernels
        host.register_parameter("class_weight", nn.Parameter(torch.zeros(number, count, count)))
        host.register_parameter("class_bias", nn.Parameter(torch.zeros(self.classes, count)))
        if self.kernels is not None:
            host.register_parameter("embedding", nn.Parameter(torch.randn(self.classes, self.kernels)))

    def apply(self, host: Any, y: Tensor, x: Tensor, axis: int, condition: Any) -> Tensor:
        """Mix the channels.

        Args:
            host: the layer.
            y: the whitened activation.
            x: the input.
            axis: the channel axis.
            condition: labels `(N,)`.

        Returns:
            The output.

        Raises:
            ArgumentError: no labels were given.
        """
        if not isinstance(condition, Tensor):
            raise ArgumentError(f"condition={condition!r}: {self!r} needs the labels (N,); call layer(x, labels).")
        if self.kernels is None:
            own = host.class_weight[condition]
        else:
            own = torch.einsum("nk,kij->nij", host.embedding[condition], host.class_weight)
        y = mixed(host.weight + own, y, axis)
        return y + channels(host.bias + host.class_bias[condition], y, axis)


@dataclass(frozen=True, repr=False)
class WhiteningRenorm(Running):
    """Training whitens by the stored covariance: W = W_stored stopgrad(W_batch)^-1 W_batch; the mean is the batch's."""

    def choose(self, host: Any, z: Tensor) -> Stats:
        """Return the corrected statistics in training, with what was stored before, and the stored ones else."""
        if not host.training:
            return self.stored(host, z)
        measured: Stats = host.measure(z)
        before = host.operation.chosen(self.stored(host, z)).clone()
        self.update(host, z, measured)
        matrix = measured["matrix"]
        return measured | {"matrix": before @ torch.linalg.solve(matrix.detach(), matrix)}


def _whitening_coloring(
    num_features: int,
    *,
    method: str = "cholesky",
    groups: int = 1,
    eps: float = 1e-3,
    momentum: float | None = 0.01,
    affine: bool = True,
    renorm: bool = False,
    classes: int | None = None,
    kernels: int | None = None,
    published: bool = False,
) -> Norm:
    # the published ZCA adds eps a second time
    operation = Whiten(method, eps if published else 0.0, eps, unbiased=True, population="covariance")
    coloring: Recovery = Coloring() if classes is None else ClassColoring(classes, kernels)
    population = WhiteningRenorm(momentum) if renorm else Running(momentum)
    return Norm(Batch(groups), operation, coloring if affine else None, population, num_features=num_features)


def _network_deconvolution(
    num_features: int,
    *,
    block: int = 64,
    eps: float = 1e-2,
    momentum: float | None = 0.1,
    iterations: int = 5,
    published: bool = False,
) -> Normalization:
    population = Running(momentum, first=True)
    size = min(block, num_features)
    operation = Whiten("newton", eps, iterations=iterations, divisor="frobenius", moment=published)
    whole = num_features // size * size
    first = Norm(BatchGroup(size), operation, None, population, num_features=whole)
    if whole == num_features:
        return first
    rest = num_features - whole
    single = Standardize(eps, unbiased=True)
    return Split(first, Norm(BatchGroup(1), single, None, population, num_features=rest))


def styled(num_features: int, generator: torch.Generator) -> tuple[Any, ...]:
    """Return images, and matrices of four groups and a shift for each."""
    (x,) = image(num_features, generator)
    size = num_features // 4
    s = torch.randn(len(x), 4, size, size, generator=generator, dtype=x.dtype)
    return x, (s, torch.randn(len(x), num_features, generator=generator, dtype=x.dtype))


def _equilibrium(
    num_features: int,
    *,
    group_size: int = 64,
    iterations: int = 3,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    reduction: int = 4,
    pooling: bool = False,
    published: bool = False,
) -> ChannelEquilibrium:
    return ChannelEquilibrium(num_features, group_size, iterations, eps, momentum, reduction, pooling, published)


def _concept(
    num_features: int,
    *,
    activation: str = "pool_max",
    iterations: int = 10,
    eps: float = 1e-5,
    momentum: float = 0.05,
    affine: bool = False,
    published: bool = False,
) -> ConceptWhitening:
    return ConceptWhitening(num_features, activation, iterations, eps, momentum, affine, published)


def _isotropic(
    num_features: int, *, beta: float = 0.5, eps: float = 1e-3, momentum: float | None = 0.05
) -> IsotropicBatchNorm:
    return IsotropicBatchNorm(num_features, beta, eps, momentum)


def _shuffled(num_features: int, *, groups: int = 4, eps: float = 1e-5, affine: bool = False) -> ShuffledWhitening:
    return ShuffledWhitening(num_features, groups, eps, affine)


def _domains(
    num_features: int,
    *,
    domains: int = 2,
    group_size: int = 4,
    eps: float = 1e-3,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> DomainWhitening:
    return DomainWhitening(num_features, domains, group_size, eps, momentum, affine)


def _group_coloring(num_features: int, *, groups: int = 4, alpha: float = 0.6, eps: float = 1e-5) -> GroupColoring:
    return GroupColoring(num_features, groups, alpha, eps)


ROWS: tuple[Row, ...] = (
    Row(
        "decorrelated-batch",
        "S020",
        _decorrelated,
        ("layer:decorrelated-batch",),
        ("dbn",),
        keys=("dbn_zca",),
        options=(("group_size", 4),),
    ),
    Row("iterative", "S021", _iterative, ("layer:iterative",), ("iternorm",), keys=("iternorm_T5", "iternorm_g2")),
    Row(
        "whitening-coloring",
        "S022",
        _whitening_coloring,
        ("layer:whitening-coloring", "recovery:coloring"),
        ("coloring", "wc"),
        keys=("wc_cholesky", "wc_zca"),
    ),
    Row(
        "batch-whitening-variants",
        "S023",
        _variants,
        ("layer:batch-whitening-variants",),
        ("bw",),
        keys=("sbw_cd",),
        options=(("group_size", 4),),
    ),
    Row(
        "group-whitening",
        "S153",
        _group_whitening,
        ("layer:group-whitening",),
        ("gw",),
        keys=("gw_itn",),
        options=(("groups", 4),),
    ),
    Row(
        "network-deconvolution",
        "S024",
        _network_deconvolution,
        ("layer:network-deconvolution",),
        ("deconv",),
        keys=("chdeconv", "fastdeconv_k3", "delinear"),
        options=(("block", 4),),
    ),
    Row(
        "channel-equilibrium",
        "S025",
        _equilibrium,
        ("layer:channel-equilibrium",),
        ("ce",),
        ("batch and instance", "whiten and scale", "gated mixture", "running"),
        ("ce",),
    ),
    Row(
        "concept-whitening",
        "S026",
        _concept,
        ("layer:concept-whitening",),
        ("cw",),
        ("batch", "whiten", "rotation by concepts", "running"),
        ("cw_none", "cw_mean"),
    ),
    Row(
        "isotropic-batch",
        "S027",
        _isotropic,
        ("layer:isotropic-batch",),
        ("isobn",),
        ("batch", "scale by correlation", "bare", "running in training too"),
    ),
    Row(
        "shuffled-decorrelated",
        "S230",
        _shuffled,
        ("layer:shuffled-decorrelated",),
        ("shuffled-dbn",),
        ("batch, random groups", "whiten", "bare", "current"),
    ),
    Row(
        "domain-whitening",
        "S160",
        _domains,
        ("layer:domain-whitening",),
        ("dwt",),
        ("batch of a domain", "whiten", "affine", "running"),
        options=(("domains", 2),),
    ),
    Row(
        "groupwise-whitening-coloring",
        "S193",
        _group_coloring,
        ("layer:groupwise-whitening-coloring",),
        ("gdwct",),
        ("batch", "center", "coloring by style", "current"),
        inputs=styled,
    ),
)
