"""ST-5: Newton's iteration trades conditioning for noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

import normscope as ns
from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.stochasticity.layers import BN, NEWTON, ZCA, digit_features, layer

ID = "ST-5"
TITLE = "Newton's iteration trades conditioning for noise"
SOURCES = ("S149",)
CAPTION = (
    "Sixteen random projections of MNIST, whitened by T steps of Newton's iteration at a batch size of 256. (a) "
    "With T the disturbance climbs to that of exact ZCA whitening, (b) while the condition number of the output's "
    "covariance falls to 1. (c) T picks a point on the curve between the two; T = 5 is the published choice."
)
COLUMNS = ("operation", "iterations", "snd", "condition")


@dataclass(frozen=True)
class Setting:
    """What is measured: features, batch size, numbers of iterations, draws a sample."""

    features: int = 16
    batch: int = 256
    iterations: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 9, 12)
    draws: int = 40


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(iterations=(1, 3, 5, 7, 12), draws=15) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Measure disturbance and condition number; the latter of the output of all samples in one batch."""
    samples = digit_features(setting.features, seed)
    layers = [(NEWTON, count, layer(NEWTON, iterations=count)) for count in setting.iterations]
    layers += [(name, 0, layer(name)) for name in (BN, ZCA)]
    rows = []
    for name, count, norm in layers:
        generator = torch.Generator().manual_seed(seed)
        found = ns.snd(norm, samples, setting.batch, setting.draws, generator=generator)
        values = torch.linalg.eigvalsh(torch.cov(norm(samples).T))
        rows.append((name, count, found.value, float(values[-1] / values[0])))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge both directions and the limit."""
    newton = frame[frame["operation"] == NEWTON]

    def steps(part: pd.DataFrame, column: str) -> np.ndarray:
        return np.diff(np.log(part[column]))

    def limit(part: pd.DataFrame) -> float:
        last = part.loc[part["operation"] == NEWTON, "snd"].iloc[-1]
        return float(abs(last / part.loc[part["operation"] == ZCA, "snd"].item() - 1))

    return (
        at_least(
            "More iterations disturb more.",
            "S149, section 3.3",
            "smallest change of log SND from one T to the next",
            by_seed(newton, lambda part: float(steps(part, "snd").min())),
            0.0,
        ),
        at_most(
            "More iterations condition better.",
            "S149, section 3.3",
            "largest change of log condition number from one T to the next",
            by_seed(newton, lambda part: float(steps(part, "condition").max())),
            0.0,
        ),
        at_most(
            "Iterated to the end, the disturbance is that of ZCA whitening.",
            "S149, section 3.1",
            "|SND at the largest T / SND of ZCA - 1|",
            by_seed(frame, limit),
            0.02,
        ),
        at_most(
            "T = 5 disturbs less than exact whitening.",
            "S149, section 3.3",
            "SND at T = 5 over that of ZCA",
            by_seed(
                frame,
                lambda part: (
                    part.loc[(part["operation"] == NEWTON) & (part["iterations"] == 5), "snd"].item()
                    / part.loc[part["operation"] == ZCA, "snd"].item()
                ),
            ),
            0.9,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw disturbance and condition number by T, and one over the other."""
    disturbance, condition, trade = style.panels(canvas, columns=3, height=2.7)
    newton = frame[frame["operation"] == NEWTON]
    for ax, column in ((disturbance, "snd"), (condition, "condition")):
        style.curve(ax, newton, "iterations", column, name="Newton", index=1, points=True)
        for name, dashes in ((BN, ":"), (ZCA, "--")):
            height = frame.loc[frame["operation"] == name, column].median()
            ax.axhline(height, color=style.color(0 if name == BN else 2), linestyle=dashes, linewidth=1.2, label=name)
        ax.set_xticks(range(1, 13, 2))
    condition.set_yscale("log")
    middle = frame.groupby(["operation", "iterations"])[["snd", "condition"]].median().reset_index()
    path = middle[middle["operation"] == NEWTON]
    trade.plot(path["condition"], path["snd"], color=style.color(1), linestyle="--", marker="s")
    for _, row in path[path["iterations"].isin((1, 3, 5, 7))].iterrows():
        text = f"$T$ = {int(row['iterations'])}"
        trade.annotate(text, (row["condition"], row["snd"]), xytext=(5, 3), textcoords="offset points", fontsize=8)
    for index, name, marker in ((0, BN, "o"), (2, ZCA, "^")):
        row = middle[middle["operation"] == name].iloc[0]
        trade.plot(row["condition"], row["snd"], marker, color=style.color(index), markersize=6, label=name)
    trade.set_xscale("log")
    disturbance.set_ylim(bottom=0)
    for ax in (disturbance, condition, trade):
        ax.legend()
    style.label(disturbance, "disturbance", "iterations $T$", "SND")
    style.label(condition, "conditioning", "iterations $T$", "condition number $\\kappa$ of the output")
    style.label(trade, "the trade", "condition number $\\kappa$ of the output", "SND")
