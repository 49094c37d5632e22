"""A plain trainer that knows nothing of normscope: what watches it attaches from outside."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from normscope.core.errors import ArgumentError


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross entropy of logits [..., classes] against classes [...], in nats."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Return the fraction of places where the largest of the logits [..., classes] is the class [...]."""
    return (output.argmax(-1) == target).double().mean()


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    on_step: Callable[[int, float], object] | None = None,
    progress: bool = True,
) -> list[float]:
    """Train in the mode that the model is in; equal seeds of model and batches give equal losses.

    Args:
        model: the model, on the device of the batches.
        optimizer: its optimizer.
        batches: (input, target), as many as steps or more; no more than steps are drawn.
        loss: from output and target to a scalar.
        steps: number of steps.
        on_step: called after each step with its number, from 0, and its loss.
        progress: whether to draw a progress bar on stderr.

    Returns:
        The loss of each step, taken before its update.

    Raises:
        ArgumentError: the batches ran out.
    """
    losses: list[float] = []
    bar = tqdm(range(steps), disable=not progress, mininterval=0.1 if sys.stderr.isatty() else 5.0)
    for step, (inputs, targets) in zip(bar, batches, strict=False):
        optimizer.zero_grad()
        value = loss(model(inputs), targets)
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        optimizer.step()
        losses.append(value.item())
        if on_step is not None:
            on_step(step, losses[-1])
    if len(losses) < steps:
        raise ArgumentError(f"batches ran out after {len(losses)} of steps={steps}; try an endless iterator.")
    return losses


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    metric: Callable[[Tensor, Tensor], Tensor] = accuracy,
) -> float:
    """Average a metric over batches in evaluation mode, weighted by their size; every module's mode is restored.

    Args:
        model: the model.
        batches: (input, target), finitely many: `zip(images.split(500), labels.split(500))` for whole tensors.
        metric: from output and target to the mean over a batch.

    Returns:
        The mean over all examples.

    Raises:
        ArgumentError: there are no batches.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        terms = [(len(inputs), float(metric(model(inputs), targets))) for inputs, targets in batches]
    finally:
        for module in training:
            module.training = True
    if not terms:
        raise ArgumentError("batches is empty; try zip(images.split(500), labels.split(500)).")
    return sum(size * value for size, value in terms) / sum(size for size, _ in terms)
