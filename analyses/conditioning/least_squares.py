"""The least-squares problem of this chapter: a quadratic whose minimum and eigenvalues are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class LeastSquares:
    """J(w) = E(y - w·x)²/2 with y = w*·x and H = E xxᵀ, without noise, so that min J = 0.

    Attributes:
        hessian: H, [d, d].
        minimizer: w* of length 1, [d].
        start: w of length 1 where descent begins, [d].
    """

    hessian: Array
    minimizer: Array
    start: Array

    @property
    def correlation(self) -> Array:
        """E yx = Hw*, [d]."""
        return np.asarray(self.hessian @ self.minimizer)

    @property
    def energy(self) -> float:
        """E y² = w*ᵀHw*, twice the loss of w = 0."""
        return float(self.minimizer @ self.correlation)


def draw_problem(features: int, condition: float, seed: int) -> LeastSquares:
    """Draw a problem: eigenvalues log-spaced from 1/condition to 1, random eigenvectors, minimizer and start.

    Args:
        features: d.
        condition: condition number of H.
        seed: of the draw.

    Returns:
        The problem.
    """
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.standard_normal((features, features)))
    hessian = basis * np.geomspace(1 / condition, 1, features) @ basis.T
    minimizer, start = (x / np.linalg.norm(x) for x in generator.standard_normal((2, features)))
    return LeastSquares((hessian + hessian.T) / 2, minimizer, start)
