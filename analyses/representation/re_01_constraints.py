"""RE-1: how many constraints a normalization imposes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from analyses import style
from analyses.claim import Claim, at_most, by_seed, equal
from normscope import norms

ID = "RE-1"
TITLE = "How many constraints a normalization imposes"
SOURCES = ("S153",)
CAPTION = (
    "Independent equations that normalized outputs satisfy, over their number of entries: measured as the rank "
    "that the Jacobian of the layer lacks (points), and the formulas (dashed). At 1 nothing of the input is left. "
    "(a) Group normalization 2g and group whitening g(g+3)/2 of d = 64 entries of a sample, g groups: feasible up "
    "to g = d/2 and $(\\sqrt{8d+9}-3)/2 = 9.9$ (red). At g = √d = 8 the covariance is singular already, and fewer "
    "equations hold. (b) BatchNorm 2d and batch whitening d(d+3)/2 of the md entries of a batch, d = 8: feasible "
    "from m = 2 and m = (d+3)/2 = 5.5 samples on."
)
COLUMNS = ("method", "size", "entries", "constraints", "predicted")

GN, GW, BN, BW = "group normalization", "group whitening", "BatchNorm", "batch whitening"
_EPS = 1e-14
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Setting:
    """What is measured: features of a sample and numbers of groups; features and sizes of a batch."""

    features: int = 64
    groups: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    batch_features: int = 8
    batches: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 12, 16)


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(features=32, groups=(1, 2, 4, 8, 16), batches=(2, 6, 12)) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Measure the rank that the Jacobian of each layer lacks, and compare with the formulas."""
    generator = torch.Generator().manual_seed(seed)
    d, f = setting.features, setting.batch_features
    rows = []
    for groups in setting.groups:
        sample = torch.randn(1, d, generator=generator, dtype=torch.float64)
        normalization = norms.Norm(norms.Group(groups), norms.Standardize(_EPS))
        rows.append((GN, groups, d, _lacking(normalization, sample), min(2 * groups, d)))
        whitening = norms.Norm(norms.Group(groups), norms.Whiten("zca", _EPS))
        if groups * (groups + 3) // 2 <= d:
            rows.append((GW, groups, d, _lacking(whitening, sample), groups * (groups + 3) // 2))
    for size in setting.batches:
        batch = torch.randn(size, f, generator=generator, dtype=torch.float64)
        normalization = norms.Norm(norms.Batch(), norms.Standardize(_EPS))
        rows.append((BN, size, size * f, _lacking(normalization, batch), min(2 * f, size * f)))
        if f * (f + 3) // 2 <= size * f and size > f:
            whitening = norms.Norm(norms.Batch(), norms.Whiten("zca", _EPS))
            rows.append((BW, size, size * f, _lacking(whitening, batch), f * (f + 3) // 2))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _lacking(layer: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Return the number of directions that the outputs cannot move in: entries less the rank of the Jacobian."""
    columns: Tensor = torch.autograd.functional.jacobian(layer, x)  # type: ignore[no-untyped-call]
    jacobian = columns.reshape(x.numel(), x.numel())
    values = torch.linalg.svdvals(jacobian)
    return int((values < _TOLERANCE * max(float(values[0]), 1.0)).sum())


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that the ranks are those of the formulas, and the bounds that follow."""

    def counted(method: str, formula: str, part: pd.DataFrame, reason: str = "") -> Claim:
        return at_most(
            f"{method[0].upper()}{method[1:]} imposes {formula} constraints.",
            "S153, section 4.1",
            "largest |entries - rank of the Jacobian - formula|",
            by_seed(part, lambda own: float((own["constraints"] - own["predicted"]).abs().max())),
            0.0,
            reason=reason,
        )

    of = {method: frame[frame["method"] == method] for method in (GN, GW, BN, BW)}
    regular = of[GW][of[GW]["size"] ** 2 < of[GW]["entries"]]
    signs = equal(
        "Group normalization with groups of two leaves only signs.",
        "S153, section 4.1",
        "constraints over entries at g = d/2",
        by_seed(_at_half(frame), lambda part: float((part["constraints"] / part["entries"]).max())),
        1.0,
        tolerance=0.0,
    )
    return (
        counted(GN, "2g", of[GN]),
        counted(GW, "g(g+3)/2 (g < √d)", regular),
        counted(
            GW,
            "g(g+3)/2 (up to its bound)",
            of[GW],
            "from g = √d on, g features of d/g entries have a singular covariance: not all equations can hold",
        ),
        counted(BN, "2d", of[BN]),
        counted(BW, "d(d+3)/2", of[BW]),
        signs,
    )


def _at_half(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[(frame["method"] == GN) & (2 * frame["size"] >= frame["entries"])]


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the share of entries that is constrained."""
    groups, batches = style.panels(canvas, columns=2)
    d = int(frame.loc[frame["method"] == GN, "entries"].iloc[0])
    f = int((frame["entries"] / frame["size"])[frame["method"] == BN].iloc[0])
    shared = frame.assign(share=frame["constraints"] / frame["entries"])
    for ax, methods in ((groups, (GN, GW)), (batches, (BN, BW))):
        for index, method in enumerate(methods):
            part = shared[shared["method"] == method]
            style.curve(ax, part, "size", "share", name=method, index=index, points=True)
            ax.lines[-1].set_linestyle("")
        style.rule(ax, 1.0, "nothing left")
        ax.set_ylim(0, 1.5)
    grid = np.geomspace(1, 32, 100)
    style.theory(groups, grid, 2 * grid / d, name="formulas")
    style.theory(groups, grid, grid * (grid + 3) / 2 / d, name="")
    groups.axvline(float(np.sqrt(8 * d + 9) - 3) / 2, color="#c62828", linewidth=0.8, linestyle=":")
    sizes = np.linspace(1.5, 16, 100)
    style.theory(batches, sizes, 2 / sizes, name="formulas")
    style.theory(batches, sizes, (f + 3) / 2 / sizes, name="")
    groups.set_xscale("log", base=2)
    groups.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    for ax in (groups, batches):
        ax.legend(loc="upper left" if ax is groups else "upper right")
    style.label(groups, f"within a sample, $d$ = {d}", "groups $g$", "constraints over entries")
    style.label(batches, f"over a batch, $d$ = {f}", "batch size $m$", "constraints over entries")
