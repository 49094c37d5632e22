"""SI-5: with weight decay, the norm of scale-invariant weights settles at a value that rate and decay decide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, by_seed, equal
from analyses.scale.network import digits, invariant_mlp, relabeled, watch, weights, windowed
from analyses.scale.walk import momentum, settled, walk
from normscope import workbench

ID = "SI-5"
TITLE = "The norm settles at the fourth root of η/λ"
SOURCES = ("vanlaarhoven2017", "S129")
CAPTION = (
    "(a) Norm of a random walk with gradients orthogonal to w (d = 400, η = 0.1, λ = 0.01); dashed: "
    "(ηL / (λ(1-α)(2-λη/(1+α))))^(1/4), L = E‖w‖²‖g‖² = 1. (b) The walk's last norm against η/λ, ηλ = 10⁻³, "
    "α = 0; dashed: the fourth root. (c) Norms of a perceptron's layers (784-64-64-64-10, BatchNorm, batch 128, "
    "α = 0.9, η = 0.05, λ = 0.01, 30% of the labels random) and what the formula gives for each with its measured L."
)
COLUMNS = ("part", "curve", "at", "norm", "expected")

WALK, SWEEP, NETWORK = "walk", "sweep", "network"


@dataclass(frozen=True)
class Setting:
    """What is run: steps of the walk, α, η/λ of the sweep; sizes, batch, steps of the network."""

    walked: int = 12000
    features: int = 400
    alphas: tuple[float, ...] = (0.0, 0.5, 0.9)
    lr: float = 0.1
    decay: float = 0.01
    ratios: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    batch: int = 128
    noise: float = 0.3
    trained: tuple[float, float, float] = (0.9, 0.05, 0.01)
    steps: int = 3000


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(walked=4000, features=100, sizes=(784, 16, 16, 10), batch=64, steps=300) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Walk for each α, walk for each η/λ from the norm expected, and train."""
    parts = []
    for alpha in setting.alphas:
        seen = walk(momentum(setting.lr, setting.decay, alpha), setting.features, setting.walked, seed)
        rows = windowed(seen, setting.walked // 60, []).rename(columns={"step": "at"})
        expected = settled(setting.lr, setting.decay, alpha)
        parts.append(rows.assign(part=WALK, curve=f"α = {alpha:g}", expected=expected))
    parts.append(_sweep(setting, seed))
    parts.append(_network(setting, seed))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _sweep(setting: Setting, seed: int) -> pd.DataFrame:
    """Change η/λ at a fixed product, so that every walk takes equally long to settle from twice the norm expected."""
    product, rows = setting.lr * setting.decay, []
    for ratio in setting.ratios:
        lr, decay = float(np.sqrt(product * ratio)), float(np.sqrt(product / ratio))
        expected = settled(lr, decay, 0.0)
        seen = walk(momentum(lr, decay, 0.0), setting.features, setting.walked // 2, seed, norm=2 * expected)
        norm = seen["norm"].iloc[-setting.walked // 10 :].mean()
        rows.append((SWEEP, "walk", ratio, norm, expected))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _network(setting: Setting, seed: int) -> pd.DataFrame:
    (images, labels), _ = digits(seed)
    alpha, lr, decay = setting.trained
    torch.manual_seed(seed)
    model = invariant_mlp(setting.sizes)
    optimizer = torch.optim.SGD(weights(model), lr=lr, momentum=alpha, weight_decay=decay)
    batches = workbench.batches(
        images, relabeled(labels, setting.noise, seed), setting.batch, torch.Generator().manual_seed(seed)
    )
    seen = watch(model, optimizer, batches, setting.steps)
    seen["energy"] = (seen["norm"] * seen["gradient"]) ** 2
    late = seen[seen["step"] > 0.7 * setting.steps].groupby("layer")["energy"].mean()
    rows = windowed(seen, setting.steps // 50, ["layer"]).rename(columns={"step": "at"})
    expected = rows["layer"].map(lambda layer: settled(lr, decay, alpha, late[layer]))
    return rows.assign(part=NETWORK, curve="layer " + rows["layer"].astype(str), expected=expected)


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the norm of walk and network, and its power law."""

    def farthest(part: str) -> list[float]:
        shown = frame[frame["part"] == part]
        late = shown[shown["at"] > 0.7 * shown["at"].max()]

        def ratio(rows: pd.DataFrame) -> float:
            means = (rows["norm"] / rows["expected"]).groupby(rows["curve"]).mean()
            return float(means.iloc[(means - 1).abs().argmax()])

        return by_seed(late, ratio)

    sweep = frame[frame["part"] == SWEEP]
    return (
        equal(
            "With random gradients the norm settles at (ηL / (λ(1-α)(2-λη/(1+α))))^(1/4), for each α.",
            "S129, equilibrium with momentum",
            "norm over expected, mean of the last 30% of the steps, the α farthest from 1",
            farthest(WALK),
            1.0,
            tolerance=0.01,
        ),
        equal(
            "The norm in equilibrium is proportional to (η/λ)^(1/4).",
            "vanlaarhoven2017, norm at a steady state",
            "slope of log ‖w‖ over log η/λ",
            by_seed(sweep, lambda rows: np.polyfit(np.log(rows["at"]), np.log(rows["norm"]), 1)[0]),
            0.25,
            tolerance=0.005,
        ),
        equal(
            "In a network every layer's norm settles at that value, with the layer's own L.",
            "S129, equilibrium with momentum",
            "norm over expected, mean of the last 30% of the steps, the layer farthest from 1",
            farthest(NETWORK),
            1.0,
            tolerance=0.05,
            reason="gradients of successive steps are not independent",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the walk, the power law, and the layers."""
    walked, power, trained = style.panels(canvas, columns=3)
    for ax, part in ((walked, WALK), (trained, NETWORK)):
        for index, (name, rows) in enumerate(frame[frame["part"] == part].groupby("curve", sort=False)):
            style.curve(ax, rows, "at", "norm", name=str(name), index=index)
            line = rows.groupby("at")["expected"].median()
            style.theory(ax, line.index, line, name="theory" if index == 0 else "")
    sweep = frame[frame["part"] == SWEEP]
    style.curve(power, sweep, "at", "norm", name="walk", index=0, points=True)
    line = sweep.groupby("at")["expected"].first()
    style.theory(power, line.index, line, name=r"$(\eta/2\lambda)^{1/4}$")
    power.set_xscale("log")
    style.logarithmic(power)
    walked.legend(loc=(0.4, 0.45))
    for ax in (power, trained):
        ax.legend()
    style.label(walked, "random walk", "step $t$", r"$\|w_t\|$")
    style.label(power, "random walk", r"$\eta/\lambda$", r"$\|w\|$ in equilibrium")
    style.label(trained, "network", "step $t$", r"$\|w_t\|$")
