"""Methods with more robust estimates of batch statistics, in forward or in backward."""

from __future__ import annotations

import torch
from torch import Tensor

from normscope.norms.families.robust_batch import (
    BatchRenorm,
    BlendedNorm,
    KalmanNorm,
    MomentumBatchNorm,
    NoiseAwareNorm,
    StochasticNorm,
)
from normscope.norms.families.robust_control import MovingAverageNorm, OnlineNorm, PowerNorm
from normscope.norms.families.robust_memory import CrossIterationNorm, MemorizedNorm
from normscope.norms.row import Row, image, tokens


def _kalman(
    num_features: int,
    *,
    p: float = 0.05,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> KalmanNorm:
    return KalmanNorm(num_features, p, eps, momentum, affine)


def _renorm(
    num_features: int,
    *,
    eps: float = 1e-3,
    momentum: float | None = 0.01,
    affine: bool = True,
    r_max: float = 3.0,
    d_max: float = 5.0,
    start: int = 5000,
    r_end: int = 40000,
    d_end: int = 25000,
) -> BatchRenorm:
    return BatchRenorm(num_features, eps, momentum, affine, r_max, d_max, start, r_end, d_end)


def _running(num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True) -> BlendedNorm:
    return BlendedNorm(num_features, eps, momentum, affine=affine)


def _diminishing(num_features: int, *, power: float = 1.0, eps: float = 1e-5, affine: bool = True) -> BlendedNorm:
    return BlendedNorm(num_features, eps, None, power, affine=affine)


def _full(num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True) -> BlendedNorm:
    return BlendedNorm(num_features, eps, momentum, composed=True, affine=affine)


def _online(
    num_features: int,
    *,
    forward_decay: float = 0.999,
    backward_decay: float = 0.99,
    guard: str = "clamp",
    eps: float = 1e-5,
    affine: bool = True,
) -> OnlineNorm:
    return OnlineNorm(num_features, forward_decay, backward_decay, guard, eps, affine)


def _moving_average(
    num_features: int,
    *,
    batches: int = 16,
    warmup: int = 100,
    correction: int = 1000,
    eps: float = 1e-5,
    momentum: float | None = 0.02,
    affine: bool = True,
) -> MovingAverageNorm:
    return MovingAverageNorm(num_features, batches, warmup, correction, eps, momentum, affine)


def _power(
    num_features: int,
    *,
    groups: int = 1,
    warmup: int = 10000,
    backward_decay: float = 0.9,
    channels: str = "last",
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> PowerNorm:
    return PowerNorm(num_features, groups, warmup, backward_decay, channels, eps, momentum, affine)


def _momentum(
    num_features: int, *, ideal: int = 64, steps: int = 100, eps: float = 1e-5, affine: bool = True
) -> MomentumBatchNorm:
    return MomentumBatchNorm(num_features, ideal, steps, eps, affine)


def _memorized(
    num_features: int, *, memory: int = 8, decay: float = 0.9, eps: float = 1e-5, affine: bool = True
) -> MemorizedNorm:
    return MemorizedNorm(num_features, memory, decay, eps, affine)


def _cross_iteration(
    num_features: int,
    *,
    memory: int = 3,
    rho: float = 1.0,
    eps: float = 1e-5,
    inside: bool = False,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> CrossIterationNorm:
    return CrossIterationNorm(num_features, memory, rho, eps, inside, momentum, affine)


def _stochastic(
    num_features: int,
    *,
    p: float = 0.5,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> StochasticNorm:
    return StochasticNorm(num_features, p, eps, momentum, affine)


def _noise_aware(
    num_features: int,
    *,
    noise: float = 0.1,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> NoiseAwareNorm:
    return NoiseAwareNorm(num_features, noise, eps, momentum, affine)


def _with_prediction(num_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    (x,) = image(num_features, generator)
    mean = torch.randn(num_features, generator=generator, dtype=torch.float64)
    return x, torch.stack([mean, mean.square() + 0.5])


ROWS: tuple[Row, ...] = (
    Row(
        "kalman",
        "S064",
        _kalman,
        ("layer:kalman",),
        ("kn",),
        ("batch and the layer before", "standardize", "affine", "running"),
        inputs=_with_prediction,
    ),
    Row(
        "batch-renorm",
        "S065",
        _renorm,
        ("layer:batch-renorm",),
        ("brn",),
        ("batch", "standardize, corrected", "affine", "running"),
        ("batchrenorm_mid",),
    ),
    Row(
        "running-batch",
        "S066",
        _running,
        ("layer:running-batch",),
        (),
        ("batch and past", "standardize", "affine", "running"),
    ),
    Row(
        "diminishing-batch",
        "S067",
        _diminishing,
        ("layer:diminishing-batch",),
        (),
        ("batch and past", "standardize", "affine", "average"),
    ),
    Row(
        "full-normalization",
        "S068",
        _full,
        ("layer:full-normalization",),
        (),
        ("batch and past", "standardize", "affine", "running"),
    ),
    Row(
        "online",
        "S069",
        _online,
        ("layer:online",),
        (),
        ("past examples", "standardize", "affine, guarded", "running"),
        ("onlinenorm_none",),
    ),
    Row(
        "moving-average-batch",
        "S070",
        _moving_average,
        ("layer:moving-average-batch",),
        ("mabn",),
        ("last batches", "scale", "affine", "running"),
        ("mabn_warmup", "mabn_ma"),
    ),
    Row(
        "power",
        "S071",
        _power,
        ("layer:power",),
        ("powernorm",),
        ("batch or past", "scale", "affine", "running"),
        ("powernorm_warm", "powernorm_post"),
        inputs=tokens,
    ),
    Row(
        "momentum-batch",
        "S072",
        _momentum,
        ("layer:momentum-batch",),
        (),
        ("batch and past", "standardize", "affine", "running"),
    ),
    Row(
        "memorized-batch",
        "S073",
        _memorized,
        ("layer:memorized-batch",),
        (),
        ("last batches", "standardize", "affine", "memory"),
    ),
    Row(
        "cross-iteration-batch",
        "S074",
        _cross_iteration,
        ("layer:cross-iteration-batch",),
        ("cbn",),
        ("last batches", "standardize", "affine", "running"),
        ("cbn",),
    ),
    Row(
        "stochastic",
        "S075",
        _stochastic,
        ("layer:stochastic",),
        (),
        ("batch or past", "standardize", "affine", "running"),
        ("stochnorm_truegrad",),
    ),
    Row(
        "noise-aware-batch",
        "S218",
        _noise_aware,
        ("layer:noise-aware-batch",),
        (),
        ("batch", "standardize", "affine", "running with noise"),
    ),
)
