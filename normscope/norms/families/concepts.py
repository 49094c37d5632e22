"""Concept whitening: whitened channels are rotated so that chosen ones stand for concepts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from normscope.core.errors import ArgumentError
from normscope.norms.area import Batch
from normscope.norms.layer import Normalization, in_float
from normscope.norms.part import Traits, require
from normscope.norms.population import keep, track, valid_momentum
from normscope.norms.recovery import Affine, mixed
from normscope.norms.whiten import Whiten

ACTIVATIONS = ("pool_max", "max", "pos_mean", "mean")


class ConceptWhitening(Normalization):
    """Concept whitening: y = R W (x - mean), W by Newton's iteration, R orthogonal and not learned by descent.

    A batch of examples of concept j, passed as `layer(x, j)` in training, adds the mean of the whitened values where
    channel j is active to row j of the gradient of R; `rotate` then turns R by two Cayley steps.

    Args:
        num_features: number of channels.
        activation: where channel j is active: "pool_max" at the maxima of 3 x 3 windows, "max" at its maximum,
            "pos_mean" where it is positive, "mean" everywhere.
        iterations: of the coupled Newton iteration.
        eps: added to the diagonal of the covariance.
        momentum: weight of the newest batch, in the stored statistics and in the gradient of R.
        affine: weight and bias for each channel.
        published: row j takes each entry where that entry's own channel is active, as the authors' code does.
    """

    running_matrix: Tensor
    rotation: Tensor
    gradient: Tensor
    counter: Tensor

    def __init__(
        self,
        num_features: int,
        activation: str = "pool_max",
        iterations: int = 10,
        eps: float = 1e-5,
        momentum: float = 0.05,
        affine: bool = False,
        published: bool = False,
    ) -> None:
        """Register the stored statistics, the rotation and its gradient."""
        super().__init__()
        require(activation, "activation", ACTIVATIONS)
        valid_momentum(momentum)
        self.num_features, self.activation, self.iterations = num_features, activation, iterations
        self.eps, self.momentum, self.affine, self.published = eps, momentum, affine, published
        self.operation = Whiten("newton", eps, iterations=iterations)
        Affine(affine, affine).install(self, num_features)
        keep(self, mean=torch.zeros(num_features), matrix=torch.eye(num_features))
        self.register_buffer("rotation", torch.eye(num_features))
        self.register_buffer("gradient", torch.zeros(num_features, num_features))
        self.register_buffer("counter", torch.full((num_features,), 0.001))

    @property
    def traits(self) -> Traits:
        """Those of batch whitening; the maxima of windows need maps."""
        ranks = (4,) if self.activation == "pool_max" else (2, 3, 4, 5)
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True, ranks=ranks)

    @in_float
    def forward(self, x: Tensor, concept: int | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.
            concept: the channel whose concept all examples show; None, or below 0, for none.

        Returns:
            `(N, C, *)`.

        Raises:
            ArgumentError: there is no such channel.
        """
        if concept is not None and concept >= self.num_features:
            raise ArgumentError(f"concept={concept!r} must be below num_features={self.num_features}.")
        z = Batch().split(x)
        if self.training:
            stats = self.operation.measure(z, self.average)
            track(self, self.momentum, mean=stats["mean"], matrix=stats["matrix"])
        else:
            stats = {"mean": self.running_mean.unsqueeze(0), "matrix": self.running_matrix.unsqueeze(0)}
        white = Batch().merge(self.operation.apply(z, stats), x)
        y = mixed(self.rotation.to(white.dtype), white, 1)
        if self.training and concept is not None and concept >= 0:
            self._collect(white.detach(), y.detach(), concept)
        return Affine(self.affine, self.affine).apply(self, y, x, 1, None)

    def _collect(self, white: Tensor, y: Tensor, concept: int) -> None:
        """Average the whitened values where a channel is active into one row of the gradient."""
        active = self._active(y if self.published else y[:, concept : concept + 1]).to(white.dtype)
        inside = tuple(range(2, white.ndim))
        total = active.sum(inside) if inside else active
        spare = 1e-4 if self.activation == "pos_mean" else 0.0
        values = (white * active).sum(inside) if inside else white * active
        row = -(values / (total + spare)).mean(0)
        self.gradient[concept].lerp_(row.to(self.gradient.dtype), self.momentum)
        self.counter[concept] += 1

    def _active(self, y: Tensor) -> Tensor:
        if self.activation == "mean":
            return torch.ones_like(y)
        if self.activation == "pos_mean":
            return y > 0
        if self.activation == "max":
            return y == y.amax(tuple(range(2, y.ndim)), keepdim=True)
        values, places = F.max_pool2d(y, 3, 3, return_indices=True)
        return y == F.max_unpool2d(values, places, [3, 3], [3, 3], output_size=y.shape)

    @torch.no_grad()
    def rotate(self, steps: int = 2) -> None:
        """Turn the rotation along its collected gradient and begin to count anew; the gradient is kept.

        Args:
            steps: number of Cayley steps, each with a curvilinear search.
        """
        gradient = (self.gradient / self.counter.unsqueeze(-1)).double()
        rotation = self.rotation.double()
        for _ in range(steps):
            rotation = cayley_step(rotation, gradient)
        self.rotation.copy_(rotation)
        self.counter.fill_(0.001)


def cayley_step(x: Tensor, gradient: Tensor, tau: float = 1000.0, c1: float = 1e-4, c2: float = 0.9) -> Tensor:
    """Move an orthogonal matrix against a gradient by (I + tau A / 2)^-1 (I - tau A / 2), A = G X^T - X G^T.

    tau is found by bisection until the Wolfe conditions of F = tr(G^T X) hold.

    Args:
        x: orthogonal matrix `(d, d)`.
        gradient: G, of the same shape.
        tau: first step size.
        c1: least decrease, as a part of the initial slope.
        c2: largest remaining slope, as a part of the initial one.

    Returns:
        An orthogonal matrix; x itself where no step size fits within 500 trials.
    """
    a = gradient @ x.mT - x @ gradient.mT
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    start, slope = float((gradient * x).sum()), -0.5 * float(a.square().sum())
    low, high = 0.0, 1e8
    for _ in range(500):
        moved = torch.linalg.solve(eye + tau / 2 * a, (eye - tau / 2 * a) @ x)
        velocity = -torch.linalg.solve(eye + tau / 2 * a, a @ (x + moved) / 2)
        if float((gradient * moved).sum()) > start + c1 * tau * slope + 1e-18:
            high = tau
        elif float((gradient * velocity).sum()) + 1e-18 < c2 * slope:
            low = tau
        else:
            rotated: Tensor = moved
            return rotated
        tau = (low + high) / 2
    return x
