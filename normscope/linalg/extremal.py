"""Extremal eigenpairs of a curvature matrix by thick-restarted Lanczos, with the residual of every pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.linalg import peer
from normscope.linalg.arguments import check_name, checked_count, checked_operator
from normscope.linalg.lanczos import Array, Krylov
from normscope.linalg.operator import Operator
from normscope.linalg.problem import Problem
from normscope.linalg.progress import bar

if TYPE_CHECKING:
    import pandas as pd

WHICH: dict[str, Callable[[Array], Array]] = {"LA": lambda x: x, "SA": lambda x: -x, "LM": np.abs}
ENGINES = ("normscope", "pyhessian")
_EVERY = 2  # steps between two looks at the Ritz values


@dataclass(frozen=True, repr=False)
class Eigenpairs:
    """Eigenpairs, the wanted end first.

    Attributes:
        values: eigenvalues, `[k]`.
        vectors: eigenvectors in columns, `[size, k]`, in the order of `Problem.names`.
        residuals: |A v - lambda v| of each; an eigenvalue lies within it of the value.
        matvecs: products that were spent.
        converged: whether each residual is within the tolerance.
        tol: the tolerance, relative to the eigenvalue.
    """

    values: Array
    vectors: Tensor
    residuals: Array
    matvecs: int
    converged: Array
    tol: float

    def frame(self) -> pd.DataFrame:
        """Return value, residual and converged as a frame, a row for each pair."""
        import pandas as pd

        columns = {"value": self.values, "residual": self.residuals, "converged": self.converged}
        return pd.DataFrame(columns).rename_axis("pair").reset_index()

    def __repr__(self) -> str:
        """Say the values and whether to trust them."""
        shown = ", ".join(f"{value:.4g}" for value in self.values[:5]) + (", ..." if len(self.values) > 5 else "")
        sure = f"{int(self.converged.sum())} of {len(self.values)} converged to {self.tol:.0e}"
        return f"Eigenpairs({shown}; {sure}, {self.matvecs} matvecs)"


def eigenpairs(
    problem: Problem,
    k: int = 10,
    which: str = "LA",
    operator: str = "hessian",
    tol: float = 1e-3,
    *,
    max_matvecs: int | None = None,
    max_basis: int | None = None,
    verify: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    engine: str = "normscope",
) -> Eigenpairs:
    """Return extremal eigenpairs of a curvature matrix.

    A pair has converged when |A v - lambda v| <= tol |lambda|; the error of the eigenvalue is then mostly about the
    square of that. From one start vector a repeated eigenvalue is seen once, unless the basis becomes invariant:
    `verify` goes on from a fresh vector until what is left over holds none of the wanted.

    Args:
        problem: model, loss and batches.
        k: number of pairs.
        which: "LA" largest, "SA" smallest (most negative), "LM" largest by absolute value.
        operator: "hessian", "ggn", "fisher" or "mc-fisher".
        tol: tolerance relative to each eigenvalue.
        max_matvecs: products at most; 200 + 10 k by default. What has not converged by then says so.
        max_basis: vectors of the problem's size held at most, 40 + 4 k by default; beyond it the basis is restarted.
        verify: look for further copies of repeated eigenvalues.
        seed: of the start vector.
        progress: True shows a bar, False none, None one on a terminal.
        engine: "normscope", or "pyhessian" as an independent check: power iteration, "LM" and the Hessian alone.

    Returns:
        The pairs; see `Eigenpairs`.

    Raises:
        ArgumentError: if an argument cannot work.

    Sources: lanczos1950, wu2000; yao2020 (PyHessian).
    """
    check_name("engine", engine, ENGINES)
    made = checked_operator(problem, operator)
    if engine == "pyhessian":
        if which != "LM":
            raise ArgumentError(f"which={which!r}: engine='pyhessian' finds the largest by absolute value, which='LM'.")
        return _by_pyhessian(made, checked_count("k", k, 1), tol, seed)
    return extremal(
        made,
        k,
        which,
        tol,
        max_matvecs=max_matvecs,
        max_basis=max_basis,
        verify=verify,
        seed=seed,
        progress=progress,
    )


def extremal(
    operator: Operator,
    k: int,
    which: str,
    tol: float,
    *,
    max_matvecs: int | None = None,
    max_basis: int | None = None,
    verify: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Eigenpairs:
    """Return extremal eigenpairs of an operator, as that of a layer; see `eigenpairs`.

    Args:
        operator: the matrix.
        k: number of pairs.
        which: "LA", "SA" or "LM".
        tol: tolerance relative to each eigenvalue.
        max_matvecs: products at most.
        max_basis: vectors held at most.
        verify: look for further copies of repeated eigenvalues.
        seed: of the start vector.
        progress: whether to show a bar.

    Returns:
        The pairs.

    Raises:
        ArgumentError: if an argument cannot work.
    """
    check_name("which", which, WHICH)
    if not tol > 0:
        raise ArgumentError(f"tol={tol!r} must be positive; the default is 1e-3, relative to each eigenvalue.")
    if checked_count("k", k, 1) > operator.size:
        raise ArgumentError(f"k={k} exceeds the number of parameters, {operator.size}.")
    budget = checked_count("max_matvecs", 200 + 10 * k if max_matvecs is None else max_matvecs, k, f"k={k} needs it.")
    basis = checked_count("max_basis", 40 + 4 * k if max_basis is None else max_basis, 2 * k + 2, f"For k={k}.")
    generator = torch.Generator().manual_seed(seed)
    search = _Search(operator, k, which, tol, min(basis, budget, operator.size), generator)
    with bar(budget, "eigenpairs", progress) as tick:
        search.run(budget, verify, tick)
    return search.result()


class _Search:
    """Lanczos until the wanted Ritz pairs have converged.

    What a start vector cannot see, copies of repeated eigenvalues and all outside an invariant subspace, is looked for
    in further blocks: the wanted pairs are locked and a fresh vector begins, until a block ends with nothing wanted.
    """

    def __init__(
        self, operator: Operator, k: int, which: str, tol: float, capacity: int, generator: torch.Generator
    ) -> None:
        self.operator, self.k, self.tol, self._generator = operator, k, tol, generator
        self._key = WHICH[which]
        self.krylov = Krylov(operator.matvec, operator.normal(generator), capacity)
        self._block = 0  # where the present block begins
        self._dropped = False  # whether locked pairs have remainders that the basis no longer knows

    def run(self, budget: int, verify: bool, tick: Any) -> None:
        krylov = self.krylov
        while True:
            krylov.step()
            tick.update()
            full = krylov.count == krylov.capacity
            if krylov.count == self.operator.size:
                return
            if not krylov.beta or full or krylov.count % _EVERY == 0:
                values, rotation, residuals = self.ritz()
                done = bool((residuals[: self.k] <= self.limits(values[: self.k])).all()) and len(values) >= self.k
                ended, hidden = self._judge(values, done, verify)
                if ended and done and not hidden:
                    return
                if self.operator.matvecs < budget and ended:
                    self._begin_block(rotation, values)
                elif self.operator.matvecs < budget and full:
                    self._shrink()
            if self.operator.matvecs >= budget:
                return

    def _judge(self, values: Array, done: bool, verify: bool) -> tuple[bool, bool]:
        """Tell whether the present block can end, and whether more of the wanted may be hidden from it."""
        krylov = self.krylov
        if not self._block:
            return done or not krylov.beta, verify or not krylov.beta
        found, inside = np.linalg.eigh(krylov.projected[self._block :, self._block :])
        best = int(np.argmax(self._key(found)))
        converged = krylov.beta * abs(inside[-1, best]) <= self.limits(found[best])
        if not done:
            return not krylov.beta, True
        worst = self._key(values[self.k - 1]) + 10 * krylov.noise
        return bool(converged), bool(self._key(found[best]) > worst)

    def ritz(self) -> tuple[Array, Array, Array]:
        """Return Ritz values, the wanted first, their vectors in the basis, and their residuals."""
        values, rotation = self._sorted(self.krylov.projected)
        return values, rotation, np.maximum(self.krylov.beta * np.abs(rotation[-1]), self.krylov.noise)

    def limits(self, values: Array) -> Array:
        """Return the largest residuals that count as converged; below round-off nothing can be asked for."""
        return np.maximum(self.tol * np.abs(values), 10 * self.krylov.noise)

    def _sorted(self, matrix: Array) -> tuple[Array, Array]:
        values, rotation = np.linalg.eigh(matrix)
        order = np.argsort(-self._key(values), kind="stable")
        return values[order], rotation[:, order]

    def _begin_block(self, rotation: Array, values: Array) -> None:
        krylov = self.krylov
        self._dropped |= krylov.beta > 0
        if krylov.count > self.k:
            krylov.restart(rotation[:, : self.k], values[: self.k])
        krylov.begin_block(self.operator.normal(self._generator))
        self._block = krylov.count

    def _shrink(self) -> None:
        """Keep the best Ritz vectors: of the present block, beside the wanted of those locked before it."""
        krylov, start = self.krylov, self._block
        locked, turned = self._sorted(krylov.projected[:start, :start])
        values, rotation = self._sorted(krylov.projected[start:, start:])
        lock = min(start, self.k)
        keep = min((0 if start else self.k) + max(1, (krylov.capacity - self.k) // 2), krylov.capacity - lock - 1)
        whole = np.zeros((krylov.count, lock + keep))
        whole[:start, :lock], whole[start:, lock:] = turned[:, :lock], rotation[:, :keep]
        krylov.restart(whole, np.concatenate([locked[:lock], values[:keep]]))
        self._block = lock

    def result(self) -> Eigenpairs:
        values, rotation, residuals = (x[..., : self.k] for x in self.ritz())
        vectors = self.krylov.vectors(rotation)
        if self._dropped:
            residuals = _residuals(self.operator, values, vectors)
        converged = residuals <= self.limits(values)
        return Eigenpairs(values, vectors, residuals, self.operator.matvecs, converged, self.tol)


def _residuals(operator: Operator, values: Array, vectors: Tensor) -> Array:
    apart: Tensor = operator.matmat(vectors) - vectors * torch.as_tensor(values).to(vectors)
    norms: Array = apart.norm(dim=0).double().cpu().numpy()
    return norms


def _by_pyhessian(operator: Operator, k: int, tol: float, seed: int) -> Eigenpairs:
    values, vectors, matvecs = peer.eigenvalues(operator, k, tol, seed)
    found = values.numpy()
    residuals = _residuals(operator, found, vectors)
    return Eigenpairs(found, vectors, residuals, matvecs, residuals <= tol * np.abs(found), tol)
