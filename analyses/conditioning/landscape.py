"""How the loss changes along the gradient, through training: what CO-8, CO-9 and CO-10 show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pandas as pd
import torch
from torch import Tensor, nn

from analyses.conditioning.network import digits, perceptron
from normscope import workbench

NORMS: Final = {"none": None, "BatchNorm": nn.BatchNorm1d}


@dataclass(frozen=True)
class Landscape:
    """Network, training, how often it is looked at, and the step lengths over the learning rate."""

    width: int = 64
    depth: int = 10
    lr: float = 0.1
    batch: int = 128
    steps: int = 300
    every: int = 6
    lengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


SMALL: Final = Landscape(width=32, depth=6, steps=60, every=10, lengths=(0.5, 2.0, 4.0))


def explored(landscape: Landscape, seed: int) -> pd.DataFrame:
    """Train with and without BatchNorm, and look along -∇L from time to time, on the batch of the step.

    Args:
        landscape: what is trained.
        seed: of data, weights and batches.

    Returns:
        A frame with columns network, step, length r (the point is x - r η ∇L(x)), loss there, turn ‖∇L(x) - ∇L there‖,
        and smoothness, turn over r η ‖∇L(x)‖.
    """
    train, _ = digits(seed)
    rows = []
    for network, norm in NORMS.items():
        model = perceptron((784, *[landscape.width] * landscape.depth, 10), norm, seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=landscape.lr)
        batches = workbench.batches(*train, landscape.batch, torch.Generator().manual_seed(seed))
        for step, batch in zip(range(landscape.steps), batches, strict=False):
            if step % landscape.every == 0:
                rows += [(network, step, *values) for values in _along(model, batch, landscape)]
            workbench.fit(model, optimizer, [batch], workbench.cross_entropy, steps=1, progress=False)
    return pd.DataFrame(rows, columns=["network", "step", "length", "loss", "turn", "smoothness"])


def _along(
    model: nn.Module, batch: tuple[Tensor, Tensor], landscape: Landscape
) -> list[tuple[float, float, float, float]]:
    """Return length, loss, turn and smoothness at each point, the weights put back at the end."""
    weights = list(model.parameters())
    start = [weight.detach().clone() for weight in weights]
    _, gradient = _gradient(model, weights, batch)
    size = _norm(gradient)
    found = []
    for length in landscape.lengths:
        _place(weights, start, gradient, length * landscape.lr)
        loss, there = _gradient(model, weights, batch)
        turn = _norm([a - b for a, b in zip(gradient, there, strict=True)])
        found.append((length, loss, turn, turn / (length * landscape.lr * size)))
    _place(weights, start, gradient, 0.0)
    return found


def _gradient(
    model: nn.Module, weights: list[nn.Parameter], batch: tuple[Tensor, Tensor]
) -> tuple[float, list[Tensor]]:
    loss = workbench.cross_entropy(model(batch[0]), batch[1])
    return float(loss.detach()), list(torch.autograd.grad(loss, weights))


@torch.no_grad()
def _place(weights: list[nn.Parameter], start: list[Tensor], gradient: list[Tensor], length: float) -> None:
    for weight, origin, slope in zip(weights, start, gradient, strict=True):
        weight.copy_(origin - length * slope)


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt())
