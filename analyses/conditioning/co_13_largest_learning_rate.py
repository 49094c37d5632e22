"""CO-13: which learning rates a deep network bears, with and without batch normalization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import nn

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.conditioning.network import digits, perceptron
from normscope import workbench

ID = "CO-13"
TITLE = "Batch normalization bears larger learning rates"
SOURCES = ("S135",)
CAPTION = (
    "A ReLU perceptron with 12 hidden layers of 64 (He initialization), MNIST, 150 steps of SGD with batches of 128. "
    "(a) Mean training loss of the last 15 steps by learning rate; runs that end in infinity or NaN are the crosses at "
    "the top, and the dotted line is guessing. (b) Loss by step at the best rate of each network."
)
COLUMNS = ("network", "lr", "step", "loss", "final")

NORMS: Final = {"none": None, "BatchNorm": nn.BatchNorm1d}
GUESS = math.log(10)


@dataclass(frozen=True)
class Setting:
    """Network, training, learning rates."""

    width: int = 64
    depth: int = 12
    batch: int = 128
    steps: int = 150
    every: int = 10
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(width=32, depth=8, steps=40, rates=(0.03, 0.3, 3.0)) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train with each learning rate; `final` is the mean over the last tenth of the steps, inf where it diverged."""
    train, _ = digits(seed)
    rows = []
    for network, norm in NORMS.items():
        for lr in setting.rates:
            model = perceptron((784, *[setting.width] * setting.depth, 10), norm, seed)
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
            losses: list[float] = []
            while len(losses) < setting.steps and all(map(math.isfinite, losses)):
                losses += workbench.fit(
                    model, optimizer, batches, workbench.cross_entropy, steps=setting.every, progress=False
                )
            last = losses[-setting.steps // 10 :]
            final = sum(last) / len(last) if all(map(math.isfinite, losses)) else math.inf
            for step in range(0, len(losses), setting.every):
                part = losses[step : step + setting.every]
                rows.append((network, lr, step, sum(part) / len(part), final))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _usable(part: pd.DataFrame, network: str) -> float:
    """Return the largest learning rate that ends below half of guessing."""
    good = part[(part["network"] == network) & (part["final"] < GUESS / 2)]
    return float(good["lr"].max())


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the largest usable rate, and what it buys."""
    return (
        at_least(
            "With BatchNorm far larger learning rates can be used.",
            "S135, learning rates and divergence",
            "largest learning rate that ends below half the loss of guessing, BatchNorm over none",
            by_seed(frame, lambda part: _usable(part, "BatchNorm") / _usable(part, "none")),
            10.0,
        ),
        at_least(
            "Without BatchNorm a large learning rate makes the loss diverge.",
            "S135, learning rates and divergence",
            "share of the rates from 1 up that end in infinity or NaN, none",
            by_seed(
                frame[(frame["network"] == "none") & (frame["lr"] >= 1)],
                lambda part: part.groupby("lr")["final"].first().map(math.isinf).mean(),
            ),
            0.99,
        ),
        at_most(
            "The best learning rate gives a better network with BatchNorm.",
            "S135, learning rates and divergence",
            "best final loss over rates, BatchNorm over none",
            by_seed(
                frame,
                lambda part: (
                    part.loc[part["network"] == "BatchNorm", "final"].min()
                    / part.loc[part["network"] == "none", "final"].min()
                ),
            ),
            1.0,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw final losses by rate, and the best run of each network."""
    final, best = style.panels(canvas, columns=2)
    top = 60.0
    for index, network in enumerate(NORMS):
        part = frame[frame["network"] == network]
        ends = part.groupby(["seed", "lr"])["final"].first().reset_index()
        sound = ends[ends["final"] < top]
        style.curve(final, sound, "lr", "final", name=network, index=index, points=True)
        lost = ends[ends["final"] >= top]
        final.plot(lost["lr"] * (1 + 0.06 * index), [top] * len(lost), "x", color=style.color(index), markersize=6)
        rate = ends.groupby("lr")["final"].median().idxmin()
        style.curve(best, part[part["lr"] == rate], "step", "loss", name=f"{network}, $\\eta$ = {rate:g}", index=index)
    style.rule(final, GUESS, "guessing, log 10")
    final.set(xscale="log", yscale="log", ylim=(0.08, 100))
    style.logarithmic(best)
    for ax in (final, best):
        ax.legend()
    style.label(final, "after 150 steps", r"learning rate $\eta$", "training loss (nats)")
    style.label(best, "best rate of each", "step $t$", "training loss (nats)")
