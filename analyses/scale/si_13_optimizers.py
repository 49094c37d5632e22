"""SI-13: what other optimizers make of the norm of scale-invariant weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_most, by_seed, equal
from analyses.scale.network import digits, invariant_mlp, watch, weights
from normscope import gradients, workbench

ID = "SI-13"
TITLE = "Norm and angle under Adam, AdamP, LARS and LAMB"
SOURCES = ("S120", "S106", "S107")
CAPTION = (
    "The second layer of a perceptron (784-64-64-64-10, BatchNorm, float64, batch 128, no decay) under Adam and AdamP "
    "(η = 0.003), LARS (η = 10, trust 0.001, no momentum) and LAMB (η = 0.01). (a) AdamP keeps the norm from growing "
    "with momentum; LARS and LAMB, whose steps are shares of ‖w‖, let it grow exponentially, (b) while the layer "
    "turns by a fixed angle a step: arctan(0.01), dashed."
)
COLUMNS = ("optimizer", "layer", "step", "norm", "angle", "growth", "tangent")

_SHARE = 0.01
_MAKE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda params: torch.optim.Adam(params, lr=3e-3),
    "AdamP": lambda params: gradients.AdamP(params, lr=3e-3),
    "LARS": lambda params: gradients.LARS(
        params, lr=_SHARE / 0.001, momentum=0.0, weight_decay=0.0, trust_coefficient=0.001
    ),
    "LAMB": lambda params: gradients.LAMB(params, lr=_SHARE, weight_decay=0.0),
}


@dataclass(frozen=True)
class Setting:
    """What is trained: layer sizes, batch size, steps, and how many of them are kept."""

    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    batch: int = 128
    steps: int = 500
    kept: int = 50


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(784, 32, 32, 10), batch=64, steps=100) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train by each optimizer; `tangent` is what the norm would have grown by, were each step orthogonal to w."""
    train, _ = digits(seed)
    parts = []
    for name, make in _MAKE.items():
        torch.manual_seed(seed)
        model = invariant_mlp(setting.sizes)
        batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
        seen = watch(model, make(weights(model)), batches, setting.steps)
        for layer, part in seen.groupby("layer"):
            squares = part["norm"] ** 2
            tangent = (squares * np.tan(part["angle"]) ** 2).cumsum().shift(fill_value=0.0)
            rows = part.assign(optimizer=name, layer=layer, growth=squares - squares.iloc[0], tangent=tangent)
            every = max(1, setting.steps // setting.kept)
            parts.append(rows[(rows["step"] % every == 0) | (rows["step"] == setting.steps - 1)])
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge growth under AdamP, and the fixed turning under LARS and LAMB."""
    last = frame[frame["step"] == frame["step"].max()]
    of = {name: frame[frame["optimizer"] == name] for name in _MAKE}

    def over_adam(rows: pd.DataFrame) -> float:
        growth = rows.pivot(index="layer", columns="optimizer", values="growth")
        return float((growth["AdamP"] / growth["Adam"]).max())

    def exponential(rows: pd.DataFrame) -> float:
        start = rows.groupby("layer")["norm"].transform("first")
        return float((rows["norm"] / start / (1 + _SHARE**2) ** (rows["step"] / 2) - 1).abs().max())

    angle = np.arctan(_SHARE)
    later = frame[frame["step"] > 0]
    return (
        at_most(
            "AdamP's steps are orthogonal to the weights, so that growth is the sum of their squares.",
            "S120, projected steps",
            "max over layers and steps of |(‖w_t‖² - ‖w_0‖²) / Σ ‖w_k‖² tan²(angle) - 1|; eps = 10⁻⁸ beside ‖w‖",
            by_seed(later[later["optimizer"] == "AdamP"], lambda r: (r["growth"] / r["tangent"] - 1).abs().max()),
            1e-5,
        ),
        at_most(
            "AdamP's norm grows less than Adam's.",
            "S120, projected steps",
            "growth of ‖w‖² under AdamP over that under Adam, largest over layers",
            by_seed(last, over_adam),
            0.5,
        ),
        at_most(
            "LARS turns every layer by the angle arctan(η trust) at every step.",
            "S106, layer-wise rate",
            "max over layers and steps of |angle / arctan(0.01) - 1|",
            by_seed(of["LARS"], lambda rows: (rows["angle"] / angle - 1).abs().max()),
            1e-8,
        ),
        at_most(
            "Under LARS the norm of scale-invariant weights grows exponentially, by √(1 + η² trust²) a step.",
            "S106, layer-wise rate",
            "max over layers and steps of |‖w_t‖ / (‖w_0‖ (1 + 10⁻⁴)^(t/2)) - 1|",
            by_seed(of["LARS"], exponential),
            1e-8,
        ),
        equal(
            "LAMB turns every layer by about the angle η at every step.",
            "S107, layer-wise rate",
            "angle / η, mean over steps, the layer farthest from 1",
            by_seed(of["LAMB"], lambda rows: _farthest(rows.groupby("layer")["angle"].mean() / _SHARE)),
            1.0,
            tolerance=0.05,
            reason="Adam's direction is not orthogonal to the weights: its radial part does not turn them",
        ),
    )


def _farthest(ratios: pd.Series) -> float:
    return float(ratios.iloc[(ratios - 1).abs().argmax()])


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw norm and angle of the second layer."""
    norms, angles = style.panels(canvas, columns=2)
    for index, name in enumerate(_MAKE):
        rows = frame[(frame["optimizer"] == name) & (frame["layer"] == 2)]
        relative = rows.assign(norm=rows["norm"] / rows.groupby("seed")["norm"].transform("first"))
        style.curve(norms, relative, "step", "norm", name=name, index=index)
        style.curve(angles, rows, "step", "angle", name=name, index=index)
    steps = np.array([0, frame["step"].max()])
    style.theory(angles, steps, np.full(2, np.arctan(_SHARE)), name="arctan(0.01)")
    style.logarithmic(angles)
    for ax in (norms, angles):
        ax.legend()
    style.label(norms, "norm of layer 2", "step $t$", r"$\|w_t\|/\|w_0\|$")
    style.label(angles, "angle of layer 2", "step $t$", r"angular update $\Delta_t$ (rad)")
