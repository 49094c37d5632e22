"""What the figures of this chapter train: a perceptron whose trained weights are all scale-invariant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd
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
    """Return MNIST's training and test pair, in float64, the background at exactly 0.

    A pixel that never changes then has gradient 0; otherwise it is rounding noise, which Adam makes into steps.
    """
    images, labels = workbench.mnist()
    return workbench.split((images - images.amin()).to(torch.float64), labels, seed)


def relabeled(labels: Tensor, share: float, seed: int) -> Tensor:
    """Give a share of the examples a random class, so that gradients do not vanish as the network learns."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(len(labels), generator=generator) < share
    return torch.where(chosen, torch.randint(10, labels.shape, generator=generator), labels)


def watch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[tuple[Tensor, Tensor]], steps: int
) -> pd.DataFrame:
    """Train, and take every step of every trained weight.

    Args:
        model: the model.
        optimizer: its optimizer.
        batches: (inputs, targets).
        steps: number of steps.

    Returns:
        Columns step, layer (from 1), loss, norm (before the step), gradient (its norm), angle (between the weights
        before and after the step, radians).
    """
    watched = weights(model)
    before = [weight.detach().clone() for weight in watched]
    rows: list[tuple[int, int, float, float, float, float]] = []

    def on_step(step: int, loss: float) -> None:
        for layer, (old, weight) in enumerate(zip(before, watched, strict=True)):
            new = weight.detach()
            norm, gradient = float(old.norm()), float(weight.grad.norm()) if weight.grad is not None else 0.0
            # from the chord: the arc cosine of a cosine close to 1 has no digits left
            angle = 2 * math.asin(min(1.0, float((new / new.norm() - old / norm).norm()) / 2))
            rows.append((step, layer + 1, loss, norm, gradient, angle))
            old.copy_(new)

    workbench.fit(model, optimizer, batches, workbench.cross_entropy, steps=steps, on_step=on_step, progress=False)
    return pd.DataFrame(rows, columns=["step", "layer", "loss", "norm", "gradient", "angle"])


def windowed(frame: pd.DataFrame, width: int, by: Sequence[str]) -> pd.DataFrame:
    """Average over windows of steps; `step` becomes the middle of the window."""
    window = frame["step"] // width * width + width // 2
    return frame.assign(step=window).groupby([*by, "step"], sort=False, as_index=False).mean(numeric_only=True)
