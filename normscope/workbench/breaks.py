"""Breaks: known defects to put into the demo on purpose, each with the findings that must name it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normscope.norms.recognize import find_norms

Batches = Iterator[tuple[Tensor, Tensor]]
_POOL = 40  # batches that are sorted together


@dataclass(frozen=True)
class Break:
    """One defect.

    Attributes:
        text: what is done.
        findings: ids of which one must come up.
        models: models of the demo that it can be put into.
        change: puts it into (model, optimizer, batches) and returns the batches.
    """

    text: str
    findings: tuple[str, ...]
    models: tuple[str, ...]
    change: Callable[[nn.Module, torch.optim.Optimizer, Batches], Batches]


def _norms(**values: Any) -> Callable[[nn.Module, torch.optim.Optimizer, Batches], Batches]:
    """Set attributes of all normalization layers."""

    def change(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> Batches:
        for name in find_norms(model):
            for attribute, value in values.items():
                setattr(model.get_submodule(name), attribute, value)
        return batches

    return change


def _groups(name: str, factor: float) -> Callable[[nn.Module, torch.optim.Optimizer, Batches], Batches]:
    """Multiply a setting of the optimizer."""

    def change(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> Batches:
        for group in optimizer.param_groups:
            group[name] *= factor
        return batches

    return change


def _layer(
    names: tuple[str, ...], act: Callable[[Any], None]
) -> Callable[[nn.Module, torch.optim.Optimizer, Batches], Batches]:
    """Do something to the first of some layers that the model has."""

    def change(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> Batches:
        modules = dict(model.named_modules())
        with torch.no_grad():
            act(next(modules[name] for name in names if name in modules))
        return batches

    return change


def _evaluation_mode(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> Batches:
    model.eval()
    return batches


def _without_norm(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> Batches:
    block = model.get_submodule("block2")
    block.norm2 = nn.Identity()
    held = {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in held]
    return batches


def _sorted(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> Batches:
    while True:
        pool = [next(batches) for _ in range(_POOL)]
        inputs, targets = (torch.cat(part) for part in zip(*pool, strict=True))
        order = targets.argsort(stable=True)
        size = len(pool[0][0])
        chunks = torch.split(order, size)
        for place in torch.randperm(len(chunks), generator=torch.Generator().manual_seed(0)).tolist():
            yield inputs[chunks[place]], targets[chunks[place]]


def _small(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> Batches:
    for inputs, targets in batches:
        yield inputs[:2], targets[:2]


def _repeated(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> Batches:
    for inputs, targets in batches:
        few = torch.arange(len(inputs)) % (len(inputs) // 8)
        yield inputs[few], targets[few]


def _shift(norm: Any) -> None:
    norm.bias.sub_(8.0)


def _zero(norm: Any) -> None:
    norm.weight.zero_()
    norm.weight.requires_grad_(False)


def _freeze(layer: Any) -> None:
    layer.requires_grad_(False)


def _enlarge(norm: Any) -> None:
    norm.weight[5] = 3000.0


_EITHER, _CNN, _TRANSFORMER = ("cnn", "transformer"), ("cnn",), ("transformer",)
BREAKS: dict[str, Break] = {
    "eps": Break("eps of every norm is 1", ("structure.eps", "propagation.eps-dominates"), _EITHER, _norms(eps=1.0)),
    "momentum": Break(
        "running statistics take 1e-4 of each batch", ("mismatch.momentum",), _CNN, _norms(momentum=1e-4)
    ),
    "no-update": Break("momentum is 0", ("mismatch.never-updated", "mismatch.momentum"), _CNN, _norms(momentum=0.0)),
    "evaluation-mode": Break("the model is in evaluation mode", ("mismatch.evaluation-mode",), _CNN, _evaluation_mode),
    "fast": Break("the learning rate is 30 times higher", ("training.learning-rate",), _EITHER, _groups("lr", 30.0)),
    "slow": Break(
        "the learning rate is 100,000 times lower", ("training.learning-rate",), _EITHER, _groups("lr", 1e-5)
    ),
    "decay": Break("weight decay is 1000 times stronger", ("training.decay",), _EITHER, _groups("weight_decay", 1e3)),
    "sorted": Break("batches hold one class each", ("noise.batches-not-random",), _CNN, _sorted),
    "repeated": Break("each sample is in its batch eight times", ("noise.batches-not-random",), _CNN, _repeated),
    "small-batch": Break("batches hold two samples", ("noise.small-batch",), _CNN, _small),
    "dead-units": Break(
        "a bias before a ReLU is -8",
        ("propagation.dead-units",),
        _CNN,
        _layer(("stage2.block1.norm1",), _shift),
    ),
    "zero-gain": Break(
        "a norm's gain is 0 and frozen",
        ("scale.gain-collapse",),
        _EITHER,
        _layer(("stage2.block1.norm1", "block2.norm1"), _zero),
    ),
    "frozen-layer": Break(
        "one layer is frozen",
        ("training.untrained",),
        _EITHER,
        _layer(("stage2.block1.conv2", "block2.mlp.expand"), _freeze),
    ),
    "outlier-channel": Break(
        "one gain is 3000", ("propagation.outlier-channels",), _TRANSFORMER, _layer(("block2.norm2",), _enlarge)
    ),
    "missing-norm": Break("one block has one norm less", ("structure.missing-norm",), _TRANSFORMER, _without_norm),
}
