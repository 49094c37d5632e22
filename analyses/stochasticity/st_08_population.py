"""ST-8: which statistic of whitening is to be averaged for inference."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, by_seed
from analyses.stochasticity.layers import CHOLESKY, PCA, ZCA, digit_features
from normscope import norms

ID = "ST-8"
TITLE = "Average the covariance, not the whitening matrix"
SOURCES = ("S150",)
CAPTION = (
    "Sixteen random projections of MNIST, whitened over 300 batches. For inference either the whitening matrices "
    "W of the batches are averaged, or their covariances, which are then inverted once. Shown is how far the data "
    "are from white with the result. The average matrix whitens worse at every batch size, the more so the "
    "smaller the batch; that of PCA, whose axes swap, does not whiten at all."
)
COLUMNS = ("operation", "average", "batch", "residual")

MATRIX, COVARIANCE = "average of W", "average of $\\Sigma$"
_METHODS = {ZCA: "zca", CHOLESKY: "cholesky", PCA: "pca"}
_POPULATIONS = {MATRIX: "matrix", COVARIANCE: "sigma"}


@dataclass(frozen=True)
class Setting:
    """What is measured: features, batch sizes, batches of each size."""

    features: int = 16
    batches: tuple[int, ...] = (32, 64, 128, 256, 512)
    draws: int = 300


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(batches=(32, 256), draws=100) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Let layers see the batches, then whiten all samples with what they have stored: ‖covariance - I‖."""
    samples = digit_features(setting.features, seed)
    identity = torch.eye(setting.features, dtype=samples.dtype)
    rows = []
    for batch in setting.batches:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(len(samples), (setting.draws, batch), generator=generator)
        for name, method in _METHODS.items():
            for average, population in _POPULATIONS.items():
                operation = norms.Whiten(method, population=population)
                layer = norms.Norm(norms.Batch(), operation, None, norms.Running(None), num_features=setting.features)
                layer.double()
                for row in index:
                    layer(samples[row])
                output = layer.eval()(samples)
                residual = float((torch.cov(output.T, correction=0) - identity).norm())
                rows.append((name, average, batch, residual))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that averaging the covariance is the better estimate."""

    def least(name: str) -> list[float]:
        part = frame[frame["operation"] == name]
        return by_seed(part, lambda own: float((_residual(own, MATRIX) / _residual(own, COVARIANCE)).min()))

    smallest = frame[frame["batch"] == frame["batch"].min()]
    return (
        *(
            at_least(
                f"For {name} whitening the average covariance gives the better population statistic.",
                "S150, section 4",
                "smallest ratio of the distance from white, average of W over average of Σ, over all batch sizes",
                least(name),
                1.0,
            )
            for name in (ZCA, CHOLESKY, PCA)
        ),
        at_least(
            "With small batches the average whitening matrix is far off.",
            "S150, section 4",
            "ZCA: the same ratio at the smallest batch size",
            by_seed(
                smallest[smallest["operation"] == ZCA],
                lambda part: float((_residual(part, MATRIX) / _residual(part, COVARIANCE)).iloc[0]),
            ),
            2.0,
        ),
    )


def _residual(frame: pd.DataFrame, average: str) -> pd.Series:
    return frame[frame["average"] == average].set_index("batch")["residual"]


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the distance from white by batch size, a panel for each whitening."""
    axes = style.panels(canvas, columns=3, height=2.6)
    for ax, name in zip(axes, _METHODS, strict=True):
        for index, average in enumerate(_POPULATIONS):
            part = frame[(frame["operation"] == name) & (frame["average"] == average)]
            style.curve(ax, part, "batch", "residual", name=average, index=index, points=True)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks([32, 64, 128, 256, 512], ["32", "64", "128", "256", "512"])
        ax.sharey(axes[0])
        ax.legend(loc="best" if name != PCA else "center right")
        style.label(ax, name, "batch size $B$", "$\\|\\mathrm{cov}(\\hat x) - I\\|_F$")
        ax.label_outer()
