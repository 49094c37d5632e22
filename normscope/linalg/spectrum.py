"""Spectral density of a curvature matrix by stochastic Lanczos quadrature, exact where the problem is small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from normscope.core.errors import ArgumentError
from normscope.core.estimate import Estimate, Status
from normscope.linalg.arguments import check_name, checked_count, checked_operator
from normscope.linalg.lanczos import Array, Krylov
from normscope.linalg.operator import Operator
from normscope.linalg.problem import Problem
from normscope.linalg.progress import bar

if TYPE_CHECKING:
    import pandas as pd

SOURCE = "ghorbani2019"
METHODS = ("auto", "slq", "exact")
EXACT_BELOW = 2000  # parameters; the dense matrix is then cheaper than ten times ninety products are noisy
_COLUMNS = 64  # of the identity multiplied at once
_CHUNK = 512  # grid points at once
_VARIANCE = 1e-5  # of the kernel, times the width of the spectrum but at least 1
_MARGIN = 0.01  # of the default grid beyond the extreme nodes


@dataclass(frozen=True, repr=False)
class Spectrum:
    """The density of eigenvalues as weighted nodes: phi(t) = sum_i weights_i delta(t - nodes_i).

    Attributes:
        nodes: where the mass lies, `[n]`; eigenvalues where exact.
        weights: how much, `[n]`, of sum 1.
        probe: which start vector a node comes from, `[n]`.
        size: number of parameters.
        matvecs: products that were spent.
        exact: whether the nodes are all eigenvalues.
    """

    nodes: Array
    weights: Array
    probe: Array
    size: int
    matvecs: int
    exact: bool

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest node, a mean over probes."""
        split = self._by_probe()
        return float(np.mean([n.min() for n, _ in split])), float(np.mean([n.max() for n, _ in split]))

    @property
    def variance(self) -> float:
        """Variance of the Gaussian kernel: 1e-5 max(1, largest - smallest)."""
        low, high = self.bounds
        return _VARIANCE * max(1.0, high - low)

    def grid(self, points: int = 10_000) -> Array:
        """Return evenly spaced points over all of the spectrum.

        Args:
            points: how many.

        Returns:
            `[points]`.
        """
        low, high = self.bounds
        return np.linspace(low - _MARGIN, high + _MARGIN, points)

    def density(self, grid: Array | Sequence[float] | None = None, variance: float | None = None) -> Array:
        """Return the density smoothed by a Gaussian kernel: sum_i weights_i N(t; nodes_i, variance).

        Args:
            grid: points t; `grid()` by default, over which the density is then scaled to integrate to 1.
            variance: of the kernel; `variance` by default.

        Returns:
            The density at the points.

        Raises:
            ArgumentError: if the variance is not positive.
        """
        spread = self.variance if variance is None else variance
        if not spread > 0:
            raise ArgumentError(f"variance={variance!r} must be positive; None takes {self.variance:.3g}.")
        points = self.grid() if grid is None else np.asarray(grid, dtype=np.float64)
        found = np.concatenate([self._smooth(p, spread) for p in np.array_split(points, len(points) // _CHUNK + 1)])
        return found / np.trapezoid(found, points) if grid is None else found

    def moment(self, order: int) -> Estimate:
        """Return the mean of lambda^order over all eigenvalues: times `size` the trace for order 1.

        Args:
            order: of the moment.

        Returns:
            The moment; its standard error comes from the differences between probes.
        """
        each = np.array([float(weights @ nodes**order / weights.sum()) for nodes, weights in self._by_probe()])
        if self.exact:
            return Estimate(float(each[0]), 0.0, n=self.size, status=Status.EXACT, source=SOURCE)
        error = float(each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else float("nan")
        return Estimate(float(each.mean()), error, n=len(each), source=SOURCE)

    def frame(self) -> pd.DataFrame:
        """Return probe, node and weight as a frame."""
        import pandas as pd

        return pd.DataFrame({"probe": self.probe, "node": self.nodes, "weight": self.weights})

    def __repr__(self) -> str:
        """Say what it was made from."""
        low, high = self.bounds
        how = "exact" if self.exact else f"{len(self._by_probe())} probes, {self.matvecs} matvecs"
        return f"Spectrum({self.size:,} parameters, {low:.4g} to {high:.4g}, {how})"

    def _by_probe(self) -> list[tuple[Array, Array]]:
        return [(self.nodes[self.probe == p], self.weights[self.probe == p]) for p in np.unique(self.probe)]

    def _smooth(self, points: Array, variance: float) -> Array:
        squares = np.square(points[:, None] - self.nodes) / variance
        smooth: Array = np.exp(-0.5 * squares) @ self.weights / np.sqrt(2 * np.pi * variance)
        return smooth


def spectrum(
    problem: Problem,
    operator: str = "hessian",
    *,
    steps: int = 90,
    probes: int = 10,
    method: str = "auto",
    max_matvecs: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Spectrum:
    """Return the spectral density of a curvature matrix.

    Each probe is a normal vector of length 1, from which `steps` of fully orthogonalized Lanczos give T = U L U^T; its
    nodes are L and their weights U_{1i}^2 / probes. The rule is exact for polynomials up to degree 2 steps - 1, so
    that the error comes from the probes: one probe of many steps serves better than many of few. Cost: steps times
    probes products; memory: steps + 1 vectors.

    Args:
        problem: model, loss and batches.
        operator: "hessian", "ggn", "fisher" or "mc-fisher".
        steps: of Lanczos for each probe.
        probes: number of start vectors.
        method: "slq", "exact" (the dense matrix, a product for each parameter) or "auto": exact below 2,000 parameters.
        max_matvecs: products at most; no probe begins that would exceed it.
        seed: of the probes.
        progress: True shows a bar, False none, None one on a terminal.

    Returns:
        The spectrum. An argument that cannot work is an ArgumentError.

    Sources: ghorbani2019, lin2016.
    """
    check_name("method", method, METHODS)
    made = checked_operator(problem, operator)
    steps = min(checked_count("steps", steps, 2), made.size)
    probes = checked_count("probes", probes, 1)
    if max_matvecs is not None:
        checked_count("max_matvecs", max_matvecs, steps, f"One probe of steps={steps} needs as many.")
        probes = min(probes, max_matvecs // steps)
    if method == "exact" or (method == "auto" and made.size < EXACT_BELOW):
        return _exact(made, progress)
    generator = torch.Generator().manual_seed(seed)
    with bar(steps * probes, "spectrum", progress) as tick:
        rules = [_rule(made, steps, generator, tick) for _ in range(probes)]
    return Spectrum(
        np.concatenate([nodes for nodes, _ in rules]),
        np.concatenate([weights / probes for _, weights in rules]),
        np.repeat(np.arange(probes), [len(nodes) for nodes, _ in rules]),
        made.size,
        made.matvecs,
        False,
    )


def _rule(operator: Operator, steps: int, generator: torch.Generator, tick: Any) -> tuple[Array, Array]:
    """Return nodes and weights of the Gauss rule; an invariant subspace ends it, as it is exact then."""
    krylov = Krylov(operator.matvec, operator.normal(generator), steps)
    while krylov.count < steps:
        krylov.step()
        tick.update()
        if not krylov.beta:
            break
    nodes, vectors = np.linalg.eigh(krylov.projected)
    return nodes, np.square(vectors[0])


def dense(operator: Operator, progress: bool | None = None) -> Array:
    """Return the whole matrix, its symmetric part, in float64.

    Args:
        operator: the operator.
        progress: whether to show a bar.

    Returns:
        `[size, size]`.
    """
    out = np.empty((operator.size, operator.size))
    eye = torch.eye(operator.size, dtype=operator.dtype, device=operator.device)
    with bar(operator.size, "dense matrix", progress) as tick:
        for columns in range(0, operator.size, _COLUMNS):
            part = operator.matmat(eye[:, columns : columns + _COLUMNS])
            out[:, columns : columns + _COLUMNS] = part.double().cpu().numpy()
            tick.update(part.shape[1])
    return (out + out.T) / 2


def _exact(operator: Operator, progress: bool | None) -> Spectrum:
    values = np.linalg.eigvalsh(dense(operator, progress))
    size = operator.size
    return Spectrum(values, np.full(size, 1 / size), np.zeros(size, int), size, operator.matvecs, True)
