"""Setups: small healthy training runs of three families, and the loop that trains one with normscope attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normscope as ns
from normscope import workbench

Batch = tuple[Any, Any]


@dataclass
class Setup:
    """A training run before it begins; a defect changes it in place.

    Attributes:
        model: what is trained.
        optimizers: they step together, in this order.
        batches: endless `(input, target)`.
        held: the batch of the problem given to attach.
        loss: `loss(output, target)`.
        steps: optimizer steps.
        every: distance of sampled steps.
        accumulate: micro-batches a step.
        clip: largest gradient norm, None for no clipping.
        scaler: gradient scaler, None for none.
        autocast: type of autocast, None for none.
        clears: whether gradients are cleared before each step.
        before: called with the step before it.
        after: called with the step after it.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    batches: Iterator[Batch]
    held: Batch
    loss: Callable[[Any, Any], torch.Tensor] = workbench.cross_entropy
    steps: int = 100
    every: int = 5
    accumulate: int = 1
    clip: float | None = None
    scaler: torch.amp.GradScaler | None = None
    autocast: torch.dtype | None = None
    clears: bool = True
    before: list[Callable[[int], None]] = field(default_factory=list)
    after: list[Callable[[int], None]] = field(default_factory=list)


def train(setup: Setup, run: Path | None = None) -> ns.Record:
    """Train a setup to its end, attached, and return the record."""
    held = setup.held
    problem = ns.Problem(setup.model, setup.loss, [held]) if setup.autocast is None else None
    with ns.attach(
        setup.model, setup.optimizers, run=run, every=setup.every, problem=problem, scaler=setup.scaler
    ) as scope:
        for step in range(setup.steps):
            for act in setup.before:
                act(step)
            scope.step(loss=_step(setup))
            for act in setup.after:
                act(step)
    return scope.record()


def _step(setup: Setup) -> float:
    if setup.clears:
        for optimizer in setup.optimizers:
            optimizer.zero_grad()
    total = 0.0
    for _ in range(setup.accumulate):
        inputs, targets = next(setup.batches)
        with torch.autocast("cpu", setup.autocast or torch.bfloat16, enabled=setup.autocast is not None):
            loss = setup.loss(setup.model(inputs), targets) / setup.accumulate
        (loss if setup.scaler is None else setup.scaler.scale(loss)).backward()
        total += float(loss.detach())
    if setup.clip is not None:
        nn.utils.clip_grad_norm_(setup.model.parameters(), setup.clip)
    for optimizer in setup.optimizers:
        if setup.scaler is None:
            optimizer.step()
        else:
            setup.scaler.step(optimizer)
    if setup.scaler is not None:
        setup.scaler.update()
    return total


# ---- the three families ----------------------------------------------------------------------------------------------


@cache
def digits() -> tuple[Batch, Batch]:
    """Return the training and the test digits."""
    return workbench.split(*workbench.mnist(), seed=0)


@cache
def prose() -> tuple[torch.Tensor, int]:
    """Return tokens and the size of their vocabulary: ASCII alone, whatever the version of Python."""
    tokens, vocabulary = workbench.text()
    codes = torch.tensor([min(ord(character), 127) for character in vocabulary])
    return codes[tokens], 128


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return the usual two parameter groups: matrices with decay, vectors without."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": decay}] + [{"params": vectors, "weight_decay": 0.0}] * bool(vectors)


def sgd(model: nn.Module, lr: float = 0.05, decay: float = 5e-4, momentum: float = 0.9) -> torch.optim.SGD:
    """Return SGD with momentum and the usual two groups."""
    return torch.optim.SGD(groups(model, decay), lr=lr, momentum=momentum)


def adamw(model: nn.Module, lr: float = 2e-3, decay: float = 0.1) -> torch.optim.AdamW:
    """Return AdamW with the usual two groups."""
    return torch.optim.AdamW(groups(model, decay), lr=lr)


def stream(batch: int, seed: int = 0) -> Iterator[Batch]:
    """Return endless random batches of training digits."""
    return workbench.batches(*digits()[0], batch, torch.Generator().manual_seed(seed))


def held_digits(n: int = 128) -> Batch:
    """Return test digits."""
    images, labels = digits()[1]
    return images[:n], labels[:n]


def group_norm(channels: int) -> nn.GroupNorm:
    """Return GroupNorm with four channels a group."""
    return nn.GroupNorm(max(1, channels // 4), channels)


def cnn(norm: Any = nn.BatchNorm2d, *, channels: int = 8, blocks: tuple[int, ...] = (1, 1), batch: int = 32) -> Setup:
    """Build a residual CNN on digits with SGD."""
    model = workbench.residual_cnn(channels, blocks, norm)
    return Setup(model, [sgd(model)], stream(batch), held_digits())


def mlp(
    norm: Any = nn.BatchNorm1d, *, width: int = 48, depth: int = 4, batch: int = 64, model: nn.Module | None = None
) -> Setup:
    """Build a perceptron on digits with SGD."""
    model = model or workbench.mlp([784, *[width] * depth, 10], norm)
    return Setup(model, [sgd(model)], stream(batch), held_digits())


def transformer(norm: Any = nn.LayerNorm, *, width: int = 32, layers: int = 2, batch: int = 8) -> Setup:
    """Build a pre-norm decoder of characters with AdamW."""
    tokens, vocabulary = prose()
    context = 32
    model = workbench.transformer(vocabulary, width, layers, 4, context, norm=norm)
    cut = len(tokens) * 9 // 10
    batches = workbench.windows(tokens[:cut], batch, context, torch.Generator().manual_seed(0))
    held = next(workbench.windows(tokens[cut:], 16, context, torch.Generator().manual_seed(1)))
    return Setup(model, [adamw(model)], batches, held, every=10)
