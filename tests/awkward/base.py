"""What an awkward model and its training run consist of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from normscope.linalg.problem import Problem


@dataclass(frozen=True)
class Job:
    """A training run: `step()` does one iteration, as a user would write it."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    step: Callable[[], object]
    scaler: Any = None
    problem: Problem | None = None


@dataclass(frozen=True)
class Case:
    """An awkward model and the sites by which one sees that it was understood."""

    name: str
    build: Callable[[], Job]
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()  # sites whose gradient must have been recorded
    steps: int = 4
    skipped: tuple[int, ...] = ()  # steps that the gradient scaler skipped
    finite: bool = True  # whether all that was recorded must be finite where it is defined
    raises: type[Exception] | None = None  # the user's own error, in the last step


class CaseError(Exception):
    """The user's own error."""


def loss_of(output: object) -> torch.Tensor:
    """Return a loss for anything that a model returns."""
    if hasattr(output, "__dataclass_fields__"):
        output = [getattr(output, name) for name in output.__dataclass_fields__]
    parts = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    return sum((t - 0.1).abs().pow(2).mean().to(torch.float64) for t in parts)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, momentum=0.9, weight_decay=1e-3)


def job(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float32, held: bool = False, **others: Any) -> Job:
    """Train on random inputs, drawn at every step from torch's own generator, so that a moved random state shows."""
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(torch.randn(*shape, dtype=dtype))).backward()
        optimizer.step()

    if held:
        batch = torch.linspace(-1, 1, int(np.prod(shape)), dtype=dtype).reshape(shape)
        others["problem"] = Problem(model, lambda output, _: loss_of(output.clone().requires_grad_()), [(batch, 0)])
    return Job(model, (optimizer,), step, **others)


class Wrap(nn.Module):
    """A model whose forward is a function of its parts."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.ReLU(), nn.Linear(6, 2))
