"""SC-3: a normalization taken apart into area, operation and recovery."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

from analyses import style
from analyses.claim import Claim, at_most, by_seed
from normscope import norms

ID = "SC-3"
TITLE = "Area, operation, recovery: the three parts of a normalization"
SOURCES = ("huang2020",)
CAPTION = (
    "An activation (N = 4 examples in bands, C = 6 channels in rows, 8 places in columns; blue below 0, red above) on "
    "its way through batch normalization, group normalization (two groups) and batch whitening (ZCA, with coloring). "
    "The area (NAP) reorders it so that each row holds the entries that share statistics; the operation (NOP) centers "
    "and scales rows, or decorrelates them; the recovery (NRR) gives each channel a mean and a scale back, or mixes "
    "channels, once the order is restored."
)
COLUMNS = ("method", "stage", "row", "column", "value", "whole")

N, C, L = 4, 6, 8
STAGES = ("activation", "area", "operation", "recovery")
_EPS = 1e-5


@dataclass(frozen=True)
class Setting:
    """There is nothing to set: the activation's size is that of the drawing."""


_METHODS = {
    "batch normalization": (norms.Batch(), norms.Standardize(_EPS), norms.Affine()),
    "group normalization": (norms.Group(2), norms.Standardize(_EPS), norms.Affine()),
    "batch whitening": (norms.Batch(), norms.Whiten("zca", _EPS), norms.Coloring()),
}
_LAYERS = {"batch normalization": nn.BatchNorm1d(C), "group normalization": nn.GroupNorm(2, C)}


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Take an activation through the parts one by one; `whole` is the output of the layer in one piece."""
    generator = torch.Generator().manual_seed(seed)
    levels = 0.8 * torch.randn(1, C, 1, generator=generator, dtype=torch.float64)
    x = torch.randn(N, C, L, generator=generator, dtype=torch.float64).cumsum(-1) / 2 + levels
    gain = 1 + 0.5 * torch.randn(C, generator=generator, dtype=torch.float64)
    bias = torch.randn(C, generator=generator, dtype=torch.float64)
    mixing = torch.eye(C, dtype=torch.float64) + 0.3 * torch.randn(C, C, generator=generator, dtype=torch.float64)
    parts = []
    for name, (area, operation, recovery) in _METHODS.items():
        view = area.view(x)
        normalized = operation.apply(view, operation.measure(view))
        weight = mixing if isinstance(recovery, norms.Coloring) else gain
        restored = area.inverse(normalized, x)
        colored = torch.einsum("ij,njl->nil", weight, restored) if weight.ndim == 2 else restored * weight[:, None]
        stages = (
            x.flatten(0, 1),
            view.flatten(0, 1),
            normalized.flatten(0, 1),
            (colored + bias[:, None]).flatten(0, 1),
        )
        layer = _LAYERS.get(name) or norms.Norm(area, operation, recovery, num_features=C)
        whole = _whole(layer.double(), weight, bias, x).flatten(0, 1)
        parts += [_cells(name, stage, z, whole) for stage, z in zip(STAGES, stages, strict=True)]
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _whole(layer: nn.Module, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Return the layer's output with given parameters."""
    with torch.no_grad():
        for name, value in (("weight", weight), ("bias", bias)):
            getattr(layer, name).copy_(value)
        output: Tensor = layer(x)
    return output


def _cells(name: str, stage: str, z: Tensor, whole: Tensor) -> pd.DataFrame:
    """Write a matrix as rows of a frame, with the layer's output beside the last stage."""
    rows, columns = torch.meshgrid(torch.arange(z.shape[0]), torch.arange(z.shape[1]), indexing="ij")
    frame = pd.DataFrame({"row": rows.flatten(), "column": columns.flatten(), "value": z.flatten()})
    beside = whole.flatten() if stage == STAGES[-1] else torch.full((z.numel(),), torch.nan)
    return frame.assign(method=name, stage=stage, whole=beside.numpy())


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that the parts give the published layer, and what the operation leaves."""
    last = frame[frame["stage"] == "recovery"]
    whitened = frame[(frame["stage"] == "operation") & (frame["method"] == "batch whitening")]
    whole = {
        "batch normalization": "torch's BatchNorm1d",
        "group normalization": "torch's GroupNorm",
        "batch whitening": "the layer that normscope.norms composes",
    }
    return (
        *(
            at_most(
                f"Area, operation and recovery in turn are {layer}.",
                "huang2020, framework",
                "largest |difference of the outputs|",
                by_seed(last[last["method"] == name], lambda rows: (rows["value"] - rows["whole"]).abs().max()),
                1e-12,
            )
            for name, layer in whole.items()
        ),
        at_most(
            "After the whitening operation the rows of the area are uncorrelated.",
            "huang2020, operation",
            "largest |correlation of two rows|",
            by_seed(whitened, _correlation),
            1e-3,
        ),
    )


def _correlation(rows: pd.DataFrame) -> float:
    matrix = rows.pivot(index="row", columns="column", values="value").to_numpy()
    correlation = np.corrcoef(matrix)
    return float(np.abs(correlation - np.eye(len(correlation))).max())


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the matrices of the first seed, a row for each method, with arrows named after the parts."""
    first = frame[frame["seed"] == frame["seed"].min()]
    axes = style.panels(canvas, columns=4, rows=3, height=2.1)
    for index, name in enumerate(_METHODS):
        own = axes[4 * index : 4 * index + 4]
        for ax, stage in zip(own, STAGES, strict=True):
            rows = first[(first["method"] == name) & (first["stage"] == stage)]
            _matrix(ax, rows.pivot(index="row", columns="column", values="value").to_numpy(), stage)
        for left, right, part in zip(own, own[1:], ("NAP", "NOP", "NRR"), strict=False):
            right.annotate(
                "",
                (-0.02, 0.5),
                (1.02, 0.5),
                xycoords="axes fraction",
                textcoords=left.transAxes,
                arrowprops={"arrowstyle": "->"},
            )
            right.text(-0.14, 0.56, part, transform=right.transAxes, ha="center", fontweight="bold")
        own[0].set_title(f"{name}: {STAGES[0]}")


def _matrix(ax: Axes, matrix: np.ndarray, stage: str) -> None:
    """Draw a matrix, with a line between examples where it is in the order of the activation."""
    ax.imshow(matrix, cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
    if stage in ("activation", "recovery"):
        for example in range(1, N):
            ax.axhline(example * C - 0.5, color="black", linewidth=0.8)
    ax.set_xlabel(f"{matrix.shape[0]} × {matrix.shape[1]}")
    ax.set(xticks=[], yticks=[], title=stage)
    ax.grid(False)
