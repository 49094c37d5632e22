"""RE-5: features that training only BatchNorm switches off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, by_seed, untestable
from analyses.representation.bn_only import ALL, BN_ONLY, norm_layers, small_digits, trained

ID = "RE-5"
TITLE = "Features that training only BatchNorm switches off"
SOURCES = ("S154",)
CAPTION = (
    "Distribution of |γ| after training the networks of RE-4 (4 blocks, 16 channels; γ drawn from [0, 1] at "
    "first, gray). Where only γ and β are trained, γ spreads out: many are near 0, so that random features are "
    "switched off, and others beyond 1."
)
COLUMNS = ("way", "low", "high", "share", "near_zero")

START = "at first"
_NEAR = 0.05


@dataclass(frozen=True)
class Setting:
    """What is trained: blocks, channels, examples, passes over the data; bins of the histogram."""

    depth: int = 4
    channels: int = 16
    examples: int = 2000
    epochs: int = 20
    bins: int = 40
    largest: float = 2.0


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(depth=2, examples=500, epochs=6) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Take the histogram of |γ| over all layers, at first, and after training in two ways; it is the same each row."""
    train, _ = small_digits(seed, setting.examples)
    parts = []
    for way, epochs in ((START, 0), (BN_ONLY, setting.epochs), (ALL, setting.epochs)):
        trains = BN_ONLY if way == START else way
        model = trained(trains, setting.depth, train, seed, channels=setting.channels, epochs=epochs)
        gains = np.abs(np.concatenate([norm.weight.detach().numpy() for norm in norm_layers(model)]))
        counts, edges = np.histogram(gains.clip(max=setting.largest), setting.bins, (0, setting.largest))
        columns = {"way": way, "low": edges[:-1], "high": edges[1:], "share": counts / gains.size}
        parts.append(pd.DataFrame({**columns, "near_zero": float((gains < _NEAR).mean())}))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that training switches features off."""

    def near(way: str) -> list[float]:
        return by_seed(frame[frame["way"] == way], lambda part: part["near_zero"].iloc[0])

    ratios = {way: [own / first for own, first in zip(near(BN_ONLY), near(way), strict=True)] for way in (START, ALL)}
    return (
        at_least(
            "Training only γ and β brings more γ near zero than were drawn there.",
            "S154, section 5",
            f"share of |γ| < {_NEAR}, after training over before",
            ratios[START],
            1.5,
            reason="of 144 gains some seven are drawn near zero, a number that scatters by three",
        ),
        at_least(
            "It switches off more features than training all weights does.",
            "S154, section 5",
            f"share of |γ| < {_NEAR}, only γ and β over all",
            ratios[ALL],
            1.2,
        ),
        untestable(
            "About a third of the features is disabled.",
            "S154, section 5",
            f"share of |γ| < {_NEAR}, only γ and β",
            near(BN_ONLY),
            "about 0.33 of |γ| < 0.01",
            reason="the share is that of deep residual networks on CIFAR-10, trained fifty times as long",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the histograms, medians over seeds."""
    (ax,) = style.panels(canvas)
    start = frame[frame["way"] == START].groupby("low")[["share", "high"]].median()
    ax.bar(start.index, start["share"], start["high"] - start.index, align="edge", color="#dcdee2", label=START)
    for index, way in enumerate((BN_ONLY, ALL)):
        part = frame[frame["way"] == way].assign(middle=lambda own: (own["low"] + own["high"]) / 2)
        style.curve(ax, part, "middle", "share", name=f"trained: {way}", index=index)
    ax.legend()
    ax.set_xlim(0, 2)
    style.label(ax, "", "$|\\gamma|$ (the last bin holds all above)", "share of channels")
