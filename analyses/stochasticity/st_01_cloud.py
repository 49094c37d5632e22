"""ST-1: where one sample lands when it is normalized with different batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, by_seed
from analyses.stochasticity.layers import BN, CHOLESKY, PCA, ZCA, gaussian, layer

ID = "ST-1"
TITLE = "One sample, normalized with a hundred batches"
SOURCES = ("S150",)
CAPTION = (
    "A sample of d = 16 independent Gaussian features (black cross) is normalized a hundred times, each time with "
    "63 other samples (colored); gray are samples of the data, two of the sixteen dimensions shown. BatchNorm, "
    "ZCA and Cholesky leave it near its place, in growing clouds. PCA throws it around the origin: eigenvectors "
    "of nearly equal eigenvalues have no order and no sign."
)
COLUMNS = ("operation", "batch", "x6", "x16", "distance", "norm")

_SHOWN = (BN, ZCA, CHOLESKY, PCA)
_DIMENSIONS = [5, 15]
_DATA = "data"


@dataclass(frozen=True)
class Setting:
    """The data: features, batch size, batches, samples of the data that are drawn in gray."""

    features: int = 16
    batch: int = 64
    batches: int = 100
    shown: int = 200


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(batches=30, shown=50) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Normalize one sample with many batches; `distance` is that of the output to the mean of the outputs."""
    data = gaussian(1 + setting.batches * (setting.batch - 1), setting.features, seed).double()
    sample, others = data[:1], data[1:].reshape(setting.batches, setting.batch - 1, -1)
    parts = [_rows(_DATA, data[: setting.shown])]
    for name in _SHOWN:
        norm = layer(name)
        parts.append(_rows(name, torch.stack([norm(torch.cat((sample, other)))[0] for other in others])))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _rows(name: str, points: torch.Tensor) -> pd.DataFrame:
    first, second = points[:, _DIMENSIONS].T.numpy()
    distance, norm = (points - points.mean(0)).norm(dim=1).numpy(), points.norm(dim=1).numpy()
    columns = {"batch": np.arange(len(points)), "x6": first, "x16": second, "distance": distance, "norm": norm}
    return pd.DataFrame({"operation": name, **columns})


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the order of the clouds, and that PCA's is no cloud around the sample."""

    def ratio(first: str, second: str) -> list[float]:
        return by_seed(frame, lambda part: _moved(part, first) / _moved(part, second))

    return (
        at_least(
            "ZCA whitening disturbs a sample more than standardizing.",
            "S150, section 3",
            "mean distance to the mean output, ZCA over BatchNorm",
            ratio(ZCA, BN),
            1.0,
        ),
        at_least(
            "Cholesky whitening disturbs a sample more than ZCA.",
            "S150, section 3",
            "mean distance to the mean output, Cholesky over ZCA",
            ratio(CHOLESKY, ZCA),
            1.0,
        ),
        at_least(
            "PCA whitening disturbs a sample far more than ZCA and Cholesky.",
            "S150, section 3",
            "mean distance to the mean output, PCA over Cholesky",
            ratio(PCA, CHOLESKY),
            2.0,
        ),
        at_least(
            "PCA whitening leaves nearly nothing of the place of a sample.",
            "S150, section 3",
            "PCA: mean distance to the mean output over mean norm of the outputs",
            by_seed(frame, lambda part: _moved(part, PCA) / part.loc[part["operation"] == PCA, "norm"].mean()),
            0.9,
        ),
    )


def _moved(frame: pd.DataFrame, name: str) -> float:
    return float(frame.loc[frame["operation"] == name, "distance"].mean())


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the clouds of the first seed, all on the same scale."""
    shown = frame[frame["seed"] == frame["seed"].min()]
    data = shown[shown["operation"] == _DATA]
    for index, (ax, name) in enumerate(zip(style.panels(canvas, columns=4, height=2.9), _SHOWN, strict=True)):
        ax.plot(data["x6"], data["x16"], ".", color="#c3c5ca", markersize=3, markeredgewidth=0)
        part = shown[shown["operation"] == name]
        marker = style.MARKERS[index]
        ax.plot(part["x6"], part["x16"], marker, color=style.color(index), markersize=3, alpha=0.6, markeredgewidth=0)
        ax.plot(*data.iloc[0][["x6", "x16"]], "x", color="black", markersize=6, markeredgewidth=1.4)
        ax.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), xticks=range(-3, 4), yticks=range(-3, 4), aspect="equal")
        style.label(ax, f"{name}, SND {_moved(shown, name):.2f}", "$x_6$", "$x_{16}$")
        ax.label_outer()
