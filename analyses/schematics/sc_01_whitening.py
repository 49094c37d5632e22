"""SC-1: the normalization operations in the plane."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Ellipse

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed, equal
from normscope import norms

ID = "SC-1"
TITLE = "What each normalization operation does to a cloud in the plane"
SOURCES = ("huang2020", "S131")
CAPTION = (
    "A correlated Gaussian cloud (d = 2, m = 200), normalized by each operation; the ellipse is at two standard "
    "deviations of the sample, and three marked samples show where points go. Centering, scaling and standardizing "
    "keep the correlation. The whitenings all end in the circle and differ by a rotation: PCA turns the cloud onto "
    "its principal axes, ZCA moves the samples least, Cholesky keeps the direction of the first axis, and Newton's "
    "iteration (T = 5) comes close to ZCA."
)
COLUMNS = ("operation", "sample", "x1", "x2")

_EPS = 1e-12
_OPERATIONS = {
    "input": norms.Identity(),
    "center": norms.Center(),
    "scale": norms.Scale(_EPS),
    "standardize": norms.Standardize(_EPS),
    "whiten, PCA": norms.Whiten("pca", _EPS),
    "whiten, ZCA": norms.Whiten("zca", _EPS),
    "whiten, Cholesky": norms.Whiten("cholesky", _EPS),
    "whiten, Newton": norms.Whiten("newton", _EPS, iterations=5),
}
_EXACT = ("whiten, PCA", "whiten, ZCA", "whiten, Cholesky")


@dataclass(frozen=True)
class Setting:
    """The cloud: samples, mean, covariance."""

    samples: int = 200
    mean: tuple[float, float] = (2.0, 1.2)
    covariance: tuple[tuple[float, float], tuple[float, float]] = ((2.2, 1.2), (1.2, 1.0))


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(samples=50) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Normalize the cloud by each operation."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(setting.samples, 2, generator=generator, dtype=torch.float64)
    root = torch.linalg.cholesky(torch.tensor(setting.covariance, dtype=torch.float64))
    cloud = (noise @ root.T + torch.tensor(setting.mean, dtype=torch.float64)).T.unsqueeze(0)
    parts = []
    for name, operation in _OPERATIONS.items():
        points = operation.apply(cloud, operation.measure(cloud))[0].numpy()
        parts.append(
            pd.DataFrame({"operation": name, "sample": range(setting.samples), "x1": points[0], "x2": points[1]})
        )
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge what each operation must do exactly."""

    def distortion(part: pd.DataFrame, name: str) -> float:
        return float(np.square(_points(part, name) - _points(part, "center")).sum(1).mean())

    return (
        at_most(
            "Whitened samples have the identity as covariance, by each of the three exact matrices.",
            "S131, ZCA whitening",
            "largest ‖covariance - I‖ (Frobenius)",
            by_seed(frame, lambda part: max(_defect(part, name) for name in _EXACT)),
            1e-9,
        ),
        at_most(
            "Standardizing leaves the correlation as it is.",
            "S131, standardization",
            "|correlation after - before|",
            by_seed(frame, lambda part: abs(_correlation(part, "standardize") - _correlation(part, "input"))),
            1e-9,
        ),
        at_least(
            "Of the whitenings ZCA moves the samples least.",
            "S131, ZCA whitening",
            "mean squared distance to the centered sample, the least of PCA and Cholesky over ZCA",
            by_seed(
                frame,
                lambda part: (
                    min(distortion(part, name) for name in ("whiten, PCA", "whiten, Cholesky"))
                    / distortion(part, "whiten, ZCA")
                ),
            ),
            1.0,
        ),
        equal(
            "Cholesky whitening only rescales the first feature.",
            "S150, whitening matrices",
            "correlation of the first feature before and after",
            by_seed(
                frame,
                lambda part: np.corrcoef(_points(part, "whiten, Cholesky")[:, 0], _points(part, "input")[:, 0])[0, 1],
            ),
            1.0,
            tolerance=1e-9,
        ),
    )


def _points(frame: pd.DataFrame, name: str) -> np.ndarray:
    return frame.loc[frame["operation"] == name, ["x1", "x2"]].to_numpy()


def _defect(frame: pd.DataFrame, name: str) -> float:
    return float(np.linalg.norm(np.cov(_points(frame, name).T, bias=True) - np.eye(2)))


def _correlation(frame: pd.DataFrame, name: str) -> float:
    return float(np.corrcoef(_points(frame, name).T)[0, 1])


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the cloud of the first seed after each operation, all on the same scale."""
    shown = frame[frame["seed"] == frame["seed"].min()]
    axes = style.panels(canvas, columns=4, rows=2, height=2.05)
    first = _points(shown, "input")
    along = np.linalg.svd(first - first.mean(0), full_matrices=False)[0]
    marked = (int(along[:, 0].argmax()), int(along[:, 0].argmin()), int(np.abs(along[:, 1]).argmax()))
    for ax, name in zip(axes, _OPERATIONS, strict=True):
        _panel(ax, _points(shown, name), marked)
        style.label(ax, name, "$x_1$", "$x_2$")
        ax.label_outer()


def _panel(ax: Axes, points: np.ndarray, marked: tuple[int, ...]) -> None:
    ax.axhline(0, color="#b4b6ba", linewidth=0.7, zorder=1)
    ax.axvline(0, color="#b4b6ba", linewidth=0.7, zorder=1)
    ax.plot(*points.T, ".", color=style.color(0), markersize=3, alpha=0.45, markeredgewidth=0)
    values, vectors = np.linalg.eigh(np.cov(points.T, bias=True))
    width, height = 4 * np.sqrt(values)
    angle = float(np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0])))
    center = (float(points[:, 0].mean()), float(points[:, 1].mean()))
    ax.add_patch(Ellipse(center, width, height, angle=angle, fill=False, color=style.color(5), linewidth=1.2))
    for index, sample in enumerate(marked, start=1):
        ax.plot(*points[sample], style.MARKERS[index], color=style.color(index), markersize=6, markeredgecolor="white")
    ax.set(xlim=(-5.2, 6.2), ylim=(-4.0, 4.2), xticks=range(-4, 7, 2), yticks=range(-4, 5, 2), aspect="equal")
