"""A small model, data, and an optimizer of each row of the table."""

from __future__ import annotations

import torch
from torch import nn

from normscope.gradients import build, sample_gradients, zoo

ALL = tuple(zoo)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.AvgPool2d(1), nn.Flatten(), nn.Linear(36, 3))
    return nn.Sequential(*layers).double()


def batch(step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 1, 5, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (4,), generator=generator)


def made(name: str, model: nn.Module, params=None, **options) -> torch.optim.Optimizer:
    """Build a row's optimizer for a model, what the row needs besides included."""
    if name == "path-normalized":
        options = {"model": model, "shape": (1, 5, 5)} | options
    return build(name, list(model.parameters()) if params is None else params, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        sample_gradients(model, nn.functional.cross_entropy, *batch(step))
        optimizer.step()
