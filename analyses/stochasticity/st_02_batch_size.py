"""ST-2: the disturbance by batch size."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

import normscope as ns
from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed, equal
from analyses.stochasticity.layers import BN, CHOLESKY, NAMES, NEWTON, PCA, ZCA, gaussian, layer, predicted

ID = "ST-2"
TITLE = "Stochastic disturbance by batch size"
SOURCES = ("S149", "S150")
CAPTION = (
    "Stochastic normalization disturbance (SND): how far the output of a sample moves with the batch that it is "
    "in, for d = 16 independent Gaussian features. (a) All fall as $1/\\sqrt{B}$ but PCA, whose disturbance no "
    "batch size cures; dashed: first-order theory. (b) The same over BatchNorm's: the price of whitening."
)
COLUMNS = ("operation", "batch", "snd", "error", "predicted")

_ORDER = (BN, NEWTON, ZCA, CHOLESKY, PCA)


@dataclass(frozen=True)
class Setting:
    """What is measured: features, samples of the population, batch sizes, draws a sample."""

    features: int = 16
    samples: int = 20_000
    batches: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    draws: int = 25


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(batches=(64, 256, 1024), draws=20) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Measure the disturbance of each normalization at each batch size."""
    samples = gaussian(setting.samples, setting.features, seed)
    rows = []
    for name in NAMES:
        for batch in setting.batches:
            generator = torch.Generator().manual_seed(seed)
            found = ns.snd(layer(name), samples, batch, setting.draws, generator=generator)
            theory = predicted(name, setting.features, batch) if name in {BN, ZCA, CHOLESKY} else np.nan
            rows.append((name, batch, found.value, found.standard_error, theory))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the slopes, the order and the theory."""
    falling = tuple(
        equal(
            f"The disturbance of {title} falls as one over the root of the batch size.",
            "S149, section 3.3",
            "slope of log SND over log B",
            by_seed(frame[frame["operation"] == name], _slope),
            -0.5,
            tolerance=0.06,
        )
        for name, title in ((BN, "BatchNorm"), (NEWTON, "Newton's iteration"), (ZCA, "ZCA"), (CHOLESKY, "Cholesky"))
    )
    ordered = at_least(
        "From BatchNorm over Newton's iteration, ZCA and Cholesky to PCA the disturbance grows.",
        "S150, section 3",
        "smallest ratio of neighbors in this order, over all batch sizes",
        by_seed(frame, lambda part: min(float((_of(part, b) / _of(part, a)).min()) for a, b in pairwise(_ORDER))),
        1.0,
    )
    pca = at_most(
        "PCA's disturbance does not fall with the batch size.",
        "S150, section 3",
        "|slope of log SND over log B|",
        by_seed(frame[frame["operation"] == PCA], lambda part: abs(_slope(part))),
        0.1,
    )
    largest = frame[frame["batch"] == frame["batch"].max()]
    theory = at_most(
        "First-order perturbation predicts the disturbance: √(3d/2B), √((d + d(d+1)/4)/B), √((d + d²/2)/B).",
        "S150, section 3",
        "largest |SND / predicted - 1| at the largest batch: BatchNorm, ZCA, Cholesky",
        by_seed(largest, lambda part: float((part["snd"] / part["predicted"] - 1).abs().max())),
        0.1,
    )
    return (*falling, pca, ordered, theory)


def _of(frame: pd.DataFrame, name: str) -> pd.Series:
    return frame[frame["operation"] == name].set_index("batch")["snd"]


def _slope(frame: pd.DataFrame) -> float:
    return float(np.polyfit(np.log(frame["batch"]), np.log(frame["snd"]), 1)[0])


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the disturbance, and its ratio to BatchNorm's."""
    absolute, relative = style.panels(canvas, columns=2)
    for index, name in enumerate(NAMES):
        part = frame[frame["operation"] == name]
        style.curve(absolute, part, "batch", "snd", name=name, index=index, points=True)
        line = part.groupby("batch")["predicted"].first()
        if line.notna().all():
            style.theory(absolute, line.index, line, name="theory" if name == BN else "")
        base = frame[frame["operation"] == BN].set_index(["seed", "batch"])["snd"]
        ratio = (part.set_index(["seed", "batch"])["snd"] / base).rename("ratio").reset_index()
        style.curve(relative, ratio, "batch", "ratio", name=name, index=index, points=True)
    for ax in (absolute, relative):
        ax.set_yscale("log", base=2)
        ax.set_xscale("log", base=2)
    relative.set(yticks=[1, 2, 4, 8, 16, 32], yticklabels=["1", "2", "4", "8", "16", "32"])
    absolute.set(
        yticks=[0.125, 0.25, 0.5, 1, 2, 4], yticklabels=["0.125", "0.25", "0.5", "1", "2", "4"], ylim=(0.1, 36)
    )
    absolute.legend(ncols=2, loc="upper center")
    style.label(absolute, "disturbance", "batch size $B$", "SND")
    style.label(relative, "over BatchNorm's", "batch size $B$", "SND over that of BatchNorm")
