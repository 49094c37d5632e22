"""Trace and diagonal of a curvature matrix, estimated with a standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.core.estimate import Estimate, Status
from normscope.linalg import peer
from normscope.linalg.arguments import check_name, checked_count, checked_operator
from normscope.linalg.extremal import ENGINES
from normscope.linalg.lanczos import Array
from normscope.linalg.operator import Operator
from normscope.linalg.problem import Problem
from normscope.linalg.progress import bar
from normscope.linalg.spectrum import EXACT_BELOW, dense

if TYPE_CHECKING:
    import pandas as pd

_BLOCK = 8  # probes that share one run of a batch


def trace(
    problem: Problem,
    n: int = 100,
    method: str = "hutchinson",
    operator: str = "hessian",
    *,
    seed: int = 0,
    progress: bool | None = None,
    engine: str = "normscope",
) -> Estimate:
    """Return the trace of a curvature matrix A with its standard error, from a fixed number of products.

    - "hutchinson": the mean of v^T A v over n vectors of random signs. Best on the flat spectra that networks have.
    - "hutch++": tr(Q^T A Q) of a sketch Q of n/3 vectors, and Hutchinson on what it leaves out; for fast decay.
    - "xtrace": the same with each of n/2 vectors in both parts in turn, which uses every product twice.
    - "exact": the dense matrix, for small problems.

    "hutch++" and "xtrace" hold about n vectors.

    Args:
        problem: model, loss and batches.
        n: number of products.
        method: "hutchinson", "hutch++", "xtrace" or "exact".
        operator: "hessian", "ggn", "fisher" or "mc-fisher".
        seed: of the vectors.
        progress: True shows a bar, False none, None one on a terminal.
        engine: "normscope", or "pyhessian" as an independent check, for "hutchinson" and the Hessian alone.

    Returns:
        The trace; its standard error is 0 where it is exact.

    Raises:
        ArgumentError: if an argument cannot work.

    Sources: hutchinson1989; meyer2021 (hutch++); epperly2024 (xtrace); yao2020 (PyHessian).
    """
    check_name("method", method, METHODS)
    check_name("engine", engine, ENGINES)
    run, least, source = METHODS[method]
    n = checked_count("n", n, least, f"method={method!r} needs as many products for a standard error.")
    made = checked_operator(problem, operator)
    if engine == "pyhessian":
        if method != "hutchinson":
            raise ArgumentError(f"method={method!r}: engine='pyhessian' has 'hutchinson' alone.")
        return _mean(np.array(peer.trace_samples(made, n, seed)), "yao2020")
    with bar(made.size if method == "exact" else n, "trace", progress) as tick:
        samples, exact = run(made, n, torch.Generator().manual_seed(seed), tick)
    if exact is not None:
        return Estimate(exact, 0.0, n=made.matvecs, status=Status.EXACT, source=source)
    return _mean(samples, source)


def _mean(samples: Array, source: str) -> Estimate:
    error = float(samples.std(ddof=1) / len(samples) ** 0.5)
    return Estimate(float(samples.mean()), error, n=len(samples), source=source)


def probed(operator: Operator, n: int, generator: torch.Generator, tick: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Multiply vectors of random signs.

    Args:
        operator: the matrix A.
        n: how many.
        generator: of the signs.
        tick: the bar.

    Yields:
        v and A v.
    """
    for start in range(0, n, _BLOCK):
        block = torch.stack([operator.signs(generator) for _ in range(min(_BLOCK, n - start))], 1)
        products = operator.matmat(block)
        tick.update(block.shape[1])
        yield from zip(block.unbind(1), products.unbind(1), strict=True)


def _hutchinson(operator: Operator, n: int, generator: torch.Generator, tick: Any) -> tuple[Array, float | None]:
    pairs = probed(operator, n, generator, tick)
    return np.array([float(torch.dot(v.double(), product.double())) for v, product in pairs]), None


def _hutch(operator: Operator, n: int, generator: torch.Generator, tick: Any) -> tuple[Array, float | None]:
    """Return samples of the whole trace: each the sketch's part and one probe of the rest."""
    if operator.size <= n:
        return _dense(operator, n, generator, tick)
    third = n // 3
    sketch = torch.stack([operator.normal(generator) for _ in range(third)], 1)  # signs may be dependent
    q = _orthonormal(operator.matmat(sketch), operator)
    known = float((q * operator.matmat(q)).sum(dtype=torch.float64))
    tick.update(third + q.shape[1])
    if q.shape[1] < third:  # the sketch holds the whole range
        return np.empty(0), known
    probes = torch.stack([operator.signs(generator) for _ in range(third)], 1)
    rest = probes - q @ (q.T @ probes)
    tick.update(third)
    return known + (rest * operator.matmat(rest)).sum(0, dtype=torch.float64).cpu().numpy(), None


def _xtrace(operator: Operator, n: int, generator: torch.Generator, tick: Any) -> tuple[Array, float | None]:
    """Return one estimate for each vector left out of the sketch.

    Leaving out vector i takes the direction Q s_i from the sketch, s_i the normalized i-th column of R^-T. With
    P_i = I - s_i s_i^T, H = Q^T A Q, x = P_i Q^T v_i and t = Q^T A v_i the estimate is
    tr(P_i H) + c_i (v_i^T A v_i - 2 x^T t + x^T H x); c_i puts the rest of v_i on the sphere that its mean has.
    """
    if operator.size <= n:
        return _dense(operator, n, generator, tick)
    half = n // 2
    vectors = torch.stack([operator.normal(generator) for _ in range(half)], 1)
    images = operator.matmat(vectors)
    q, r = torch.linalg.qr(images)
    if (whole := _orthonormal(images, operator)).shape[1] < half:
        q = whole
    again = operator.matmat(q)
    tick.update(half + q.shape[1])
    h = (q.T @ again).double()
    if q.shape[1] < half:
        return np.empty(0), float(h.trace())
    s = torch.linalg.solve_triangular(r.double().T, torch.eye(half, dtype=torch.float64, device=r.device), upper=False)
    s = s / s.norm(dim=0)
    w, t = (q.T @ vectors).double(), (again.T @ vectors).double()
    x = w - s * (s * w).sum(0)
    left = vectors.double().square().sum(0) - x.square().sum(0)
    scale = (operator.size - half + 1) / left
    quadratic = (vectors.double() * images.double()).sum(0) - 2 * (x * t).sum(0) + (x * (h @ x)).sum(0)
    return (h.trace() - (s * (h @ s)).sum(0) + scale * quadratic).cpu().numpy(), None


def _dense(operator: Operator, n: int, generator: torch.Generator, tick: Any) -> tuple[Array, float | None]:
    if operator.size >= EXACT_BELOW:
        raise ArgumentError(
            f"method='exact' forms a matrix of {operator.size:,} parameters; below {EXACT_BELOW:,} it does. "
            "Use method='hutchinson', or parameters= of Problem."
        )
    return np.empty(0), float(np.trace(dense(operator, False)))


def _orthonormal(columns: Tensor, operator: Operator) -> Tensor:
    """Return an orthonormal basis of the columns' span, without directions that are round-off."""
    q, r = torch.linalg.qr(columns)
    u, values, _ = torch.linalg.svd(r)
    eps = torch.finfo(operator.dtype).eps
    rank = int((values > 10 * eps * len(values) * values[:1].clamp_min(torch.finfo(operator.dtype).tiny)).sum())
    basis: Tensor = q @ u[:, :rank]
    return basis


_Method = Callable[[Operator, int, torch.Generator, Any], tuple[Array, "float | None"]]
METHODS: dict[str, tuple[_Method, int, str]] = {
    "hutchinson": (_hutchinson, 2, "hutchinson1989"),
    "hutch++": (_hutch, 6, "meyer2021"),
    "xtrace": (_xtrace, 4, "epperly2024"),
    "exact": (_dense, 1, ""),
}


@dataclass(frozen=True, repr=False)
class Diagonal:
    """The diagonal of a curvature matrix.

    Attributes:
        values: an entry for each parameter, `[size]`, in the order of `Problem.names`.
        standard_errors: of each.
        n: number of products.
        parts: name and length of each parameter.
    """

    values: Array
    standard_errors: Array
    n: int
    parts: tuple[tuple[str, int], ...]

    def frame(self) -> pd.DataFrame:
        """Return mean, least and largest entry of each parameter as a frame."""
        import pandas as pd

        ends = np.cumsum([0, *(length for _, length in self.parts)])
        pieces = [self.values[a:b] for a, b in pairwise(ends)]
        rows = [(name, len(x), x.mean(), x.min(), x.max()) for (name, _), x in zip(self.parts, pieces, strict=True)]
        return pd.DataFrame(rows, columns=["parameter", "size", "mean", "min", "max"])

    def __repr__(self) -> str:
        """Say how it was obtained."""
        return f"Diagonal({len(self.values):,} entries of mean {self.values.mean():.4g}, {self.n} matvecs)"


def diagonal(
    problem: Problem,
    n: int = 100,
    operator: str = "hessian",
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> Diagonal:
    """Return the diagonal of a curvature matrix A: the mean of v * (A v) over vectors v of random signs.

    Args:
        problem: model, loss and batches.
        n: number of products.
        operator: "hessian", "ggn", "fisher" or "mc-fisher".
        seed: of the vectors.
        progress: True shows a bar, False none, None one on a terminal.

    Returns:
        The diagonal with a standard error for each entry.

    Source: bekas2007.
    """
    n = checked_count("n", n, 2, "A standard error needs two.")
    made = checked_operator(problem, operator)
    total = torch.zeros(made.size, dtype=torch.float64, device=made.device)
    squares = total.clone()
    with bar(n, "diagonal", progress) as tick:
        for count, (v, product) in enumerate(probed(made, n, torch.Generator().manual_seed(seed), tick), 1):
            apart = (v * product).double() - total
            total += apart / count
            squares += apart.square() * ((count - 1) / count)
    errors = (squares / (n - 1) / n).sqrt()
    sizes = [part.numel() for part in made.split(total)]
    return Diagonal(total.cpu().numpy(), errors.cpu().numpy(), n, tuple(zip(made.names, sizes, strict=True)))
