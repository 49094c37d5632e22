"""Residual networks of which only a few parameters are trained."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normscope import workbench

BN_ONLY, TWO, HEAD, ALL = "only γ and β", "two weights a channel", "only the head", "all"
WAYS: Final = (BN_ONLY, TWO, HEAD, ALL)
Pair = tuple[Tensor, Tensor]


def small_digits(seed: int, examples: int) -> tuple[Pair, Pair]:
    """Return MNIST averaged to 7 x 7 pixels: a training pair of so many examples, and the test pair."""
    images, labels = workbench.mnist()
    (inputs, targets), test = workbench.split(F.avg_pool2d(images, 4), labels, seed)
    return (inputs[:examples], targets[:examples]), test


class Block(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, added to what comes in: [N, C, H, W] to the same."""

    def __init__(self, channels: int) -> None:
        """Build the parts."""
        super().__init__()
        self.branch = nn.Sequential(
            *(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)),
            *(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        added: Tensor = x + self.branch(x)
        return added


def network(channels: int, depth: int) -> nn.Sequential:
    """Build a residual network, BatchNorm before each convolution, with He's initialization; its head sees 2 x 2."""
    model = nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False),
        *(Block(channels) for _ in range(depth)),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * channels, 10),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


def trained(
    way: str, depth: int, train: Pair, seed: int, *, channels: int = 16, epochs: int = 20, rate: float = 0.1
) -> nn.Module:
    """Train a residual network in one of several ways, all else as it was initialized.

    γ is drawn from [0, 1] and β is 0 at first, as published.

    Args:
        way: "only γ and β" of BatchNorm; "two weights a channel", of each convolution, drawn at random, as many as
            there are γ and β; "only the head"; "all".
        depth: residual blocks.
        train: images and labels.
        seed: of initialization, choice and batches.
        channels: channels.
        epochs: passes over the data.
        rate: first learning rate, which falls to 0 as a cosine.

    Returns:
        The network.
    """
    torch.manual_seed(seed)
    model = network(channels, depth)
    for norm in norm_layers(model):
        nn.init.uniform_(norm.weight)
    chosen = _chosen(model, way)
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is other for other in chosen))
    batches = workbench.batches(*train, 100, torch.Generator().manual_seed(seed))
    steps = epochs * (len(train[0]) // 100)
    optimizer = torch.optim.SGD(chosen, lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    workbench.fit(
        model,
        optimizer,
        batches,
        workbench.cross_entropy,
        steps=steps,
        on_step=lambda step, loss: schedule.step(),
        progress=False,
    )
    return model


def norm_layers(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Return the BatchNorm layers."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def _chosen(model: nn.Sequential, way: str) -> list[nn.Parameter]:
    if way == ALL:
        return list(model.parameters())
    if way == HEAD:
        return list(model[-1].parameters())
    if way == BN_ONLY:
        return [parameter for norm in norm_layers(model) for parameter in norm.parameters()]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        _train_two(convolution.weight)
    return [parameter for convolution in convolutions for parameter in convolution.parameters()]


def _train_two(weight: Tensor) -> None:
    """Let the gradient of all but two weights a channel, drawn at random, be 0, so that SGD leaves them alone."""
    mask = torch.zeros_like(weight).flatten(1)
    mask.scatter_(1, torch.rand_like(mask).topk(2, dim=1).indices, 1.0)
    kept = mask.view_as(weight)
    weight.register_hook(lambda gradient: gradient * kept)  # type: ignore[no-untyped-call]
