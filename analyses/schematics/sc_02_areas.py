"""SC-2: which entries of an activation share statistics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Polygon
from torch import Tensor, nn

from analyses import style
from analyses.claim import Claim, by_seed, equal
from normscope import norms

ID = "SC-2"
TITLE = "Normalization areas: which entries share their statistics"
SOURCES = ("huang2020",)
CAPTION = (
    "An activation with N examples, C channels and H × W places as a block; colored are the entries that share mean "
    "and variance with the one at the nearest corner: batch, layer, instance, group (two groups), position, "
    "batch-group (three examples, two groups). The claims compare each with the entries that torch's own layer uses."
)
COLUMNS = ("area", "n", "c", "l", "member", "used")

N, C, H, W = 6, 6, 2, 2
_AREAS = {
    "batch": norms.Batch(),
    "layer": norms.Layer(),
    "instance": norms.Instance(),
    "group": norms.Group(2),
    "position": norms.Position(),
    "batch-group": norms.BatchGroup(2, 3),
}
_SIZES = {
    "batch": N * H * W,
    "layer": C * H * W,
    "instance": H * W,
    "group": C * H * W // 2,
    "position": C,
    "batch-group": 3 * C * H * W // 2,
}


@dataclass(frozen=True)
class Setting:
    """There is nothing to set: the block's size is that of the drawing."""


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Mark the entries of the corner's area, and those that the corner's normalized value depends on in torch."""
    index = torch.arange(N * C * H * W).reshape(N, C, H, W)
    corner = int(index[0, C - 1, 0, 0])
    x = torch.randn(N, C, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parts = []
    for name, area in _AREAS.items():
        view = area.view(index)
        place = (view == corner).nonzero()[0]
        member = torch.isin(index, view[place[0], place[1]])
        used = _dependence(name, x)
        grid = np.indices((N, C, H * W)).reshape(3, -1)
        columns = {"n": grid[0], "c": grid[1], "l": grid[2], "member": member.flatten().int()}
        parts.append(pd.DataFrame({"area": name, **columns, "used": used.flatten().int()}))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _dependence(name: str, x: Tensor) -> Tensor:
    """Return which inputs the corner's output of torch's layer depends on."""
    x = x.clone().requires_grad_()
    layers: dict[str, nn.Module] = {
        "batch": nn.BatchNorm2d(C, affine=False),
        "layer": nn.LayerNorm((C, H, W)),
        "instance": nn.InstanceNorm2d(C),
        "group": nn.GroupNorm(2, C),
        "position": nn.LayerNorm(C),
        "batch-group": nn.GroupNorm(2, 3 * C),
    }
    layer = layers[name].double()
    if name == "position":
        y = layer(x.movedim(1, -1)).movedim(-1, 1)
    elif name == "batch-group":
        # three examples with their channels side by side, those of one group together, are one example of GroupNorm
        joined = x.reshape(2, 3, 2, C // 2, H, W).transpose(1, 2).reshape(2, 3 * C, H, W)
        y = layer(joined).reshape(2, 2, 3, C // 2, H, W).transpose(1, 2).reshape(N, C, H, W)
    else:
        y = layer(x)
    y[0, C - 1, 0, 0].backward()
    assert x.grad is not None
    return x.grad != 0


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge size and members of each area."""
    found = []
    for name, size in _SIZES.items():
        part = frame[frame["area"] == name]
        found.append(
            equal(
                f"The area of {name} normalization has the {size} entries whose statistics torch's layer uses.",
                "huang2020, area partitioning",
                "entries both in the area and used, minus entries in one only",
                by_seed(part, lambda rows: (rows["member"] * rows["used"] - (rows["member"] != rows["used"])).sum()),
                size,
                tolerance=0.0,
            )
        )
    return tuple(found)


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw a block for each area."""
    first = frame[frame["seed"] == frame["seed"].min()]
    for ax, name in zip(style.panels(canvas, columns=3, rows=2, height=2.15), _AREAS, strict=True):
        _block(ax, first.loc[first["area"] == name, "member"].to_numpy().reshape(N, C, H * W))
        style.label(ax, name, "", "")


def _block(ax: Axes, member: np.ndarray) -> None:
    """Draw the three visible faces of a block: channels to the right, places down, examples away from the reader."""
    away = np.array([0.55, 0.45])

    def corner(n: float, c: float, low: float) -> np.ndarray:
        return np.array([c, -low]) + n * away

    for a in range(N):
        for b in range(C):
            _cell(ax, [corner(a + i, b + j, 0) for i, j in _SQUARE], member[a, b, 0], 0.12)
    for a in range(C):
        for b in range(H * W):
            _cell(ax, [corner(0, a + i, b + j) for i, j in _SQUARE], member[0, a, b], 0.0)
    for a in range(N):
        for b in range(H * W):
            _cell(ax, [corner(a + i, C, b + j) for i, j in _SQUARE], member[a, C - 1, b], -0.15)
    for text, place in (
        ("C", corner(0, C / 2, H * W + 0.55)),
        ("H, W", corner(0, -0.8, H * W / 2)),
        ("N", corner(N / 2, C + 0.55, H * W)),
    ):
        ax.text(float(place[0]), float(place[1]), text, ha="center", va="center", fontstyle="italic")
    ax.set(xlim=(-1.4, 10), ylim=(-5, 3.1), aspect="equal")
    ax.set_axis_off()


_SQUARE = ((0, 0), (0, 1), (1, 1), (1, 0))


def _cell(ax: Axes, corners: list[np.ndarray], member: int, light: float) -> None:
    """Draw one face of a cell, lighter on top and darker at the side."""
    base = np.array([0xE0, 0x69, 0x0C]) / 255 if member else np.array([0.87, 0.89, 0.92])
    shade = base + (1 - base) * light if light > 0 else base * (1 + light)
    ax.add_patch(Polygon(np.array(corners), closed=True, facecolor=tuple(shade), edgecolor="white", linewidth=0.8))
