"""SI-12: which changes of weights and data each normalization does not see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from torch import Tensor

from analyses import style
from analyses.claim import Claim, by_seed, equal
from normscope import norms

ID = "SI-12"
TITLE = "The invariances of batch, weight, layer and RMS normalization"
SOURCES = ("ba2016", "S036")
CAPTION = (
    "One normalized linear layer (d = 20 inputs, 16 units, 64 examples, float64) under changes of its weights or data. "
    "Each cell has the largest change of an output over their root mean square, the median over seeds; a dot marks the "
    "cells that the literature calls invariant."
)
COLUMNS = ("norm", "change", "difference", "invariant")

_CHANGES = (
    "weight matrix × a",
    "weight matrix + shift",
    "one unit's weights × a",
    "all data × a",
    "all data + shift",
    "one example × a",
)
# table 1 of the layer normalization paper, and of that of RMS normalization, in the order of the changes
_INVARIANT = {
    "batch": (True, False, True, True, True, False),
    "weight": (True, False, True, False, False, False),
    "layer": (True, True, False, True, False, True),
    "RMS": (True, False, False, True, False, True),
}
_TABLE = {
    "batch": "ba2016, table 1",
    "weight": "ba2016, table 1",
    "layer": "ba2016, table 1",
    "RMS": "S036, table of invariances",
}
_LIMIT = 1e-9


@dataclass(frozen=True)
class Setting:
    """The layer: inputs, units, examples, factor a."""

    inputs: int = 20
    units: int = 16
    examples: int = 64
    factor: float = 3.0


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Compare each layer's outputs before and after each change."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w, x = draw(setting.units, setting.inputs), draw(setting.examples, setting.inputs) + 1
    shift, a = draw(setting.inputs), setting.factor
    first_row, first_example = w.clone(), x.clone()
    first_row[0] *= a
    first_example[0] *= a
    changed = ((a * w, x), (w + shift, x), (first_row, x), (w, a * x), (w, x + shift), (w, first_example))
    rows = []
    for name, layer in _layers(setting.units).items():
        base = layer(w, x)
        for change, pair, invariant in zip(_CHANGES, changed, _INVARIANT[name], strict=True):
            difference = (layer(*pair) - base).abs().max() / base.square().mean().sqrt()
            rows.append((name, change, float(difference), invariant))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _layers(units: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the layers as functions of weights and data, without eps where there is a choice."""
    layers = {name: norms.build(name.lower(), units, eps=1e-30).double() for name in ("batch", "layer", "RMS")}
    return {
        "batch": lambda w, x: layers["batch"](x @ w.T).detach(),
        "weight": lambda w, x: x @ (w / w.norm(dim=1, keepdim=True)).T,
        "layer": lambda w, x: layers["layer"](x @ w.T).detach(),
        "RMS": lambda w, x: layers["RMS"](x @ w.T).detach(),
    }


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge each row of the published tables."""
    return tuple(
        equal(
            f"{name[0].upper()}{name[1:]} normalization is invariant to "
            f"{', '.join(c for c, held in zip(_CHANGES, _INVARIANT[name], strict=True) if held)}, and to no other.",
            _TABLE[name],
            f"changes of six where (difference below {_LIMIT:g}) is what the table says",
            by_seed(frame[frame["norm"] == name], _agreements),
            6,
            tolerance=0.0,
        )
        for name in _INVARIANT
    )


def _agreements(rows: pd.DataFrame) -> float:
    return float(((rows["difference"] < _LIMIT) == rows["invariant"]).sum())


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the table, colored by the size of the change."""
    (ax,) = style.panels(canvas, height=2.6)
    canvas.set_size_inches(7.0, 2.6)
    table = frame.groupby(["norm", "change"])["difference"].median()
    for row, name in enumerate(_INVARIANT):
        for column, change in enumerate(_CHANGES):
            difference = float(table[name, change])
            # blue where nothing changed, orange where something did
            shade = style.color(0) if difference < _LIMIT else style.color(1)
            ax.add_patch(Rectangle((column - 0.47, row - 0.45), 0.94, 0.9, color=shade))
            text = f"{difference:.2g}" if difference > _LIMIT or difference == 0 else _power(difference)
            dot = " •" if _INVARIANT[name][column] else ""
            ax.text(column, row, text + dot, ha="center", va="center", color="white")
    ax.set(xlim=(-0.5, len(_CHANGES) - 0.5), ylim=(len(_INVARIANT) - 0.5, -0.5))
    ax.set_xticks(range(len(_CHANGES)), [change.replace(" ×", "\n×").replace(" +", "\n+") for change in _CHANGES])
    ax.set_yticks(range(len(_INVARIANT)), list(_INVARIANT))
    ax.grid(False)
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    ax.set_title("relative change of the outputs")


def _power(value: float) -> str:
    return f"$10^{{{int(np.floor(np.log10(value)))}}}$"
