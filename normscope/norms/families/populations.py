"""Methods that normalize by population statistics, and estimators of statistics for inference."""

from __future__ import annotations

from normscope.norms.area import Batch
from normscope.norms.families.populations_inference import (
    Estimated,
    EvalNorm,
    ExampleWeightedNorm,
    Pooled,
    PopulationNorm,
)
from normscope.norms.families.populations_linear import (
    CenteredLinear,
    FactorCenteredLinear,
    GeneralizedWhitenedLinear,
    LinearTransformations,
    MeanNormalizedLinear,
    NaturalLinear,
)
from normscope.norms.layer import Norm
from normscope.norms.operation import Standardize
from normscope.norms.population import Running
from normscope.norms.recovery import Affine
from normscope.norms.row import Row
from normscope.norms.whiten import Whiten


def _input_whitening(
    num_features: int, *, eps: float = 1e-5, momentum: float | None = None, groups: int = 1, method: str = "pca"
) -> PopulationNorm:
    operation = Whiten(method, eps, population="covariance")
    return PopulationNorm(Batch(groups), operation, None, Estimated(momentum), num_features=num_features)


def _factor_centering(
    num_features: int, *, momentum: float | None = 0.1, every: int | None = 1, out_features: int | None = None
) -> FactorCenteredLinear:
    return FactorCenteredLinear(num_features, out_features, every, momentum)


def _centering(
    num_features: int, *, momentum: float | None = 0.1, every: int | None = 1, out_features: int | None = None
) -> CenteredLinear:
    return CenteredLinear(num_features, out_features, every, momentum)


def _linear_transformations(
    num_features: int, *, momentum: float | None = 0.1, every: int | None = 1, hidden: int | None = None
) -> LinearTransformations:
    return LinearTransformations(num_features, hidden, every, momentum)


def _mean_normalized(
    num_features: int, *, momentum: float | None = 0.1, out_features: int | None = None
) -> MeanNormalizedLinear:
    return MeanNormalizedLinear(num_features, out_features, momentum)


def _natural(
    num_features: int,
    *,
    eps: float = 1e-3,
    momentum: float | None = 0.1,
    every: int | None = 1000,
    out_features: int | None = None,
) -> NaturalLinear:
    return NaturalLinear(num_features, out_features, eps, every, momentum)


def _generalized(
    num_features: int,
    *,
    eps: float = 1e-3,
    momentum: float | None = 0.1,
    every: int | None = 20,
    rank: int | None = None,
    out_features: int | None = None,
) -> GeneralizedWhitenedLinear:
    return GeneralizedWhitenedLinear(num_features, out_features, eps, every, momentum, rank)


def _evalnorm(
    num_features: int,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    start: float = 0.1,
) -> EvalNorm:
    return EvalNorm(num_features, eps, momentum, affine, start)


def _example_weighting(
    num_features: int,
    *,
    weight_eval: float = 0.5,
    groups: int | None = None,
    examples: int | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.01,
    affine: bool = True,
) -> ExampleWeightedNorm:
    return ExampleWeightedNorm(num_features, weight_eval, groups, examples, eps, momentum, affine)


def _population_estimation(
    num_features: int,
    *,
    estimate: str = "covariance",
    method: str = "zca",
    groups: int = 1,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> Norm:
    operation = Whiten(method, eps, population=estimate)
    recovery = Affine() if affine else None
    return Norm(Batch(groups), operation, recovery, Running(momentum), num_features=num_features)


def _precise(num_features: int, *, eps: float = 1e-5, affine: bool = True) -> Norm:
    recovery = Affine() if affine else None
    return Norm(Batch(), Standardize(eps), recovery, Pooled(None), num_features=num_features)


ROWS: tuple[Row, ...] = (
    Row("input-whitening", "S000", _input_whitening, ("population:input-whitening",)),
    Row(
        "factor-centering",
        "S001",
        _factor_centering,
        ("population:factor-centering",),
        parts=("batch", "center", "linear", "estimated"),
    ),
    Row(
        "centering",
        "S002",
        _centering,
        ("population:centering",),
        parts=("batch", "center", "linear", "estimated"),
    ),
    Row(
        "linear-transformations",
        "S003",
        _linear_transformations,
        ("population:linear-transformations",),
        parts=("batch", "center", "shortcut", "estimated"),
    ),
    Row(
        "mean-normalized-sgd",
        "S004",
        _mean_normalized,
        ("population:mean-normalized-sgd",),
        parts=("batch", "center", "linear", "estimated"),
    ),
    Row(
        "natural-neural-network",
        "S005",
        _natural,
        ("population:natural-neural-network",),
        ("prong",),
        parts=("batch", "whiten", "linear", "estimated"),
    ),
    Row(
        "generalized-whitened",
        "S006",
        _generalized,
        ("population:generalized-whitened",),
        parts=("batch", "whiten", "linear", "estimated"),
    ),
    Row(
        "evalnorm",
        "S076",
        _evalnorm,
        ("inference:evalnorm",),
        parts=("batch", "standardize", "affine", "learned mixture"),
    ),
    Row(
        "example-weighting",
        "S077",
        _example_weighting,
        ("inference:example-weighting",),
        parts=("batch", "standardize", "affine", "weighted mixture"),
    ),
    Row("population-estimation", "S078", _population_estimation, ("inference:population-estimation",)),
    Row("precise-batch", "S079", _precise, ("inference:precise-batch",), ("precise-bn",)),
)
