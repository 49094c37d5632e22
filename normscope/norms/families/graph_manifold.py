"""Riemannian batch normalization of symmetric positive definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms import roots
from normscope.norms.layer import Normalization, in_float
from normscope.norms.part import Traits
from normscope.norms.population import keep, valid_momentum


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of symmetric positive definite matrices `[..., d, d]`, without gradient."""
    values, vectors = torch.linalg.eigh(roots.symmetric(matrix.detach()))
    values = values.clamp_min(torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True))
    found: Tensor = (vectors * values.pow(exponent).unsqueeze(-2)) @ vectors.mT
    return found


def geodesic(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Return the point at a share of the way from one matrix to another, on the affine-invariant geodesic.

    A^(1/2) (A^(-1/2) B A^(-1/2))^share A^(1/2).

    Args:
        start: A.
        end: B.
        share: 0 for A, 1 for B.

    Returns:
        The matrix.
    """
    half, inverse = power(start, 0.5), power(start, -0.5)
    return half @ power(inverse @ end @ inverse, share) @ half


class SPDBatchNorm(Normalization):
    """Riemannian batch normalization: symmetric positive definite matrices are moved so that their mean is W.

    Y = W^(1/2) G^(-1/2) X G^(-1/2) W^(1/2), G the Riemannian mean of the batch, one Karcher step from the arithmetic
    mean and without gradient; W is learned, its symmetric part counts. Evaluation uses the stored mean, which follows G
    on the geodesic.

    Args:
        num_features: size of the matrices.
        momentum: share of the way that the stored mean moves.
        steps: Karcher steps.
    """

    def __init__(self, num_features: int, momentum: float = 0.1, steps: int = 1) -> None:
        """Register W and the stored mean, the identity at first."""
        super().__init__()
        valid_momentum(momentum)
        self.num_features, self.momentum, self.steps = num_features, momentum, steps
        self.weight = nn.Parameter(torch.eye(num_features))
        keep(self, mean=torch.eye(num_features))

    @property
    def traits(self) -> Traits:
        """The mean has no gradient; the input is `(N, d, d)`."""
        return Traits(crosses_batch=True, stateful=True, scale_invariant=True, true_gradient=False, ranks=())

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize matrices `(N, d, d)`.

        Args:
            x: the matrices.

        Returns:
            Matrices of the same shape.

        Raises:
            ArgumentError: the shape is another one, or a matrix is not positive definite.
        """
        size = self.num_features
        if x.ndim != 3 or x.shape[1:] != (size, size):
            raise ArgumentError(f"x has shape {tuple(x.shape)}; expected symmetric matrices (N, {size}, {size}).")
        x = roots.symmetric(x)
        if len(x) and not float(torch.linalg.eigvalsh(x.detach()).min()) > 0:
            raise ArgumentError("x holds a matrix that is not positive definite; add a multiple of the identity.")
        mean = self._mean(x.detach()) if self.training else self.running_mean.to(x)
        weight = roots.symmetric(self.weight if self.weight is not None else mean).to(x)
        move = weight @ roots.zca(weight) @ power(mean, -0.5)
        return move @ x @ move.mT

    @torch.no_grad()
    def _mean(self, x: Tensor) -> Tensor:
        """Return the mean of a batch, and let the stored one follow it."""
        mean = self._average(x)
        for _ in range(self.steps):
            half, inverse = power(mean, 0.5), power(mean, -0.5)
            values, vectors = torch.linalg.eigh(inverse @ x @ inverse)
            tangent = self._average((vectors * values.log().unsqueeze(-2)) @ vectors.mT)
            values, vectors = torch.linalg.eigh(roots.symmetric(tangent))
            mean = half @ ((vectors * values.exp().unsqueeze(-2)) @ vectors.mT) @ half
        self.num_batches_tracked.add_(1)
        self.running_mean.copy_(geodesic(self.running_mean.to(x), mean, self.momentum))
        return mean

    def _average(self, x: Tensor) -> Tensor:
        return self.average.mean(x.permute(1, 2, 0))
