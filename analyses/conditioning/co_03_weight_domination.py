"""CO-3: a learning rate so large that weights outgrow their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import nn

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.conditioning.network import digits, perceptron
from normscope import workbench

ID = "CO-3"
TITLE = "Weight domination: a false local minimum under batch normalization"
SOURCES = ("huang2020layerwise",)
CAPTION = (
    "Perceptron with 8 hidden layers of 64 and BatchNorm, 1024 MNIST digits, full-batch gradient descent. With η = 30 "
    "(a) the loss stands still above that of guessing, (b) the largest singular value of the gradient of layer 4 is "
    "nothing beside that of its weights, since (c) the first steps have blown these up and the gradient falls as "
    "1/‖W‖. It looks like a local minimum, and is none: what is stuck is the ratio. Below 10⁻¹² is drawn there."
)
COLUMNS = ("lr", "step", "loss", "weight", "ratio")


@dataclass(frozen=True)
class Setting:
    """Network, data, learning rates, steps; of which hidden layer singular values are taken."""

    width: int = 64
    depth: int = 8
    images: int = 1024
    rates: tuple[float, ...] = (0.3, 3.0, 30.0)
    steps: int = 150
    layer: int = 4


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(width=32, images=256, steps=60) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train with each learning rate, and take singular values before each step."""
    (images, labels), _ = digits(seed)
    batch = images[: setting.images], labels[: setting.images]
    rows = []
    for lr in setting.rates:
        model = perceptron((784, *[setting.width] * setting.depth, 10), nn.BatchNorm1d, seed)
        weight = model.get_parameter(f"layer{setting.layer}.linear.weight")
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for step in range(setting.steps):
            size = float(torch.linalg.matrix_norm(weight.detach(), 2))
            (loss,) = workbench.fit(model, optimizer, [batch], workbench.cross_entropy, steps=1, progress=False)
            slope = float(torch.linalg.matrix_norm(weight.grad, 2)) if weight.grad is not None else 0.0
            rows.append((lr, step, loss, size, slope / size))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the state that the largest learning rate leads to."""
    largest = frame[frame["lr"] == frame["lr"].max()]
    smallest = frame[frame["lr"] == frame["lr"].min()]
    return (
        at_least(
            "With a too large learning rate the loss gets stuck above that of guessing.",
            "huang2020layerwise, batch normalized networks",
            "smallest loss of the last 20 steps over log 10, largest learning rate",
            by_seed(largest, lambda part: part["loss"].iloc[-20:].min() / 2.302585),
            0.9,
        ),
        at_most(
            "Where it is stuck the gradient is nothing beside the weights.",
            "huang2020layerwise, batch normalized networks",
            "smax(∂L/∂W)/smax(W) of layer 4, last step, largest learning rate",
            by_seed(largest, lambda part: part["ratio"].iloc[-1]),
            1e-6,
        ),
        at_least(
            "The first steps have blown the weights up.",
            "huang2020layerwise, batch normalized networks",
            "smax(W) of layer 4, last step over first, largest learning rate",
            by_seed(largest, lambda part: part["weight"].iloc[-1] / part["weight"].iloc[0]),
            10.0,
        ),
        at_most(
            "A moderate learning rate trains the same network.",
            "huang2020layerwise, batch normalized networks",
            "last loss, smallest learning rate",
            by_seed(smallest, lambda part: part["loss"].iloc[-1]),
            0.1,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw loss, ratio and weights by step."""
    loss, ratio, weight = style.panels(canvas, columns=3)
    for index, (lr, part) in enumerate(frame.groupby("lr")):
        shown = part.assign(ratio=part["ratio"].clip(lower=1e-12))
        for ax, column in ((loss, "loss"), (ratio, "ratio"), (weight, "weight")):
            style.curve(ax, shown, "step", column, name=f"$\\eta$ = {lr:g}", index=index)
    style.rule(loss, 2.302585, "guessing, log 10")
    for ax in (loss, ratio, weight):
        ax.set_yscale("log")
        ax.legend()
    weight.legend(loc="center right")
    style.label(loss, "loss", "step $t$", "training loss (nats)")
    style.label(ratio, "gradient to weights", "step $t$", r"$s_{\max}(\partial L/\partial W)\,/\,s_{\max}(W)$")
    style.label(weight, "weights", "step $t$", r"$s_{\max}(W)$ of layer 4")
