"""SI-8: changes of weights, learning rate and decay together that change nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.scale.network import digits, invariant_mlp, weights
from normscope import workbench

ID = "SI-8"
TITLE = "Initial scale, learning rate and decay are one freedom too many"
SOURCES = ("vanlaarhoven2017", "S128")
CAPTION = (
    "A perceptron with BatchNorm (784-64-64-64-10, float64, equal batches) trained from multiplied weights. "
    "(a) SGD with momentum 0.9 and decay from √c w, with rates (cη, λ/c): one curve for every c; another where "
    "√c w is alone, c = 100. (b) Adam without decay from c w, with rate cη. (c) Distances from c = 1."
)
COLUMNS = ("optimizer", "c", "step", "loss", "difference")

SGD, ADAM, UNCHANGED = "SGD, (√c w, cη, λ/c)", "Adam, (c w, cη)", "SGD, √c w alone"


@dataclass(frozen=True)
class Setting:
    """What is trained: layer sizes, batch size, rates (η, λ) of SGD, rate of Adam, factors c, steps."""

    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    batch: int = 128
    sgd: tuple[float, float] = (0.05, 5e-3)
    adam: float = 1e-3
    factors: tuple[float, ...] = (1.0, 0.1, 4.0, 100.0)
    steps: int = 150
    every: int = 5


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(784, 16, 16, 10), steps=40) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train from each factor by each optimizer, c = 1 first."""
    parts = []
    for name in (SGD, ADAM, UNCHANGED):
        base: list[float] = []
        for c in setting.factors if name != UNCHANGED else (setting.factors[0], setting.factors[-1]):
            losses = _train(setting, name, c, seed)
            base = base or losses
            gaps = [abs(own - other) for own, other in zip(losses, base, strict=True)]
            steps = range(setting.steps)
            rows = pd.DataFrame({"optimizer": name, "c": c, "step": steps, "loss": losses, "difference": gaps})
            rows["difference"] = rows["difference"].cummax()
            parts.append(rows[rows["step"] % setting.every == 0])
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _train(setting: Setting, name: str, c: float, seed: int) -> list[float]:
    train, _ = digits(seed)
    torch.manual_seed(seed)
    model = invariant_mlp(setting.sizes)
    for weight in weights(model):
        weight.data.mul_(c if name == ADAM else c**0.5)
    lr, decay = setting.sgd
    optimizer: torch.optim.Optimizer
    if name == ADAM:
        # pixels that are always 0 have gradient 0, so that no eps at all would give 0/0
        optimizer = torch.optim.Adam(weights(model), lr=c * setting.adam, eps=1e-60)
    else:
        scale = c if name == SGD else 1.0
        optimizer = torch.optim.SGD(weights(model), lr=scale * lr, momentum=0.9, weight_decay=decay / scale)
    batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
    return workbench.fit(model, optimizer, batches, workbench.cross_entropy, steps=setting.steps, progress=False)


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that nothing changes, and that the scale alone would."""

    def largest(name: str) -> list[float]:
        return by_seed(frame[frame["optimizer"] == name], lambda rows: rows["difference"].max())

    statistic = "largest |loss - loss with c = 1| over c and steps (nats)"
    return (
        at_most(
            "SGD from √c w with rate cη and decay λ/c is SGD from w with rate η and decay λ.",
            "vanlaarhoven2017, effective learning rate",
            statistic,
            largest(SGD),
            1e-10,
        ),
        at_most(
            "Adam from c w with rate cη is Adam from w with rate η.",
            "vanlaarhoven2017, Adam",
            statistic,
            largest(ADAM),
            1e-10,
        ),
        at_least(
            "The scale of the first weights alone does change training.",
            "S128, equivalence",
            statistic,
            largest(UNCHANGED),
            1e-2,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw losses for each factor, and distances from the factor 1."""
    axes = style.panels(canvas, columns=3)
    for ax, name in zip(axes, (SGD, ADAM), strict=False):
        for index, (c, rows) in enumerate(frame[frame["optimizer"] == name].groupby("c", sort=False)):
            style.curve(ax, rows, "step", "loss", name=f"c = {c:g}", index=index)
        style.label(ax, name, "step $t$", "training loss (nats)")
    alone = frame[(frame["optimizer"] == UNCHANGED) & (frame["c"] != 1)]
    style.curve(axes[0], alone, "step", "loss", name="c = 100, rates unchanged", index=4)
    for index, name in enumerate((SGD, ADAM, UNCHANGED)):
        rows = frame[(frame["optimizer"] == name) & (frame["c"] != 1)]
        farthest = rows.groupby(["seed", "step"])["difference"].max().clip(lower=1e-17).reset_index()
        style.curve(axes[2], farthest, "step", "difference", name=name, index=index)
    axes[2].set_yscale("log")
    axes[0].set_ylim(top=3.4)
    for ax in axes:
        ax.legend()
    style.label(axes[2], "distance from c = 1", "step $t$", "largest loss difference so far (nats)")
