"""RB-3: how the features of a layer vary before and after scaling calibration."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_most, by_seed
from analyses.methods.representative import BOTH, digits, inputs, layers, trained

ID = "RB-3"
TITLE = "Features before and after scaling calibration"
SOURCES = ("S062",)
CAPTION = (
    "Mean of each channel over space as it varies over test images, in the second layer of the third stage "
    "(network of RB-1): standard deviation, channels sorted, before and after scaling calibration. After it is "
    "smaller, but only by the factor $\\sigma(1)$ = 0.73 (dashed) by which the calibration starts and which γ "
    "makes up for; training takes part of that back, and channels become no more equal."
)
COLUMNS = ("channel", "before", "after", "initial")

_PATH = "stage3.block1.norm2"
_START = 1 / (1 + torch.tensor(-1.0).exp().item())


@dataclass(frozen=True)
class Setting:
    """What is trained: examples, passes over the data."""

    examples: int = 1000
    epochs: int = 6


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(examples=200, epochs=3) if fast else Setting()


@torch.no_grad()
def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train, and take the deviations; channels are sorted by that before, `initial` is it times σ(1)."""
    _, (images, _) = digits(seed, setting.examples)
    with torch.enable_grad():
        model = trained(BOTH, seed, examples=setting.examples, epochs=setting.epochs)
    layer = layers(model)[_PATH]
    x = inputs(model, _PATH, images)
    weight, bias = (layer.get_parameter(name) for name in ("scale_weight", "scale_bias"))
    centering = layer.get_parameter("center_weight") * x.mean((2, 3))
    mean, var = (layer.get_buffer(f"running_{name}") for name in ("mean", "var"))
    standardized = (x.mean((2, 3)) + centering - mean) * (var + layer.eps).rsqrt()
    gated = standardized * torch.sigmoid(weight * standardized + bias)
    before, order = standardized.std(0).sort(descending=True)
    after = gated.std(0)[order]
    columns = {"channel": range(1, len(before) + 1), "before": before, "after": after, "initial": _START * before}
    return pd.DataFrame(columns)[list(COLUMNS)]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge size and equality, the initial factor taken out."""

    def spread(values: pd.Series) -> float:
        return float(values.std() / values.mean())

    return (
        at_most(
            "Scaling calibration makes the variation of the features smaller.",
            "S062, figure 5",
            "mean standard deviation after over before",
            by_seed(frame, lambda part: float(part["after"].mean() / part["before"].mean())),
            1.0,
        ),
        at_most(
            "It does so by more than its initial factor.",
            "S062, figure 5",
            "mean standard deviation after over before, over σ(1)",
            by_seed(frame, lambda part: float(part["after"].mean() / part["initial"].mean())),
            0.98,
            reason="training opens the gate again, so that less than the initial factor is left",
        ),
        at_most(
            "It makes the channels more equal.",
            "S062, figure 5",
            "coefficient of variation over channels, after over before",
            by_seed(frame, lambda part: spread(part["after"]) / spread(part["before"])),
            0.95,
            reason="the trained weights of this layer are positive: the gate opens for what is large",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the deviations by channel, and those of all seeds against each other."""
    sorted_channels, scatter = style.panels(canvas, columns=2)
    for index, (column, name) in enumerate((("before", "before"), ("after", "after"))):
        style.curve(sorted_channels, frame, "channel", column, name=name, index=index, points=True)
    line = frame.groupby("channel")["initial"].median()
    style.theory(sorted_channels, line.index, line, name="before times $\\sigma(1)$")
    sorted_channels.set_ylim(bottom=0)
    for index, (seed, part) in enumerate(frame.groupby("seed")):
        marker = style.MARKERS[index % len(style.MARKERS)]
        scatter.plot(part["before"], part["after"], marker, color=style.color(0), alpha=0.6, label=f"seed {seed}")
    ends = [0.0, float(frame["before"].max())]
    style.theory(scatter, ends, [_START * end for end in ends], name="$\\sigma(1)$")
    for ax in (sorted_channels, scatter):
        ax.legend()
    style.label(sorted_channels, "by channel", "channel, sorted", "std of channel means")
    style.label(scatter, "one by one", "std before", "std after")
