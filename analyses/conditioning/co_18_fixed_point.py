"""CO-18: batch normalization drives all samples of a batch to the same angle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_most, by_seed, equal
from analyses.conditioning.random_networks import propagate

ID = "CO-18"
TITLE = "With depth all samples of a batch come to the same angle, that of mean-field theory"
SOURCES = ("yang2019",)
CAPTION = (
    "A random ReLU network of width 1024 with batch normalization; the inputs are two clusters, cosines within near 1 "
    "and between near 0. (a) Mean cosine of two samples by layer, and the fixed point J(-1/(B-1)), J(c) = (√(1-c²) + "
    "(π - arccos c) c)/π. (b) The standard deviation over pairs falls to the noise of finite width, 1/√1024: at the "
    "fixed point the network has forgotten which samples were alike."
)
COLUMNS = ("batch", "layer", "cosine", "deviation", "expected")


@dataclass(frozen=True)
class Setting:
    """Width, depth, batch sizes, and the cosine within a cluster of inputs."""

    width: int = 1024
    depth: int = 25
    batches: tuple[int, ...] = (8, 32, 128)
    within: float = 0.95


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(width=512, depth=15, batches=(8, 32)) if fast else Setting()


def fixed_point(batch: int) -> float:
    """Return J(-1/(B-1)), the cosine after ReLU of samples that batch normalization holds at -1/(B-1)."""
    c = -1 / (batch - 1)
    return (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Propagate two clusters, and take the cosines of all pairs at each layer."""
    rows = []
    for batch in setting.batches:
        generator = torch.Generator().manual_seed(1000 * seed + batch)
        centers = torch.randn(2, setting.width, generator=generator).repeat_interleave(batch // 2, dim=0)
        noise = torch.randn(batch, setting.width, generator=generator)
        inputs = setting.within**0.5 * centers + (1 - setting.within) ** 0.5 * noise
        _, active = propagate(inputs, setting.depth, "ReLU", generator)
        for layer, x in enumerate((inputs, *active)):
            unit = torch.nn.functional.normalize(x.detach().double(), dim=1)
            cosines = (unit @ unit.T)[~torch.eye(batch, dtype=torch.bool)]
            rows.append((batch, layer, float(cosines.mean()), float(cosines.std()), fixed_point(batch)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the fixed point and how far pairs differ at it."""
    deep = frame[frame["layer"] > frame["layer"].max() - 5]
    fixed = [
        equal(
            f"The cosine of two samples converges to that of the fixed point, B = {batch}.",
            "yang2019, forward dynamics",
            f"mean cosine over pairs and the last five layers, B = {batch}",
            by_seed(deep[deep["batch"] == batch], lambda part: part["cosine"].mean()),
            fixed_point(int(batch)),
            tolerance=0.01,
        )
        for batch in deep["batch"].unique()
    ]
    return (
        *fixed,
        at_most(
            "At the fixed point all pairs are alike, whatever the inputs were.",
            "yang2019, forward dynamics",
            "largest standard deviation of cosines over pairs, last five layers, over that of the inputs",
            by_seed(
                frame,
                lambda part: (
                    part.loc[part["layer"] > part["layer"].max() - 5, "deviation"].max()
                    / part.loc[part["layer"] == 0, "deviation"].min()
                ),
            ),
            0.15,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw mean and deviation by layer."""
    mean, deviation = style.panels(canvas, columns=2)
    for index, batch in enumerate(frame["batch"].unique()):
        part = frame[frame["batch"] == batch]
        style.curve(mean, part, "layer", "cosine", name=f"B = {batch}", index=index)
        style.curve(deviation, part, "layer", "deviation", name=f"B = {batch}", index=index)
    for index, (_, part) in enumerate(frame.groupby("batch")):
        line = part.groupby("layer")["expected"].first()
        style.theory(mean, line.index, line, name="fixed point $J(-1/(B-1))$" if index == 0 else "")
    deviation.set(yscale="log", ylim=(1e-2, 1))
    for ax in (mean, deviation):
        ax.legend()
    style.label(mean, "mean over pairs", "layer", "cosine of two samples")
    style.label(deviation, "deviation over pairs", "layer", "standard deviation of cosines")
