"""What the figures of this chapter train: perceptrons initialized as He et al. propose, on MNIST."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from normscope import workbench

Pair: TypeAlias = tuple[Tensor, Tensor]
NormFactory: TypeAlias = Callable[[int], nn.Module]


def perceptron(sizes: Sequence[int], norm: NormFactory | None, seed: int, *, bias: bool = True) -> nn.Sequential:
    """Build a ReLU perceptron with weights of variance 2/fan-in and biases of zero.

    Args:
        sizes: features of the input, of each hidden layer, of the output.
        norm: normalization before each ReLU from a number of features, None for none.
        seed: of the weights.
        bias: whether hidden layers have a bias.

    Returns:
        The network.
    """
    model = workbench.mlp(sizes, norm, bias=bias)
    initialize(model, seed)
    return model


def initialize(model: nn.Module, seed: int) -> None:
    """Draw the weights of all linear layers with variance 2/fan-in, and set their biases to zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Block(nn.Module):
    """A residual block of a perceptron: [N, width] to [N, width]."""

    def __init__(self, width: int, norm: NormFactory) -> None:
        """Build the parts; normalization and ReLU come before each linear layer."""
        super().__init__()
        self.norm1, self.linear1 = norm(width), nn.Linear(width, width)
        self.norm2, self.linear2 = norm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the stream."""
        branch = self.linear1(self.norm1(x).relu())
        added: Tensor = x + self.linear2(self.norm2(branch).relu())
        return added


def residual_perceptron(width: int, blocks: int, seed: int, *, last: bool) -> nn.Sequential:
    """Build a pre-activation residual perceptron with BatchNorm for MNIST.

    Args:
        width: features of the stream.
        blocks: number of blocks.
        seed: of the weights.
        last: whether BatchNorm and ReLU come before the last layer.

    Returns:
        The network, with modules `stem`, `block1`, ..., `norm` where `last`, and `head`.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Linear(784, width))
    for block in range(blocks):
        parts[f"block{block + 1}"] = Block(width, nn.BatchNorm1d)
    if last:
        parts["norm"] = nn.BatchNorm1d(width)
    parts["relu"] = nn.ReLU()
    parts["head"] = nn.Linear(width, 10)
    model = nn.Sequential(parts)
    initialize(model, seed)
    return model


def digits(seed: int) -> tuple[Pair, Pair]:
    """Return MNIST's training and test pair, images as vectors of 784."""
    images, labels = workbench.mnist()
    return workbench.split(images.flatten(1), labels, seed)
