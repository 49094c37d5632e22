"""Methods that mix several statistics, modes or normalizations, weighted by parameters or by the input."""

from __future__ import annotations

from normscope.norms.area import Batch, Instance
from normscope.norms.families.areas import largest_divisor
from normscope.norms.families.mixtures_evonorm import EvoNorm
from normscope.norms.families.mixtures_modes import DynamicNorm, ExemplarNorm, MixtureNorm, ModeNorm
from normscope.norms.families.mixtures_pairs import BatchChannelNorm, BatchInstanceNorm, InvariantNorm, TaskNorm
from normscope.norms.families.mixtures_switchable import KINDS, SparseSwitchableNorm, SwitchableNorm
from normscope.norms.families.mixtures_whitening import SwitchableWhitening
from normscope.norms.layer import Norm
from normscope.norms.operation import Standardize
from normscope.norms.population import Running
from normscope.norms.recovery import Affine
from normscope.norms.row import Row
from normscope.norms.split import Split


def _mixture(
    num_features: int,
    *,
    components: int = 2,
    iterations: int = 3,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> MixtureNorm:
    return MixtureNorm(num_features, components, iterations, eps, momentum, affine)


def _mode(
    num_features: int,
    *,
    modes: int = 2,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> ModeNorm:
    return ModeNorm(num_features, modes, eps, momentum, affine)


def _switchable(
    num_features: int,
    *,
    kinds: tuple[str, ...] = KINDS,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> SwitchableNorm:
    return SwitchableNorm(num_features, kinds, eps, momentum, affine)


def _sparse(
    num_features: int,
    *,
    radius: float = 0.0,
    eps: float = 1e-5,
    momentum: float | None = 0.003,
    affine: bool = True,
) -> SparseSwitchableNorm:
    return SparseSwitchableNorm(num_features, radius, eps, momentum, affine)


def _switchable_whitening(
    num_features: int,
    *,
    kinds: int = 2,
    groups: int | None = None,
    iterations: int = 5,
    tie: bool = False,
    eps: float = 1e-5,
    momentum: float | None = 0.01,
    affine: bool = True,
    published: bool = False,
) -> SwitchableWhitening:
    parts = num_features // largest_divisor(num_features, 16) if groups is None else groups
    return SwitchableWhitening(num_features, kinds, parts, iterations, tie, eps, momentum, affine, published)


def _exemplar(
    num_features: int,
    *,
    reduction: int = 8,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> ExemplarNorm:
    return ExemplarNorm(num_features, reduction, eps, momentum, affine)


def _dynamic(num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True) -> DynamicNorm:
    return DynamicNorm(num_features, eps, momentum, affine)


def _batch_instance(
    num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True
) -> BatchInstanceNorm:
    return BatchInstanceNorm(num_features, eps, momentum, affine)


def _task(num_features: int, *, own: str = "instance", eps: float = 1e-5, affine: bool = True) -> TaskNorm:
    return TaskNorm(num_features, own, eps, affine)


def _batch_channel(
    num_features: int,
    *,
    groups: int | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> BatchChannelNorm:
    parts = largest_divisor(num_features, 32) if groups is None else groups
    return BatchChannelNorm(num_features, parts, eps, momentum, affine)


def _evonorm(
    num_features: int,
    *,
    kind: str = "b0",
    groups: int | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    activate: bool = True,
    unbiased: bool = False,
) -> EvoNorm:
    parts = largest_divisor(num_features, 8) if groups is None else groups
    return EvoNorm(num_features, kind, parts, eps, momentum, affine, activate, unbiased)


def _invariant(
    num_features: int,
    *,
    groups: int | None = None,
    window: int = 3,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> InvariantNorm:
    parts = num_features // largest_divisor(num_features, 64) if groups is None else groups
    return InvariantNorm(num_features, parts, window, eps, momentum, affine)


def _instance_batch(
    num_features: int,
    *,
    ratio: float = 0.5,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> Split:
    first = int(num_features * ratio)
    recovery = Affine() if affine else None
    return Split(
        Norm(Instance(), Standardize(eps), recovery, num_features=first),
        Norm(Batch(), Standardize(eps), recovery, Running(momentum), num_features=num_features - first),
    )


ROWS: tuple[Row, ...] = (
    Row(
        "switchable",
        "S052",
        _switchable,
        ("layer:switchable",),
        ("sn",),
        ("instance, layer, batch", "standardize", "affine", "running"),
        ("sn2d", "sn2d_nobn"),
    ),
    Row(
        "sparse-switchable",
        "S053",
        _sparse,
        ("layer:sparse-switchable",),
        ("ssn",),
        ("instance, layer, batch", "standardize", "affine", "running"),
        ("ssn_rad0p0", "ssn_rad0p6"),
    ),
    Row(
        "switchable-whitening",
        "S054",
        _switchable_whitening,
        ("layer:switchable-whitening",),
        ("sw",),
        ("batch, instance, layer", "whiten", "affine", "running"),
        ("sw_type2", "sw_type3"),
        options=(("groups", 2),),
    ),
    Row(
        "mode",
        "S051",
        _mode,
        ("layer:mode",),
        ("mn",),
        ("modes of the batch", "standardize", "affine", "running per mode"),
    ),
    Row(
        "mixture",
        "S050",
        _mixture,
        ("layer:mixture",),
        parts=("components of the batch", "standardize", "affine", "running per component"),
    ),
    Row(
        "exemplar",
        "S055",
        _exemplar,
        ("layer:exemplar",),
        ("en",),
        ("instance, layer, batch", "standardize", "affine per kind", "running"),
    ),
    Row(
        "dynamic",
        "S056",
        _dynamic,
        ("layer:dynamic",),
        parts=("learned", "standardize", "affine", "running"),
    ),
    Row(
        "batch-instance",
        "S057",
        _batch_instance,
        ("layer:batch-instance",),
        ("bin",),
        ("batch, instance", "standardize", "affine", "running"),
        ("bin2d",),
    ),
    Row(
        "task",
        "S059",
        _task,
        ("layer:task",),
        ("tasknorm",),
        ("batch, instance", "standardize", "affine", "last context"),
        (),
    ),
    Row(
        "batch-channel",
        "S060",
        _batch_channel,
        ("layer:batch-channel",),
        ("bcn",),
        ("batch, then group", "standardize", "affine, per group", "running"),
        ("bcn",),
        options=(("groups", 4),),
    ),
    Row(
        "evonorm",
        "S061",
        _evonorm,
        ("layer:evonorm",),
        (),
        ("batch and instance", "divide and activate", "affine", "running"),
        ("evonorm_b0_lone", "evonorm_s0_lone", "timm_evonorm_b0", "timm_evonorm_s0"),
    ),
    Row(
        "invariance-exploiting",
        "S063",
        _invariant,
        ("layer:invariance-exploiting",),
        parts=("window, then batch", "divide, then whiten", "affine", "running"),
    ),
    Row(
        "instance-batch",
        "pan2018",
        _instance_batch,
        (),
        ("ibn",),
        ("instance and batch", "standardize", "affine", "running"),
        ("ibn",),
    ),
)
