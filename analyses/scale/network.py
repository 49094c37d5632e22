"""What the figures of this chapter train: a perceptron whose trained weights are all scale-invariant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normscope import workbench


def invariant_mlp(sizes: Sequence[int], *, normalized: bool = True, eps: float = 1e-30) -> nn.Sequential:
    """Build a perceptron in float64: linear, BatchNorm without parameters, ReLU; its head is frozen, its weights not.

    Args:
        sizes: features of the input, of each hidden layer, of the output.
        normalized: False leaves BatchNorm out.
        eps: of BatchNorm; torch accepts no 0, which exact invariance would ask for.

    Returns:
        The network.
    """

    def norm(features: int) -> nn.Module:
        return nn.BatchNorm1d(features, eps=eps, affine=False)

    model = workbench.mlp(sizes, norm=norm if normalized else None, bias=False).double()
    for parameter in model[-1].parameters():
        parameter.requires_grad_(False)
    return model


def weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def squared_norm(model: nn.Module) -> float:
    """Return the squared norm of all trained weights together."""
    return sum(float(weight.detach().square().sum()) for weight in weights(model))


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return MNIST's training and test pair, in float64."""
    images, labels = workbench.mnist()
    return workbench.split(images.to(torch.float64), labels, seed)
