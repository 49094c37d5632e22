"""Spectral normalization: torch's, and the order of its published algorithm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import parametrizations

from normscope.core.errors import ArgumentError
from normscope.norms.part import positive
from normscope.weights.borrowed import Borrowed
from normscope.weights.parametrization import Layout, Parametrization, RowMap


def spectral_deviation(rows: Tensor) -> Tensor:
    """Return how far the largest singular value is from 1."""
    off: Tensor = (torch.linalg.matrix_norm(rows, 2) - 1).abs()
    return off


class SpectralNorm(Borrowed):
    """Spectral normalization of torch: w = W / (u^T W v), u = norm(W v) first, then v = norm(W^T u).

    In training each use takes `iterations` steps of power iteration; u and v are constants for the gradient.

    Args:
        layout: of the weight.
        weight: example.
        iterations: steps of power iteration at each use in training.
        eps: least length that is divided by.
    """

    invariance = "tensor"
    tolerance = 0.05

    def __init__(self, layout: Layout, weight: Tensor, iterations: int = 1, eps: float = 1e-12) -> None:
        """Take torch's, which starts with 15 steps."""
        check_iterations(iterations)
        super().__init__(layout, weight, parametrizations.spectral_norm, n_power_iterations=iterations, eps=eps)

    def deviation(self, rows: Tensor) -> Tensor:
        """The largest singular value is 1; it is as far from it as power iteration is from the vectors."""
        return spectral_deviation(rows)


class LeftFirstSpectralNorm(RowMap):
    """Spectral normalization as published: v = norm(W^T u) first, then u = norm(W v), and u alone is the start.

    Args:
        layout: of the weight.
        weight: example.
        iterations: steps of power iteration at each use in training.
        eps: added to lengths.
    """

    invariance = "tensor"
    tolerance = 0.05
    u: Tensor
    v: Tensor

    def __init__(self, layout: Layout, weight: Tensor, iterations: int = 1, eps: float = 1e-12) -> None:
        """Draw u and take 15 steps."""
        check_iterations(iterations)
        positive(eps, "eps", "a weight of zeros would be divided by zero")
        super().__init__(layout)
        self.iterations, self.eps = iterations, eps
        rows = layout.rows(weight.detach())
        self.register_buffer("u", self._unit(torch.randn_like(rows[:, 0])))
        self.register_buffer("v", torch.zeros_like(rows[0]))
        self.step(rows, 15)

    def _unit(self, vector: Tensor) -> Tensor:
        unit: Tensor = vector / (torch.linalg.vector_norm(vector) + self.eps)
        return unit

    @torch.no_grad()
    def step(self, rows: Tensor, iterations: int) -> None:
        """Improve the vectors.

        Args:
            rows: the matrix.
            iterations: number of steps.
        """
        for _ in range(iterations):
            self.v = self._unit(rows.mT @ self.u)
            self.u = self._unit(rows @ self.v)

    def map(self, rows: Tensor) -> Tensor:
        """Divide by the estimate of the largest singular value."""
        if self.training:
            self.step(rows.detach(), self.iterations)
        return rows / (self.u @ (rows @ self.v))

    def deviation(self, rows: Tensor) -> Tensor:
        """The largest singular value is 1; it is as far from it as power iteration is from the vectors."""
        return spectral_deviation(rows)


def spectral(
    layout: Layout, weight: Tensor, *, iterations: int = 1, eps: float = 1e-12, first: str = "u"
) -> Parametrization:
    """Make spectral normalization.

    Args:
        layout: of the weight.
        weight: example.
        iterations: steps of power iteration at each use in training.
        eps: least length that is divided by.
        first: which vector a step renews first, "u" as torch or "v" as published.

    Returns:
        The parametrization.

    Raises:
        ArgumentError: there is no such order.
    """
    if first not in ("u", "v"):
        raise ArgumentError(f"first={first!r} is unknown; Options: u, v.")
    return (SpectralNorm if first == "u" else LeftFirstSpectralNorm)(layout, weight, iterations, eps)


def check_iterations(iterations: int) -> None:
    """Refuse a number of iterations below 1.

    Args:
        iterations: the value received.

    Raises:
        ArgumentError: it is below 1.
    """
    if not isinstance(iterations, int) or iterations < 1:
        raise ArgumentError(f"iterations={iterations!r} must be a whole number, at least 1.")
