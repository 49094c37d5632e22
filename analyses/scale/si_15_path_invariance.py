"""SI-15: steps that do not see how a ReLU network's weights are balanced."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import nn

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.scale.network import digits
from normscope import gradients, workbench

ID = "SI-15"
TITLE = "Path-SGD does not see how weights are balanced between nodes"
SOURCES = ("S113",)
CAPTION = (
    "A ReLU perceptron without normalization (784-32-32-10, float64, batch 64), trained from balanced weights and from "
    "weights of the same function in which each hidden unit's inputs are multiplied by a random factor (0.2 to 5) and "
    "its outputs divided by it. (a) Path-SGD takes the same path in function space from both, SGD does not; (b) the "
    "distance between the two runs."
)
COLUMNS = ("optimizer", "start", "step", "loss", "difference")

PATH, SGD = "Path-SGD", "SGD"
BALANCED, UNBALANCED = "balanced", "unbalanced"


@dataclass(frozen=True)
class Setting:
    """What is trained: layer sizes, batch size, rates of Path-SGD and SGD, spread of the factors, steps."""

    sizes: tuple[int, ...] = (784, 32, 32, 10)
    batch: int = 64
    path: float = 0.01
    sgd: float = 0.02
    spread: float = 5.0
    steps: int = 200
    every: int = 4


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(784, 16, 16, 10), steps=60) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train by both optimizers from both starts."""
    train, _ = digits(seed)
    parts = []
    for name in (PATH, SGD):
        base: list[float] = []
        for start in (BALANCED, UNBALANCED):
            torch.manual_seed(seed)
            model = workbench.mlp(setting.sizes, norm=None, bias=False).double()
            if start == UNBALANCED:
                _unbalance(model, setting.spread, seed)
            optimizer: torch.optim.Optimizer = (
                gradients.PathSGD(model.parameters(), lr=setting.path, model=model, shape=(setting.sizes[0],))
                if name == PATH
                else torch.optim.SGD(model.parameters(), lr=setting.sgd)
            )
            batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
            losses = workbench.fit(
                model, optimizer, batches, workbench.cross_entropy, steps=setting.steps, progress=False
            )
            base = base or losses
            rows = pd.DataFrame({"optimizer": name, "start": start, "step": range(setting.steps), "loss": losses})
            rows["difference"] = (rows["loss"] - pd.Series(base)).abs().cummax()
            parts.append(rows[rows["step"] % setting.every == 0])
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _unbalance(model: nn.Sequential, spread: float, seed: int) -> None:
    """Multiply the inputs of each hidden unit by a factor and divide its outputs by it."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for before, after in pairwise(layers):
            uniform = 2 * torch.rand(before.out_features, generator=generator, dtype=torch.float64) - 1
            factor = spread**uniform
            before.weight.mul_(factor[:, None])
            after.weight.div_(factor)


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that Path-SGD is blind to the balance, and SGD is not."""

    def largest(name: str) -> list[float]:
        return by_seed(frame[frame["optimizer"] == name], lambda rows: rows["difference"].max())

    path = frame[(frame["optimizer"] == PATH) & (frame["start"] == BALANCED)]
    statistic = "largest |loss from unbalanced - loss from balanced weights| over steps (nats)"
    return (
        at_most("Path-SGD is invariant to rescaling of nodes.", "S113, Path-SGD", statistic, largest(PATH), 1e-8),
        at_least(
            "SGD is not invariant to rescaling of nodes.", "S113, rescaling of nodes", statistic, largest(SGD), 0.1
        ),
        at_most(
            "Path-SGD trains.",
            "S113, experiments",
            "last loss over the first",
            by_seed(path, lambda rows: rows["loss"].iloc[-1] / rows["loss"].iloc[0]),
            0.5,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw losses, and the distance between the two starts."""
    losses, distances = style.panels(canvas, columns=2)
    for index, ((name, start), rows) in enumerate(frame.groupby(["optimizer", "start"], sort=False)):
        style.curve(losses, rows, "step", "loss", name=f"{name}, {start}", index=index)
        if start == UNBALANCED:
            shown = rows.assign(difference=rows["difference"].clip(lower=1e-17))
            style.curve(distances, shown, "step", "difference", name=str(name), index=index)
    distances.set_yscale("log")
    for ax in (losses, distances):
        ax.legend()
    style.label(losses, "loss", "step $t$", "training loss (nats)")
    style.label(distances, "unbalanced against balanced", "step $t$", "largest loss difference so far (nats)")
