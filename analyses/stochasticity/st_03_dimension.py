"""ST-3: the disturbance by dimension."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

import normscope as ns
from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.stochasticity.layers import BN, CHOLESKY, NAMES, NEWTON, PCA, ZCA, gaussian, layer, predicted

ID = "ST-3"
TITLE = "Stochastic disturbance by dimension"
SOURCES = ("S149", "S150")
CAPTION = (
    "SND per $\\sqrt{d}$, the norm of a whitened sample, at a batch size of 1024, for d independent Gaussian "
    "features. BatchNorm's part does not depend on d; that of exact whitening grows as $\\sqrt{d}$, as first-order "
    "theory (dashed) says; PCA moves samples by their own length. Newton's iteration at T = 5 becomes quieter "
    "because it no longer whitens: (b) each eigenvalue is $1/d$ of the trace, and five iterations cannot bring it "
    "to 1."
)
COLUMNS = ("operation", "features", "snd", "predicted", "residual")


@dataclass(frozen=True)
class Setting:
    """What is measured: dimensions, samples of the population, batch size, draws a sample."""

    features: tuple[int, ...] = (8, 16, 32, 64, 128)
    samples: int = 10_000
    batch: int = 1024
    draws: int = 12


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(features=(8, 32, 128), draws=8) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Measure disturbance and theory over sqrt(d); `residual` is the norm of W Sigma W^T - I over sqrt(d)."""
    rows = []
    for features in setting.features:
        samples = gaussian(setting.samples, features, seed)
        batch = samples[: setting.batch].double()
        root = features**0.5
        for name in NAMES:
            norm = layer(name)
            generator = torch.Generator().manual_seed(seed)
            found = ns.snd(norm, samples, setting.batch, setting.draws, generator=generator)
            theory = predicted(name, features, setting.batch) if name in {BN, ZCA, CHOLESKY} else np.nan
            output = norm(batch)
            defect = output.T @ output / len(output) - torch.eye(features, dtype=output.dtype)
            rows.append((name, features, found.value / root, theory / root, float(defect.norm()) / root))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the growth, the theory, and what is special of PCA and of Newton's iteration."""

    def growth(name: str) -> list[float]:
        return by_seed(frame[frame["operation"] == name], lambda part: part["snd"].iloc[-1] / part["snd"].iloc[0])

    widest = frame[frame["features"] == frame["features"].max()]
    return (
        at_most(
            "First-order perturbation predicts BatchNorm, ZCA and Cholesky in every dimension.",
            "S150, section 3",
            "largest |SND / predicted - 1|",
            by_seed(frame, lambda part: float((part["snd"] / part["predicted"] - 1).abs().max())),
            0.1,
        ),
        at_least(
            "The disturbance of full whitening grows with the dimension beyond that of the sample's norm.",
            "S149, section 3.3",
            r"ZCA: SND/$\sqrt{d}$ in the largest dimension over that in the smallest",
            growth(ZCA),
            2.0,
        ),
        at_most(
            "BatchNorm's does not.",
            "S149, section 3.3",
            "BatchNorm: the same ratio",
            growth(BN),
            1.1,
        ),
        at_least(
            "PCA moves a sample by about its own length in any dimension.",
            "S150, section 3",
            r"PCA: smallest SND/$\sqrt{d}$",
            by_seed(frame[frame["operation"] == PCA], lambda part: part["snd"].min()),
            0.8,
        ),
        at_most(
            "Newton's iteration with T = 5 is quieter than ZCA.",
            "S149, section 3.3",
            "SND of Newton's iteration over that of ZCA, in the largest dimension",
            by_seed(
                widest,
                lambda part: (
                    part.loc[part["operation"] == NEWTON, "snd"].item()
                    / part.loc[part["operation"] == ZCA, "snd"].item()
                ),
            ),
            0.9,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the disturbance per root of the dimension, and the defect of whitening."""
    disturbance, defect = style.panels(canvas, columns=2)
    for index, name in enumerate(NAMES):
        part = frame[frame["operation"] == name]
        style.curve(disturbance, part, "features", "snd", name=name, index=index, points=True)
        line = part.groupby("features")["predicted"].first()
        if line.notna().all():
            style.theory(disturbance, line.index, line, name="theory" if name == BN else "")
        if name in {BN, NEWTON, ZCA, CHOLESKY}:
            style.curve(defect, part, "features", "residual", name=name, index=index, points=True)
    for ax in (disturbance, defect):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.legend(ncols=2)
    disturbance.set_ylim(0.012, 12)
    style.label(disturbance, "disturbance at $B$ = 1024", "features $d$", "SND / $\\sqrt{d}$")
    style.label(defect, "distance from white", "features $d$", "$\\|W\\Sigma W^T - I\\|_F / \\sqrt{d}$")
