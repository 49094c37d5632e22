"""The whitening operation: z -> W (z - mean) with W Sigma W^T = I, by PCA, ZCA, Cholesky or Newton's iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.norms import roots
from normscope.norms.average import LOCAL, Average, rows
from normscope.norms.operation import Operation
from normscope.norms.part import Stats, require

METHODS = ("zca", "pca", "cholesky", "newton")


@dataclass(frozen=True, repr=False)
class Whiten(Operation):
    """Whiten the features of each area: W (z - mean), Sigma = covariance + eps I.

    With fewer samples than features the covariance is singular: eps keeps W finite, the result is white in the span
    of the data and zero outside; without eps this is an error.

    Attributes:
        method: "zca" W = Sigma^(-1/2), "pca" W = L^(-1/2) U^T, "cholesky" W = inverse of the lower factor,
            "newton" an approximation to ZCA.
        eps: added to the diagonal, 0 for none.
        shrink: Sigma = (1 - eps) covariance + eps I instead.
        unbiased: the covariance divides by n - 1.
        iterations: T of Newton's iteration.
        coupled: Newton-Schulz, stable for any T; False for the published form, which diverges past convergence.
        population: "matrix" to average W over batches, "covariance" to average the covariance and invert that.
    """

    method: str = "zca"
    eps: float = 1e-5
    shrink: bool = False
    unbiased: bool = False
    iterations: int = 5
    coupled: bool = True
    population: str = "matrix"
    centers: ClassVar[bool] = True
    scales: ClassVar[bool] = True
    whitens: ClassVar[bool] = True
    homogeneous: ClassVar[bool] = True
    minimum: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Refuse an unknown method or population, or a negative eps.

        Raises:
            ArgumentError: a setting cannot work.
        """
        require(self.method, "method", METHODS)
        require(self.population, "population", ("matrix", "covariance"))
        if not 0 <= self.eps < (1 if self.shrink else float("inf")):
            raise ArgumentError(f"eps={self.eps!r} must be at least 0, and below 1 with shrink=True.")
        if self.iterations < 1:
            raise ArgumentError(f"iterations={self.iterations!r} must be at least 1; the published number is 5.")

    @property
    def tracked(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the stored statistics."""
        return ("mean", self.population)

    def measure(self, z: Tensor, average: Average = LOCAL) -> Stats:
        """Take the mean, the covariance before shrinkage and the whitening matrix.

        Args:
            z: the reordered input.
            average: how to average over samples.

        Returns:
            mean, covariance and matrix.

        Raises:
            ArgumentError: without eps there are too few samples for the features.
        """
        samples, features = z.shape[2:].numel(), z.shape[1]
        if self.eps == 0 and samples <= features and average is LOCAL:
            raise ArgumentError(
                f"{samples} samples cannot whiten {features} features with eps=0: the covariance is singular; "
                "set eps, use smaller groups or a larger batch."
            )
        mean = average.mean(z)
        covariance = average.products(z - rows(mean, z))
        if self.unbiased:
            count = average.count(z)
            covariance = covariance * (count / (count - 1))
        return {"mean": mean, "covariance": covariance, "matrix": self.matrix(covariance)}

    def matrix(self, covariance: Tensor) -> Tensor:
        """Return the whitening matrix W of covariances `[..., d, d]`."""
        sigma = self.regularized(covariance)
        if self.method == "newton":
            return roots.newton(sigma, self.iterations, coupled=self.coupled)
        return {"zca": roots.zca, "pca": roots.pca, "cholesky": roots.cholesky}[self.method](sigma)

    def regularized(self, covariance: Tensor) -> Tensor:
        """Return Sigma: the covariance plus eps I, or shrunk towards I."""
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        return (1 - self.eps if self.shrink else 1.0) * covariance + self.eps * eye

    def residual(self, z: Tensor) -> Tensor:
        """Return how far the result is from white, for each area: the Frobenius norm of W Sigma W^T - I.

        >>> z = torch.randn(1, 4, 100, generator=torch.Generator().manual_seed(0))
        >>> bool(Whiten("zca").residual(z) < 1e-4), bool(Whiten("newton", iterations=1).residual(z) < 1e-4)
        (True, False)
        """
        stats = self.measure(z)
        return roots.residual(self.regularized(stats["covariance"]), stats["matrix"])

    def apply(self, z: Tensor, stats: Stats) -> Tensor:
        """Center and multiply by the whitening matrix."""
        matrix = stats["matrix"] if "matrix" in stats else self.matrix(stats["covariance"])
        outer = tuple(range(2, z.ndim - 1))
        x = (z - rows(stats["mean"], z)).permute(*outer, 0, 1, z.ndim - 1)
        y = matrix @ x
        k = len(outer)
        return y.permute(k, k + 1, *range(k), k + 2)
