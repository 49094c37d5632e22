"""Noise scale of the gradient: from the micro-batches of a step where there are enough, else from held samples.

With g the mean gradient of b samples, E |g|^2 = |G|^2 + tr(Sigma) / b. Two numbers are recorded, `signal`, an unbiased
estimate of |G|^2, and `square`, one of E |g|^2 at b = `chunk`; their ratio does not depend on how the loss is scaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from normscope.core.errors import Unmeasurable
from normscope.core.site import Site
from normscope.linalg.problem import HELD, Problem
from normscope.norms.recognize import NormParts
from normscope.probes import layout
from normscope.probes.noise import crossing, with_batch_statistics
from normscope.probes.summary import Row, channel_row
from normscope.probes.transfer import to_host

SITE = str(Site("", 0, "output"))
SAMPLES = 256  # held samples whose gradients a snapshot takes
FEWEST, MOST = 4, 8  # chunks that they are cut into
KEPT = 1 << 20  # elements of a gradient that are kept, evenly spread


def measure(problem: Problem, norms: Mapping[str, NormParts], batch: int) -> dict[str, list[Row]]:
    """Take the gradient of chunks of the held samples, and how far the gradients agree.

    Normalization layers are in training mode, all else in evaluation mode. Where one crosses the batch a chunk is as
    large as a training batch if there are four such, else smaller.

    Args:
        problem: model, loss and batches.
        norms: normalization layers of the model, by name.
        batch: samples in a forward pass of training.

    Returns:
        One row of the whole model in phase "noise"; none where there are too few samples. A model that does not run on
        so few is `Unmeasurable`.
    """
    layers = crossing(problem.model, norms)
    parts, chunk = chunks(problem.take(HELD), batch if layers else 1)
    held = [p for p in problem.model.parameters() if p.requires_grad and p.is_floating_point()]
    if len(parts) < FEWEST or not held or (layers and chunk < 2):
        return {}
    with with_batch_statistics(problem.model, layers), torch.enable_grad():
        products = _products(problem, parts, held)
    found = agreement(products) | {"chunk": float(chunk)}
    return {"noise": [channel_row(SITE, "gradient", {}, found)]}


def micro(squares: Sequence[float], batch: float) -> Row:
    """Return what the growing gradient of a step with several backward passes says.

    Args:
        squares: |g_1 + ... + g_k|^2 after the first k backward passes, k = 1, 2, ..., at least two.
        batch: samples in each of them.

    Returns:
        A row like that of `measure`, without errors, which the spread over steps gives.
    """
    first, last, k = squares[0], squares[-1] / len(squares) ** 2, len(squares)
    return channel_row(SITE, "gradient", {}, {"signal": (k * last - first) / (k - 1), "square": first, "chunk": batch})


def chunks(batches: Sequence[Any], wanted: int) -> tuple[list[Any], int]:
    """Cut held batches into chunks of equal size.

    Args:
        batches: the batches, any nesting of tensors, see `layout.cut`.
        wanted: samples in a chunk at least, if `FEWEST` of them can be had.

    Returns:
        `MOST` chunks at most, of `SAMPLES` samples together at most, and the samples in each; no chunk where there are
        too few samples, or they cannot be told apart.
    """
    sizes = [layout.batch_size((batch,), {}) for batch in batches[:MOST]]
    total = min(sum(sizes), SAMPLES)
    size = min(max(total // MOST, min(wanted, total // FEWEST)), min(sizes))
    if size < 1:
        return [], 0
    places = [(i, start) for i, n in enumerate(sizes) for start in range(0, n - size + 1, size)]
    found = [layout.cut(batches[i], sizes[i], start, size) for i, start in places[: min(MOST, max(total // size, 1))]]
    return ([], 0) if any(part is None for part in found) else (found, size)


def agreement(products: np.ndarray) -> dict[str, float]:
    """Return unbiased estimates of |G|^2 and E |g|^2 with standard errors.

    Args:
        products: [M, M] g_i . g_j of independent gradients, M at least 3.

    Returns:
        signal, the mean over pairs of different gradients, with its jackknife error signal_error; square, the mean of
        |g|^2, with square_error.
    """
    with np.errstate(all="ignore"):  # a diverged model has infinite gradients
        return _agreement(products)


def _agreement(products: np.ndarray) -> dict[str, float]:
    number, squares = len(products), products.diagonal()
    rows = products.sum(1) - squares
    without = (rows.sum() - 2 * rows) / ((number - 1) * (number - 2))  # the signal that all but one show
    spread = float(((without - without.mean()) ** 2).sum()) * (number - 1) / number
    return {
        "signal": float(rows.sum()) / (number * (number - 1)),
        "signal_error": spread**0.5,
        "square": float(squares.mean()),
        "square_error": float(squares.std(ddof=1)) / number**0.5,
    }


def _products(problem: Problem, parts: Sequence[Any], held: Sequence[nn.Parameter]) -> np.ndarray:
    """Return the inner products of the chunks' gradients, in a large model of every k-th element of them.

    Raises:
        Unmeasurable: if the model does not run on a chunk.
    """
    stride = -(-sum(p.numel() for p in held) // KEPT)
    kept = []
    for part in parts:
        try:
            output, target = problem.forward(problem.model, part)
            found = torch.autograd.grad(problem.loss(output, target), held, materialize_grads=True)
        except (RuntimeError, ValueError) as error:  # the model's own, as of a layer that takes no small batch
            raise Unmeasurable(f"the model does not run on a part of a batch ({error})") from error
        kept.append(torch.cat([_thinned(g, stride).to(held[0].device) for g in found]))
    gradients = torch.stack(kept).double()
    return to_host([gradients @ gradients.T])[0]


def _thinned(gradient: torch.Tensor, stride: int) -> torch.Tensor:
    """Return every k-th element, scaled so that its squared norm estimates that of the whole."""
    flat = (gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()).reshape(-1)
    return flat if stride == 1 else flat[::stride] * (len(flat) / len(flat[::stride])) ** 0.5
