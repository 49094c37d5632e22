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
from torch.utils import _pytree as pytree

from normscope.core.site import Site
from normscope.linalg.problem import Problem
from normscope.norms.recognize import NormParts
from normscope.probes import layout
from normscope.probes.noise import crossing, with_batch_statistics
from normscope.probes.summary import Row, channel_row
from normscope.probes.transfer import to_host

SITE = str(Site("", 0, "output"))
SAMPLES = 256  # held samples whose gradients a snapshot takes
FEWEST, MOST = 4, 8  # chunks that they are cut into


def measure(problem: Problem, norms: Mapping[str, NormParts], batch: int) -> dict[str, list[Row]]:
    """Take the gradient of chunks of the held samples, and how far the gradients agree.

    Normalization layers are in training mode, all else in evaluation mode. Where one crosses the batch a chunk is as
    large as a training batch if there are four such, else smaller.

    Args:
        problem: model, loss and batches.
        norms: normalization layers of the model, by name.
        batch: samples in a forward pass of training.

    Returns:
        One row of the whole model in phase "noise"; none where there are too few samples.
    """
    layers = crossing(problem.model, norms)
    parts, chunk = chunks(problem.batches, batch if layers else 1)
    held = [p for p in problem.model.parameters() if p.requires_grad]
    if len(parts) < FEWEST or not held or (layers and chunk < 2):
        return {}
    with with_batch_statistics(problem.model, layers), torch.enable_grad():
        squares, products = _sums(problem, parts, held)
    found = agreement(squares, products) | {"chunk": float(chunk)}
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
        batches: the batches, any nesting of tensors whose first dimension is the sample.
        wanted: samples in a chunk at least, if `FEWEST` of them can be had.

    Returns:
        `MOST` chunks at most, of `SAMPLES` samples together at most, and the samples in each; no chunk where there are
        too few samples.
    """
    sizes = [layout.batch_size((batch,), {}) for batch in batches[:MOST]]
    total = min(sum(sizes), SAMPLES)
    size = min(max(total // MOST, min(wanted, total // FEWEST)), min(sizes))
    if size < 1:
        return [], 0
    places = [(i, start) for i, n in enumerate(sizes) for start in range(0, n - size + 1, size)]
    found = [_cut(batches[i], sizes[i], start, size) for i, start in places[: min(MOST, max(total // size, 1))]]
    return found, size


def agreement(squares: np.ndarray, products: np.ndarray) -> dict[str, float]:
    """Return unbiased estimates of |G|^2 and E |g|^2 with standard errors.

    Args:
        squares: [M] |g_j|^2.
        products: [M] g_j . (g_1 + ... + g_(j - 1)), the first of them 0.

    Returns:
        signal, signal_error, square and square_error. Given the gradients before it, products[j] / j is an estimate of
        |G|^2 by itself; the errors are those of a weighted mean of these, and of a mean.
    """
    number, weights = len(squares), np.arange(len(squares), dtype=float)
    signal = float(products.sum() / weights.sum())
    single = products[1:] / weights[1:]
    spread = float((weights[1:] ** 2 * (single - signal) ** 2).sum()) * (number - 1) / (number - 2)
    return {
        "signal": signal,
        "signal_error": spread**0.5 / float(weights.sum()),
        "square": float(squares.mean()),
        "square_error": float(squares.std(ddof=1)) / number**0.5,
    }


def _sums(problem: Problem, parts: Sequence[Any], held: Sequence[nn.Parameter]) -> tuple[np.ndarray, np.ndarray]:
    """Return squares and products of the chunks' gradients; two gradients are in memory at a time."""
    total: list[torch.Tensor] = []
    dots: list[torch.Tensor] = []
    for part in parts:
        output, target = problem.forward(problem.model, part)
        found = torch.autograd.grad(problem.loss(output, target), held, allow_unused=True)
        gradient = [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(held, found, strict=True)]
        total = total or [torch.zeros_like(g) for g in gradient]
        dots += [_dot(gradient, gradient), _dot(gradient, total)]
        total = list(torch._foreach_add(total, gradient))
    values = np.array([float(value) for value in to_host(dots)])
    return values[::2], values[1::2]


def _dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    here = a[0].device
    terms = [torch.dot(x.reshape(-1), y.reshape(-1)).double().to(here) for x, y in zip(a, b, strict=True)]
    return torch.stack(terms).sum()


def _cut(batch: Any, size: int, start: int, length: int) -> Any:
    """Return some samples of a batch; what does not have its first dimension is for all samples."""

    def part(value: Any) -> Any:
        whole = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == size
        return value[start : start + length] if whole else value

    return pytree.tree_map(part, batch)
