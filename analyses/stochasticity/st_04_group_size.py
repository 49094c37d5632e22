"""ST-4: the disturbance by the size of the groups that are whitened."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

import normscope as ns
from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.stochasticity.layers import BN, CHOLESKY, PCA, ZCA, gaussian, layer, predicted

ID = "ST-4"
TITLE = "Stochastic disturbance by group size"
SOURCES = ("S150", "S131")
CAPTION = (
    "SND at a batch size of 256 where d = 64 independent Gaussian features are whitened in groups of G features, "
    "from G = 1, which is BatchNorm, to all together. Small groups keep ZCA and Cholesky quiet, as first-order "
    "theory (dashed) says; PCA is lost as soon as two features are whitened together."
)
COLUMNS = ("operation", "size", "snd", "predicted")

_SHOWN = (ZCA, CHOLESKY, PCA)


@dataclass(frozen=True)
class Setting:
    """What is measured: features, samples of the population, batch size, sizes of groups, draws a sample."""

    features: int = 64
    samples: int = 20_000
    batch: int = 256
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    draws: int = 25


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(1, 8, 64), draws=8) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Measure the disturbance for each size of groups."""
    samples = gaussian(setting.samples, setting.features, seed)
    rows = []
    for name in (BN, *_SHOWN):
        for size in setting.sizes if name != BN else (1,):
            norm = layer(name, groups=setting.features // size)
            generator = torch.Generator().manual_seed(seed)
            found = ns.snd(norm, samples, setting.batch, setting.draws, generator=generator)
            theory = np.nan if name == PCA else predicted(name, setting.features, setting.batch, size)
            rows.append((name, size, found.value, theory))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the growth with the size, both ends, and the theory."""

    def smallest_step(name: str) -> list[float]:
        part = frame[frame["operation"] == name]
        return by_seed(part, lambda own: float((own["snd"].to_numpy()[1:] / own["snd"].to_numpy()[:-1]).min()))

    ones = frame[frame["size"] == 1]
    return (
        *(
            at_least(
                f"The larger its groups, the more {name} disturbs.",
                "S150, section 3",
                "smallest ratio of the SND of neighboring sizes",
                smallest_step(name),
                1.0,
            )
            for name in (ZCA, CHOLESKY)
        ),
        at_most(
            "Whitening in groups of one is BatchNorm.",
            "S131, section 3",
            "largest |SND / that of BatchNorm - 1| at G = 1",
            by_seed(ones, lambda part: float((part["snd"] / part["snd"].iloc[0] - 1).abs().max())),
            1e-3,
        ),
        at_least(
            "PCA already fails with groups of a few features.",
            "S150, section 3",
            "PCA: SND of the second smallest size over that of G = 1",
            by_seed(frame[frame["operation"] == PCA], lambda part: part["snd"].iloc[1] / part["snd"].iloc[0]),
            5.0,
        ),
        at_most(
            "First-order perturbation predicts ZCA and Cholesky for every size.",
            "S150, section 3",
            "largest |SND / predicted - 1|",
            by_seed(frame, lambda part: float((part["snd"] / part["predicted"] - 1).abs().max())),
            0.2,
            reason="at full size B is only four times d, where the first order does not suffice",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the disturbance by size."""
    (ax,) = style.panels(canvas)
    for index, name in enumerate(_SHOWN, start=2):
        part = frame[frame["operation"] == name]
        style.curve(ax, part, "size", "snd", name=name, index=index, points=True)
        line = part.groupby("size")["predicted"].first()
        if line.notna().all():
            style.theory(ax, line.index, line, name="theory" if name == ZCA else "")
    style.rule(ax, float(frame.loc[frame["operation"] == BN, "snd"].median()), "BatchNorm")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set(yticks=[0.5, 1, 2, 4, 8], yticklabels=["0.5", "1", "2", "4", "8"], ylim=(0.45, 10))
    ax.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    ax.minorticks_off()
    ax.legend(loc="center", bbox_to_anchor=(0.6, 0.68), ncols=2)
    style.label(ax, "", "features $G$ whitened together", "SND")
