"""A residual network of digits with representative batch normalization, and what the figures RB read from it."""

from __future__ import annotations

import functools
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normscope import norms, workbench

BN, CENTERING, SCALING, BOTH = "BatchNorm", "centering", "scaling", "both"
KINDS: Final = (BN, CENTERING, SCALING, BOTH)
CALIBRATION: Final = ("center_weight", "scale_weight", "scale_bias")
_FROZEN = {CENTERING: ("scale_weight", "scale_bias"), SCALING: ("center_weight",), BOTH: ()}
Pair = tuple[Tensor, Tensor]


def digits(seed: int, examples: int) -> tuple[Pair, Pair]:
    """Return MNIST averaged to 14 x 14 pixels: a training pair of so many examples, and the test pair."""
    images, labels = workbench.mnist()
    (inputs, targets), test = workbench.split(F.avg_pool2d(images, 2), labels, seed)
    return (inputs[:examples], targets[:examples]), test


@functools.cache
def trained(kind: str, seed: int, *, examples: int, epochs: int, channels: int = 8) -> nn.Sequential:
    """Train a residual network of three stages with BatchNorm, with one of the two calibrations, or with both.

    The weights of the calibrations learn ten times as fast and without decay, so that a short training moves them. The
    figures that one process computes share a network.

    Args:
        kind: one of `KINDS`.
        seed: of data, initialization and batches.
        examples: images trained on.
        epochs: passes over the data.
        channels: channels of the first stage.

    Returns:
        The network, in evaluation mode.
    """
    train, _ = digits(seed, examples)
    torch.manual_seed(seed)
    model = workbench.residual_cnn(channels, (1, 1, 1))
    if kind != BN:
        norms.convert(model, to="representative-batch")
    calibration, others = [], []
    for name, parameter in model.named_parameters():
        own = name.rpartition(".")[2]
        if own in CALIBRATION:
            parameter.requires_grad_(own not in _FROZEN[kind])
            calibration.append(parameter)
        else:
            others.append(parameter)
    groups = [{"params": others, "weight_decay": 5e-4}, {"params": calibration, "lr": 0.5}]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]], lr=0.05, momentum=0.9)
    batches = workbench.batches(*train, 50, torch.Generator().manual_seed(seed))
    steps = epochs * (len(train[0]) // 50)
    workbench.fit(model, optimizer, batches, workbench.cross_entropy, steps=steps, progress=False)
    return model.eval()


def layers(model: nn.Module) -> dict[str, norms.Norm]:
    """Return the calibrated layers by path, in the order in which they stand."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "center_weight")}


def stage(path: str) -> int:
    """Return the stage of a layer, 0 for the stem."""
    first = path.partition(".")[0]
    return int(first.removeprefix("stage")) if first.startswith("stage") else 0


@torch.no_grad()
def inputs(model: nn.Module, path: str, images: Tensor) -> Tensor:
    """Return what a layer receives."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[0].clone()
