"""SI-3: momentum makes the norm of scale-invariant weights grow many times faster, SGDP does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import nn

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.scale.network import digits, invariant_mlp, watch, weights
from normscope import gradients, workbench

ID = "SI-3"
TITLE = "Momentum speeds up the growth of the norm, projection undoes it"
SOURCES = ("S120",)
CAPTION = (
    "SGD, SGD with momentum β = 0.9 and SGDP (784-64-64-64-10, float64, η = 0.1, batch 128). (a) Squared norm of the "
    "second layer; dashed: what the lemma gives for momentum, ‖w_0‖² + η² Σ ‖p_k‖² (1 + 2 Σ β^j), from its own "
    "steps. (b) The effective learning rate falls with it. (c) Growth over that of SGD at the last step, by layer; "
    "dotted: the bound 1 + 2β/(1 - β) = 19 for steps of equal length."
)
COLUMNS = ("optimizer", "layer", "step", "norm2", "growth", "lemma", "tangent", "rate")

SGD, MOMENTUM, SGDP = "SGD", "momentum", "SGDP"
BETA = 0.9
_MAKE: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    SGD: lambda params, lr: torch.optim.SGD(params, lr=lr),
    MOMENTUM: lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=BETA),
    SGDP: lambda params, lr: gradients.SGDP(params, lr=lr, momentum=BETA),
}


@dataclass(frozen=True)
class Setting:
    """What is trained: layer sizes, batch size, learning rate η, steps, and how many of them are kept."""

    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    batch: int = 128
    lr: float = 0.1
    steps: int = 1000
    kept: int = 50


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(784, 32, 32, 32, 10), steps=100) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train by each optimizer, keeping the lengths of the momentum for the lemma."""
    train, _ = digits(seed)
    parts = []
    for name, make in _MAKE.items():
        torch.manual_seed(seed)
        model = invariant_mlp(setting.sizes)
        optimizer = make(weights(model), setting.lr)
        lengths: list[list[float]] = []
        optimizer.register_step_post_hook(lambda o, *_, kept=lengths: kept.append(_momenta(o)))
        batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
        seen = watch(model, optimizer, batches, setting.steps)
        for layer in sorted({*seen["layer"]}):
            part = seen[seen["layer"] == layer].reset_index(drop=True)
            rows = _layer(part, [step[layer - 1] for step in lengths], setting)
            parts.append(rows.assign(optimizer=name, layer=layer))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _momenta(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return ‖p_k‖² of each weight, the gradient itself where there is no momentum."""
    params: list[nn.Parameter] = optimizer.param_groups[0]["params"]
    kept = [optimizer.state[p].get("momentum_buffer", p.grad) for p in params]
    return [float(p.square().sum()) for p in kept]


def _layer(part: pd.DataFrame, lengths: list[float], setting: Setting) -> pd.DataFrame:
    """Put beside the growth the lemma's sum of ‖p_t‖² + 2 Σ β^(t-k) ‖p_k‖², and that of steps orthogonal to w."""
    start, growth, past, lemma = float(part["norm"].iloc[0]) ** 2, 0.0, 0.0, [0.0]
    for length in lengths[:-1]:
        growth += setting.lr**2 * (length + 2 * past)
        past = BETA * (past + length)
        lemma.append(growth)
    norm2 = part["norm"] ** 2
    rows = pd.DataFrame({
        "step": part["step"],
        "norm2": norm2,
        "growth": norm2 - start,
        "lemma": pd.Series(lemma) + start,
        "tangent": (norm2 * np.tan(part["angle"]) ** 2).cumsum().shift(fill_value=0.0),
        "rate": setting.lr / norm2,
    })
    every = max(1, setting.steps // setting.kept)
    return rows[(rows["step"] % every == 0) | (rows["step"] == setting.steps - 1)]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the lemma, its corollary layer by layer, and the projection."""

    def ratio(rows: pd.DataFrame, layer: int, above: str = MOMENTUM, below: str = SGD) -> float:
        last = rows[(rows["step"] == rows["step"].max()) & (rows["layer"] == layer)].set_index("optimizer")["growth"]
        return float(last[above] / last[below])

    moved = frame[frame["optimizer"] == MOMENTUM]
    projected = frame[(frame["optimizer"] == SGDP) & (frame["step"] > 0)]
    layers = sorted({*frame["layer"]})
    return (
        at_most(
            "The norm under momentum is ‖w_0‖² + η² Σ (‖p_t‖² + 2 Σ β^(t-k) ‖p_k‖²).",
            "S120, lemma 2.2",
            "max over layers and steps of |‖w_t‖² / lemma - 1|",
            by_seed(moved, lambda rows: (rows["norm2"] / rows["lemma"] - 1).abs().max()),
            1e-10,
        ),
        *(
            at_least(
                f"In layer {layer} momentum multiplies the growth by more than 1 + 2β/(1 - β).",
                "S120, corollary 2.3",
                "growth of ‖w‖² under momentum over that under SGD, last step",
                [ratio(rows, layer) for _, rows in frame.groupby("seed")],
                19.0,
                reason="the corollary holds for steps of equal length; a layer whose norm has grown takes shorter ones",
            )
            for layer in layers
        ),
        at_most(
            "SGDP undoes the growth by momentum.",
            "S120, projected steps",
            "growth of ‖w‖² under SGDP over that under momentum, largest over layers",
            by_seed(frame, lambda rows: max(ratio(rows, layer, SGDP, MOMENTUM) for layer in layers)),
            0.1,
        ),
        at_most(
            "Steps of SGDP are orthogonal to the weights, so that growth is the sum of their squares.",
            "S120, projected steps",
            "max over layers and steps of |(‖w_t‖² - ‖w_0‖²) / Σ ‖w_k‖² tan²(angle) - 1|; eps = 10⁻⁸ beside ‖w‖",
            by_seed(projected, lambda rows: (rows["growth"] / rows["tangent"] - 1).abs().max()),
            1e-5,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw norms, effective learning rates, and growth over SGD's by layer."""
    norms, rates, bars = style.panels(canvas, columns=3)
    for index, name in enumerate(_MAKE):
        part = frame[(frame["optimizer"] == name) & (frame["layer"] == 2)]
        style.curve(norms, part, "step", "norm2", name=name, index=index)
        style.curve(rates, part, "step", "rate", name=name, index=index)
        if name == MOMENTUM:
            line = part.groupby("step")["lemma"].median()
            style.theory(norms, line.index, line, name="lemma")
    last = frame[frame["step"] == frame["step"].max()].set_index(["seed", "layer", "optimizer"])["growth"].unstack()
    for index, name in enumerate((MOMENTUM, SGDP), start=1):
        shown = (last[name] / last[SGD]).rename("ratio").reset_index()
        style.curve(bars, shown, "layer", "ratio", name=f"{name} / SGD", index=index, points=True)
    style.rule(bars, 19, r"$1+2\beta/(1-\beta)$")
    bars.set(yscale="log", xticks=sorted({*frame["layer"]}))
    for ax in (norms, rates, bars):
        ax.legend()
    style.label(norms, "norm of layer 2", "step $t$", r"$\|w_t\|^2$")
    style.label(rates, "effective rate of layer 2", "step $t$", r"$\eta/\|w_t\|^2$")
    style.label(bars, "growth over SGD's", "layer", "ratio of growths")
