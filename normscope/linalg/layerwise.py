"""Curvature layer by layer: largest eigenvalue and trace of each diagonal block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from normscope.linalg.arguments import checked_count, checked_operator
from normscope.linalg.extremal import extremal
from normscope.linalg.operator import Operator
from normscope.linalg.problem import Problem
from normscope.linalg.progress import bar
from normscope.linalg.trace import probed

if TYPE_CHECKING:
    import pandas as pd


def layerwise(
    problem: Problem,
    n: int = 30,
    which: str = "LA",
    operator: str = "hessian",
    tol: float = 1e-2,
    *,
    max_matvecs: int = 60,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Return extremal eigenvalue and trace of each layer's block of a curvature matrix.

    n products of the whole matrix give the traces of all blocks at once; the eigenvalues are of the blocks themselves.

    Args:
        problem: model, loss and batches.
        n: number of products for the traces.
        which: "LA" largest, "SA" smallest, "LM" largest by absolute value.
        operator: "hessian", "ggn", "fisher" or "mc-fisher".
        tol: tolerance of the eigenvalues, relative.
        max_matvecs: products at most for each layer's eigenvalue.
        seed: of the vectors.
        progress: True shows a bar, False none, None one on a terminal.

    Returns:
        A row for each layer, in the model's order: layer, size, eigenvalue, residual, converged, trace,
        trace_standard_error.

    Sources: yao2020, hutchinson1989.
    """
    import pandas as pd

    n = checked_count("n", n, 2, "A standard error needs two.")
    checked_count("max_matvecs", max_matvecs, 1)
    made = checked_operator(problem, operator)
    layers = list(dict.fromkeys(_layer(name) for name in made.names))
    traces = _traces(made, layers, n, seed, progress)
    rows = []
    for layer, samples in zip(layers, traces.T, strict=True):
        block = made.block([name for name in made.names if _layer(name) == layer])
        top = extremal(block, 1, which, tol, max_matvecs=max_matvecs, seed=seed, progress=False)
        error = samples.std(ddof=1) / n**0.5
        rows.append((layer, block.size, top.values[0], top.residuals[0], top.converged[0], samples.mean(), error))
    columns = ["layer", "size", "eigenvalue", "residual", "converged", "trace", "trace_standard_error"]
    return pd.DataFrame(rows, columns=columns)


def _traces(
    operator: Operator, layers: list[str], n: int, seed: int, progress: bool | None
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    found = np.zeros((n, len(layers)))
    with bar(n, "layerwise", progress) as tick:
        for sample, (v, product) in enumerate(probed(operator, n, torch.Generator().manual_seed(seed), tick)):
            for name, part in zip(operator.names, operator.split(v * product), strict=True):
                found[sample, layers.index(_layer(name))] += float(part.sum(dtype=torch.float64))
    return found


def _layer(name: str) -> str:
    return name.rpartition(".")[0].partition(".parametrizations")[0]
