"""RB-1: the weights of centering calibration by layer."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.methods.representative import BOTH, layers, stage, trained

ID = "RB-1"
TITLE = "Centering calibration: its weights by layer"
SOURCES = ("S062",)
CAPTION = (
    "Representative batch normalization adds $w_m K_m$ to the input of each layer, K the mean of a channel of the "
    "example at hand, $w_m$ = 0 at first. A residual network (8 channels, three stages of one block, separated by "
    "lines) after training on 1000 digits: (a) mean of $w_m$ over the channels of a layer, (b) mean of its "
    "absolute value. Shortcut layers are left out."
)
COLUMNS = ("layer", "path", "stage", "mean", "absolute")


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
            weight = layer.get_parameter("center_weight").detach()
            rows.append((len(rows) + 1, path, stage(path), float(weight.mean()), float(weight.abs().mean())))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge where the weights are large."""

    def last_over_others(part: pd.DataFrame) -> float:
        last = part["stage"] == part["stage"].max()
        return float(part.loc[last, "absolute"].mean() / part.loc[~last, "absolute"].mean())

    def first_over_others(part: pd.DataFrame) -> float:
        inner = part[part["stage"] > 0]
        first = ~inner["stage"].duplicated()
        return float(inner.loc[first, "absolute"].mean() / inner.loc[~first, "absolute"].mean())

    return (
        at_most(
            "The mean weight of most layers stays near zero.",
            "S062, figure 3",
            "median over layers of |mean w_m|",
            by_seed(frame, lambda part: float(part["mean"].abs().median())),
            0.1,
        ),
        at_least(
            "The weights of the last stage are larger.",
            "S062, figure 3",
            "mean |w_m| of the last stage over that of all others",
            by_seed(frame, last_over_others),
            1.0,
            reason="with three stages of two layers each the last is not special",
        ),
        at_least(
            "The weights of the first layer of a stage are larger.",
            "S062, figure 3",
            "mean |w_m| of the first layers of the stages over that of their other layers",
            by_seed(frame, first_over_others),
            1.0,
            reason="the largest are those of the last layer, which is the second of its stage",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw both means by layer, the stages separated."""
    mean, absolute = style.panels(canvas, columns=2)
    for ax, column in ((mean, "mean"), (absolute, "absolute")):
        style.curve(ax, frame, "layer", column, name="", index=0, points=True)
        part = frame[frame["seed"] == frame["seed"].min()]
        for layer in part.loc[~part["stage"].duplicated() & (part["stage"] > 0), "layer"]:
            ax.axvline(layer - 0.5, color="#b4b6ba", linewidth=0.7)
    mean.axhline(0, color="#b4b6ba", linewidth=0.7)
    absolute.set_ylim(bottom=0)
    style.label(mean, "mean weight", "layer", "mean $w_m$")
    style.label(absolute, "mean size", "layer", "mean $|w_m|$")
