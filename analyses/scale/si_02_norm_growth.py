"""SI-2: without weight decay the norm of scale-invariant weights grows by the squared steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.scale.network import digits, invariant_mlp, watch, weights
from normscope import workbench

ID = "SI-2"
TITLE = "Norm growth of scale-invariant weights under SGD"
SOURCES = ("S116", "S121")
CAPTION = (
    "SGD without momentum or decay (784-64-64-64-10, float64, η = 0.1, batch 128). (a) The growth of each layer's "
    "squared norm is the sum of its squared steps (dashed), since each gradient is orthogonal to the weights. (b) The "
    "effective learning rate therefore only falls. (c) Without normalization the identity fails."
)
COLUMNS = ("network", "layer", "step", "growth", "predicted", "rate")


@dataclass(frozen=True)
class Setting:
    """What is trained: layer sizes, batch size, learning rate η, steps, and how many of them are kept."""

    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    batch: int = 128
    lr: float = 0.1
    steps: int = 1000
    kept: int = 50


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(784, 16, 16, 10), steps=100) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train with and without BatchNorm."""
    train, _ = digits(seed)
    parts = []
    for network in ("BatchNorm", "none"):
        torch.manual_seed(seed)
        model = invariant_mlp(setting.sizes, normalized=network == "BatchNorm")
        optimizer = torch.optim.SGD(weights(model), lr=setting.lr)
        batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
        for layer, part in watch(model, optimizer, batches, setting.steps).groupby("layer"):
            norm = part["norm"].to_numpy()
            predicted = np.cumsum(setting.lr**2 * part["gradient"].to_numpy() ** 2)
            kept = np.unique(np.geomspace(1, setting.steps - 1, setting.kept).astype(int))
            rows = {
                "network": network,
                "layer": layer,
                "step": kept,
                "growth": (norm**2 - norm[0] ** 2)[kept],
                "predicted": predicted[kept - 1],
                "rate": setting.lr / norm[kept] ** 2,
            }
            parts.append(pd.DataFrame(rows))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the identity, and that it needs the normalization."""

    def gap(network: str) -> list[float]:
        part = frame[frame["network"] == network]
        return by_seed(part, lambda rows: (rows["growth"] / rows["predicted"] - 1).abs().max())

    normalized = frame[frame["network"] == "BatchNorm"]
    return (
        at_most(
            "The squared norm grows by the squared length of each step.",
            "S121, growth of the norm",
            "max over layers and steps of |(‖w_t‖² - ‖w_0‖²) / Σ η²‖g‖² - 1|",
            gap("BatchNorm"),
            1e-10,
        ),
        at_most(
            "The effective learning rate η/‖w‖² never rises without weight decay.",
            "S116, effective step size",
            "largest ratio of the effective learning rate to an earlier one, over layers",
            by_seed(
                normalized,
                lambda rows: max(float((p["rate"] / p["rate"].shift()).max()) for _, p in rows.groupby("layer")),
            ),
            1.0,
        ),
        at_least(
            "Without normalization the identity does not hold.",
            "S121, growth of the norm",
            "max over layers and steps of |(‖w_t‖² - ‖w_0‖²) / Σ η²‖g‖² - 1|",
            gap("none"),
            0.5,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw growth against its prediction, with and without BatchNorm, and the effective learning rate."""
    growth, rates, plain = style.panels(canvas, columns=3)
    for ax, network in ((growth, "BatchNorm"), (plain, "none")):
        for index, (layer, part) in enumerate(frame[frame["network"] == network].groupby("layer")):
            style.curve(ax, part, "step", "growth", name=f"layer {layer}", index=index)
            line = part.groupby("step")["predicted"].median()
            style.theory(ax, line.index, line, name=r"$\sum\eta^2\|g\|^2$" if index == 0 else "")
        ax.set(xscale="log", yscale="log")
        ax.legend()
    for index, (layer, part) in enumerate(frame[frame["network"] == "BatchNorm"].groupby("layer")):
        style.curve(rates, part, "step", "rate", name=f"layer {layer}", index=index)
    rates.set_xscale("log")
    rates.legend()
    style.label(growth, "BatchNorm", "step $t$", r"$\|w_t\|^2-\|w_0\|^2$")
    style.label(rates, "BatchNorm: effective rate", "step $t$", r"$\eta/\|w_t\|^2$")
    style.label(plain, "no normalization", "step $t$", r"$\|w_t\|^2-\|w_0\|^2$")
