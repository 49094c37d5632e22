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
    """Whiten the features of each area: W (z - mean) with Sigma = (1 - shrink) covariance + (shrink + eps) I.

    With fewer samples than features the covariance is singular: eps or shrink keeps W finite, the result is white in
    the span of the data and zero outside; without either this is an error, except for Newton's iteration.

    Attributes:
        method: "zca" W = Sigma^(-1/2), "pca" W = L^(-1/2) U^T, "cholesky" W = inverse of the lower factor,
            "newton" an approximation to ZCA.
        eps: added to the diagonal, 0 for none.
        shrink: weight of the identity in place of the covariance, 0 for none.
        unbiased: the covariance divides by n - 1.
        iterations: T of Newton's iteration.
        coupled: Newton-Schulz, stable for any T; False for the published form, which diverges past convergence.
        divisor: what Newton's iteration divides Sigma by, "trace" or "frobenius".
        population: what is averaged over batches: "matrix" W itself; "sigma" Sigma, inverted in evaluation;
            "covariance" the covariance without eps and shrink, which evaluation adds.
        moment: W comes from the second moment instead of the covariance.
    """

    method: str = "zca"
    eps: float = 1e-5
    shrink: float = 0.0
    unbiased: bool = False
    iterations: int = 5
    coupled: bool = True
    divisor: str = "trace"
    population: str = "matrix"
    moment: bool = False
    centers: ClassVar[bool] = True
    scales: ClassVar[bool] = True
    whitens: ClassVar[bool] = True
    homogeneous: ClassVar[bool] = True
    minimum: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Refuse an unknown method, population or divisor, or numbers out of range.

        Raises:
            ArgumentError: a setting cannot work.
        """
        require(self.method, "method", METHODS)
        require(self.population, "population", ("matrix", "sigma", "covariance"))
        require(self.divisor, "divisor", ("trace", "frobenius"))
        if not self.eps >= 0 or not 0 <= self.shrink < 1:
            raise ArgumentError(f"eps={self.eps!r} must be at least 0, shrink={self.shrink!r} in [0, 1).")
        if self.iterations < 1:
            raise ArgumentError(f"iterations={self.iterations!r} must be at least 1; the published number is 5.")

    @property
    def tracked(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the stored statistics."""
        return ("mean", self.population)

    def measure(self, z: Tensor, average: Average = LOCAL) -> Stats:
        """Take the mean, the covariance, Sigma and the whitening matrix: "mean", "covariance", "sigma", "matrix"."""
        if average is LOCAL:
            self.check(z)
        mean = average.mean(z)
        covariance = average.products(z if self.moment else z - rows(mean, z))
        if self.unbiased:
            count = average.count(z)
            covariance = covariance * (count / (count - 1))
        sigma = self.regularized(covariance)
        return {"mean": mean, "covariance": covariance, "sigma": sigma, "matrix": self.matrix(sigma)}

    def check(self, z: Tensor) -> None:
        """Refuse too few samples for the features where nothing keeps the covariance from being singular.

        Args:
            z: the reordered input.

        Raises:
            ArgumentError: there are no more samples than features, and neither eps nor shrink.
        """
        samples, features = z.shape[2:].numel(), z.shape[1]
        bare = self.eps == 0 and self.shrink == 0 and self.method != "newton"
        if bare and samples <= features:
            raise ArgumentError(
                f"{samples} samples cannot whiten {features} features with eps=0: the covariance is singular; "
                "set eps, use smaller groups or a larger batch."
            )

    def matrix(self, sigma: Tensor) -> Tensor:
        """Return the whitening matrix W of Sigma `[..., d, d]`."""
        if self.method == "newton":
            return roots.newton(sigma, self.iterations, coupled=self.coupled, scale=self.divisor)
        return {"zca": roots.zca, "pca": roots.pca, "cholesky": roots.cholesky}[self.method](sigma)

    def regularized(self, covariance: Tensor) -> Tensor:
        """Return Sigma for a covariance."""
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        return (1 - self.shrink) * covariance + (self.shrink + self.eps) * eye

    def residual(self, z: Tensor) -> Tensor:
        """Return how far the result is from white, for each area: the Frobenius norm of W Sigma W^T - I.

        >>> z = torch.randn(1, 4, 100, generator=torch.Generator().manual_seed(0))
        >>> bool(Whiten("zca").residual(z) < 1e-4), bool(Whiten("newton", iterations=1).residual(z) < 1e-4)
        (True, False)
        """
        stats = self.measure(z)
        return roots.residual(stats["sigma"], stats["matrix"])

    def apply(self, z: Tensor, stats: Stats) -> Tensor:
        """Center and multiply by the whitening matrix."""
        matrix = self.chosen(stats)
        outer = tuple(range(2, z.ndim - 1))
        x = (z - rows(stats["mean"], z)).permute(*outer, 0, 1, z.ndim - 1)
        y = matrix @ x
        k = len(outer)
        return y.permute(k, k + 1, *range(k), k + 2)

    def chosen(self, stats: Stats) -> Tensor:
        """Return the whitening matrix, from Sigma or the covariance where only that is stored."""
        if "matrix" in stats:
            return stats["matrix"]
        return self.matrix(stats["sigma"] if "sigma" in stats else self.regularized(stats["covariance"]))
