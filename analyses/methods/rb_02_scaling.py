"""RB-2: the weights of scaling calibration by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.methods.representative import BOTH, layers, stage, trained

ID = "RB-2"
TITLE = "Scaling calibration: its weights by layer"
SOURCES = ("S062",)
CAPTION = (
    "Representative batch normalization multiplies the standardized input of each layer by $\\sigma(w_v K_s + "
    "w_b)$, K the mean of a channel of the example at hand, $w_v$ = 0 and $w_b$ = 1 at first. The network of "
    "RB-1: mean over the channels of a layer (a) of $w_v$ and its absolute value, (b) of $w_b$ (red: where it "
    "started)."
)
COLUMNS = ("layer", "path", "stage", "scale", "absolute", "largest", "bias")


@dataclass(frozen=True)
class Setting:
    """What is trained: examples, passes over the data."""

    examples: int = 1000
    epochs: int = 6


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(examples=200, epochs=3) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train, and read the weights."""
    model = trained(BOTH, seed, examples=setting.examples, epochs=setting.epochs)
    rows: list[tuple[object, ...]] = []
    for path, layer in layers(model).items():
        if "shortcut" not in path:
            scale, bias = (layer.get_parameter(name).detach() for name in ("scale_weight", "scale_bias"))
            means = (float(scale.mean()), float(scale.abs().mean()), float(scale.max()), float(bias.mean()))
            rows.append((len(rows) + 1, path, stage(path), *means))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge growth with depth, and the bound."""
    return (
        at_least(
            "The deeper the layer, the larger its scaling weights.",
            "S062, figure 4",
            "rank correlation of layer and mean |w_v|",
            by_seed(frame, lambda part: np.corrcoef(part["layer"], part["absolute"].rank())[0, 1]),
            0.5,
            reason="only the weights of the last layer are large; those before it do not grow with depth",
        ),
        at_most(
            "The mean scaling weight of a layer stays at most 1.",
            "S062, figure 4",
            "largest mean w_v over layers",
            by_seed(frame, lambda part: float(part["scale"].max())),
            1.0,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the weights by layer, the stages separated."""
    scale, bias = style.panels(canvas, columns=2)
    style.curve(scale, frame, "layer", "absolute", name="mean $|w_v|$", index=1, points=True)
    style.curve(scale, frame, "layer", "scale", name="mean $w_v$", index=0, points=True)
    style.curve(bias, frame, "layer", "bias", name="mean $w_b$", index=0, points=True)
    style.rule(bias, 1.0, "at first")
    part = frame[frame["seed"] == frame["seed"].min()]
    for ax in (scale, bias):
        for layer in part.loc[~part["stage"].duplicated() & (part["stage"] > 0), "layer"]:
            ax.axvline(layer - 0.5, color="#b4b6ba", linewidth=0.7)
        ax.legend()
    scale.axhline(0, color="#b4b6ba", linewidth=0.7)
    style.label(scale, "$w_v$", "layer", "mean over channels")
    style.label(bias, "$w_b$", "layer", "mean over channels")
