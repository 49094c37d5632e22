"""Networks of random weights with batch normalization, as mean-field theory looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "linear": lambda z: z,
    "ReLU": torch.relu,
    "tanh": torch.tanh,
}
_EPS: Final = 1e-12  # torch accepts no 0


def propagate(
    inputs: Tensor, depth: int, activation: str, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Propagate through square layers: linear without bias (variance 1/width), batch normalization, activation.

    Args:
        inputs: [batch, width].
        depth: number of layers.
        activation: one of `ACTIVATIONS`.
        generator: draws the weights.

    Returns:
        Outputs of the linear maps and of the activations, layer by layer; a cotangent of the last flows to all.
    """
    width = inputs.shape[1]
    x, linear, active = inputs, [], []
    for _ in range(depth):
        weight = torch.randn(width, width, generator=generator, dtype=inputs.dtype) / width**0.5
        h = (x @ weight.T).requires_grad_()
        x = ACTIVATIONS[activation](F.batch_norm(h, None, None, training=True, eps=_EPS))
        linear.append(h)
        active.append(x)
    return linear, active


def gradient_energies(linear: list[Tensor], active: list[Tensor], generator: torch.Generator) -> list[float]:
    """Return ‖∂L/∂h‖² of each layer for a random cotangent of the last activation.

    Args:
        linear: the h, in order.
        active: the activations.
        generator: draws the cotangent.

    Returns:
        One number for each layer.
    """
    cotangent = torch.randn(active[-1].shape, generator=generator, dtype=active[-1].dtype)
    slopes = torch.autograd.grad(active[-1], linear, cotangent)
    return [float(slope.square().sum()) for slope in slopes]
