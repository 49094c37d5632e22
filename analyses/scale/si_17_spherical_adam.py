"""SI-17: SGD with weight decay is an Adam without momentum on the sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.scale.network import digits, invariant_mlp, weights
from normscope import workbench

ID = "SI-17"
TITLE = "SGD on scale-invariant weights is adaptive on the sphere"
SOURCES = ("S119",)
CAPTION = (
    "SGD with decay (η = 0.1, λ = 0.01, no momentum) beside AdamG on the unit sphere, with one second moment for each "
    "weight matrix, v <- β₂ v + (1 - β₂)‖g‖², β₂ = (1 - ηλ)⁴, rate √((1 - β₂)/2) / ((1 - ηλ)² √v), v first from "
    "‖w‖⁴; and beside descent on the sphere that keeps the first effective rate (784-64-64-64-10, BatchNorm, float64, "
    "equal batches). (a) Losses; (b) the largest distance from SGD so far; (c) the rate of layer 2: SGD's follows v."
)
COLUMNS = ("run", "step", "loss", "difference", "rate")

SGD, ADAMG, FIXED = "SGD with decay", "AdamG on the sphere", "fixed rate on the sphere"


@dataclass(frozen=True)
class Setting:
    """What is trained: layer sizes, batch size, learning rate η, decay λ, steps, and how many of them are kept."""

    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    batch: int = 128
    lr: float = 0.1
    decay: float = 1e-2
    steps: int = 500
    kept: int = 50


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(784, 16, 16, 10), steps=100) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train the three runs side by side."""
    train, _ = digits(seed)
    models = {}
    for name in (SGD, ADAMG, FIXED):
        torch.manual_seed(seed)
        models[name] = invariant_mlp(setting.sizes)
    rates = [
        setting.lr / float(w.detach().square().sum()) / (1 - setting.lr * setting.decay) for w in weights(models[SGD])
    ]
    moments = [_moment(rate, setting) for rate in rates]
    for name in (ADAMG, FIXED):
        for weight in weights(models[name]):
            weight.data.div_(weight.data.norm())
    batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
    rows, largest = [], dict.fromkeys(models, 0.0)
    for step, batch in zip(range(setting.steps), batches, strict=False):
        losses, gradients = {}, {}
        for name, model in models.items():
            loss = workbench.cross_entropy(model(batch[0]), batch[1])
            gradients[name] = torch.autograd.grad(loss, weights(model))
            losses[name] = float(loss.detach())
            largest[name] = max(largest[name], abs(losses[name] - losses[SGD]))
        own = setting.lr / float(weights(models[SGD])[1].detach().square().sum()) / (1 - setting.lr * setting.decay)
        shown = {SGD: own, ADAMG: _rate(moments[1], setting), FIXED: rates[1]}
        if step % (setting.steps // setting.kept) == 0 or step == setting.steps - 1:
            rows += [(name, step, losses[name], largest[name], shown[name]) for name in models]
        with torch.no_grad():
            for weight, gradient in zip(weights(models[SGD]), gradients[SGD], strict=True):
                weight.mul_(1 - setting.lr * setting.decay).sub_(setting.lr * gradient)
        _turn(models[ADAMG], gradients[ADAMG], [_rate(moment, setting) for moment in moments])
        _turn(models[FIXED], gradients[FIXED], rates)
        beta = _beta(setting)
        squares = [float(gradient.square().sum()) for gradient in gradients[ADAMG]]
        moments = [beta * v + (1 - beta) * square for v, square in zip(moments, squares, strict=True)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _beta(setting: Setting) -> float:
    return (1 - setting.lr * setting.decay) ** 4


def _rate(moment: float, setting: Setting) -> float:
    """Return AdamG's learning rate on the sphere."""
    return math.sqrt((1 - _beta(setting)) / 2 / moment) / math.sqrt(_beta(setting))


def _moment(rate: float, setting: Setting) -> float:
    """Return the second moment that gives a rate, the inverse of `_rate`."""
    return (1 - _beta(setting)) / 2 / (rate**2 * _beta(setting))


def _turn(model: nn.Module, gradients: tuple[Tensor, ...], rates: list[float]) -> None:
    """Step on the sphere: against the gradient, then back to length 1."""
    with torch.no_grad():
        for weight, gradient, rate in zip(weights(model), gradients, rates, strict=True):
            weight.sub_(rate * gradient)
            weight.div_(weight.norm())


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge how close AdamG stays to SGD, and that it is the adaptation that does it."""

    def largest(name: str) -> list[float]:
        return by_seed(frame[frame["run"] == name], lambda rows: rows["difference"].max())

    rates = frame.pivot(index=["seed", "step"], columns="run", values="rate")
    gaps = (rates[ADAMG] / rates[SGD] - 1).abs().groupby("seed").max()
    return (
        at_most(
            "SGD with decay is AdamG without momentum on the sphere, up to terms of fourth order in the step.",
            "S119, equivalence of SGD and AdamG",
            "largest |loss of AdamG - loss of SGD| over steps (nats)",
            largest(ADAMG),
            0.02,
        ),
        at_most(
            "The norm of the weights carries the second moment: the effective rates of the two runs agree.",
            "S119, equivalence of SGD and AdamG",
            "largest |rate of AdamG / effective rate of SGD - 1| over steps, layer 2",
            list(gaps),
            0.02,
        ),
        at_least(
            "A fixed rate on the sphere is another method.",
            "S119, steps on the sphere",
            "largest |loss with a fixed rate - loss of SGD| over that of AdamG",
            [fixed / own for fixed, own in zip(largest(FIXED), largest(ADAMG), strict=True)],
            1.0,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw losses, distances and effective rates."""
    losses, distances, rates = style.panels(canvas, columns=3)
    for index, name in enumerate((SGD, ADAMG, FIXED)):
        rows = frame[frame["run"] == name]
        style.curve(losses, rows, "step", "loss", name=name, index=index)
        relative = rows.assign(rate=rows["rate"] / rows.groupby("seed")["rate"].transform("first"))
        style.curve(rates, relative, "step", "rate", name=name, index=index)
        if name != SGD:
            shown = rows.assign(difference=rows["difference"].clip(lower=1e-17))
            style.curve(distances, shown, "step", "difference", name=name, index=index)
    distances.set_yscale("log")
    for ax in (losses, distances, rates):
        ax.legend()
    style.label(losses, "loss", "step $t$", "training loss (nats)")
    style.label(distances, "distance from SGD with decay", "step $t$", "largest loss difference so far (nats)")
    style.label(rates, "effective rate of layer 2", "step $t$", "rate on the unit sphere over the first")
