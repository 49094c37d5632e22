"""SI-4: with weight decay, scale-invariant weights turn by a fixed angle a step."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_most, by_seed, equal
from analyses.scale.network import digits, invariant_mlp, relabeled, watch, weights, windowed
from analyses.scale.walk import momentum, turning, walk
from normscope import workbench

ID = "SI-4"
TITLE = "The angular update settles where weight decay balances the gradient"
SOURCES = ("S129",)
CAPTION = (
    "Angle between weights before and after a step, averaged over windows; dashed: √(2ηλ/(1+α)). (a) A walk with "
    "random gradients orthogonal to w (d = 400, η = 0.1, λ = 0.01). (b) The three layers of a perceptron "
    "(784-64-64-64-10, BatchNorm, batch 128, 30% of the labels random): SGD with momentum 0.9 (η = 0.05, λ = 0.01) and "
    "without (η = 0.1, λ = 0.01). (c) The walk with η divided by 10 half-way: the angle falls far below the new "
    "equilibrium and climbs for thousands of steps, unless w is rescaled by 10^(-1/4) at once."
)
COLUMNS = ("part", "curve", "step", "angle", "expected")

WALK, NETWORK, DROP = "walk", "network", "drop"
_PLAIN, _RESCALED = "η / 10", "η / 10 and w rescaled"


@dataclass(frozen=True)
class Setting:
    """What is run: steps of the walk, α; sizes and batch of the network; (α, η, λ, steps) of its runs."""

    walked: int = 12000
    features: int = 400
    alphas: tuple[float, ...] = (0.0, 0.5, 0.9)
    lr: float = 0.1
    decay: float = 0.01
    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    batch: int = 128
    noise: float = 0.3
    runs: tuple[tuple[float, float, float, int], ...] = ((0.9, 0.05, 0.01, 1500), (0.0, 0.1, 0.01, 3000))


def setting(fast: bool) -> Setting:
    """Return the setting."""
    if fast:
        return Setting(walked=4000, features=100, sizes=(784, 16, 16, 10), batch=64, runs=((0.9, 0.05, 0.02, 300),))
    return Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Walk, train, and walk with a drop of the learning rate."""
    return pd.concat([_walks(setting, seed), _drops(setting, seed), _networks(setting, seed)], ignore_index=True)


def _walks(setting: Setting, seed: int) -> pd.DataFrame:
    parts = []
    for alpha in setting.alphas:
        seen = walk(momentum(setting.lr, setting.decay, alpha), setting.features, setting.walked, seed)
        rows = windowed(seen, setting.walked // 60, [])
        expected = turning(setting.lr, setting.decay, alpha)
        parts.append(rows.assign(part=WALK, curve=f"α = {alpha:g}", expected=expected))
    return pd.concat(parts)[list(COLUMNS)]


def _drops(setting: Setting, seed: int) -> pd.DataFrame:
    """Divide the learning rate by 10 half-way; rescaling is the same as starting the second half at that norm."""
    half, parts = setting.walked // 2, []
    first = walk(momentum(setting.lr, setting.decay, 0.0), setting.features, half, seed)
    for name, factor in ((_PLAIN, 1.0), (_RESCALED, 10**-0.25)):
        low = momentum(setting.lr / 10, setting.decay, 0.0)
        norm = factor * float(first["norm"].iloc[-1])
        second = walk(low, setting.features, half, seed + 1000, norm=norm)
        second["step"] += half
        for seen, lr in ((first, setting.lr), (second, setting.lr / 10)):
            rows = windowed(seen, setting.walked // 60, [])
            parts.append(rows.assign(part=DROP, curve=name, expected=turning(lr, setting.decay, 0.0)))
    return pd.concat(parts)[list(COLUMNS)]


def _networks(setting: Setting, seed: int) -> pd.DataFrame:
    (images, labels), _ = digits(seed)
    labels = relabeled(labels, setting.noise, seed)
    parts = []
    for alpha, lr, decay, steps in setting.runs:
        torch.manual_seed(seed)
        model = invariant_mlp(setting.sizes)
        optimizer = torch.optim.SGD(weights(model), lr=lr, momentum=alpha, weight_decay=decay)
        batches = workbench.batches(images, labels, setting.batch, torch.Generator().manual_seed(seed))
        rows = windowed(watch(model, optimizer, batches, steps), steps // 50, ["layer"])
        curve = f"α = {alpha:g}, layer " + rows["layer"].astype(str)
        parts.append(rows.assign(part=NETWORK, curve=curve, expected=turning(lr, decay, alpha)))
    return pd.concat(parts)[list(COLUMNS)]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the angle in equilibrium, of the walk and of each layer, and what a drop of the rate does."""

    def ratios(part: str, pick: str, start: str = "") -> list[float]:
        shown = frame[(frame["part"] == part) & frame["curve"].str.startswith(start)]
        late = shown[shown["step"] > 0.7 * shown.groupby("curve")["step"].transform("max")]
        return by_seed(
            late, lambda rows: _extreme((rows["angle"] / rows["expected"]).groupby(rows["curve"]).mean(), pick)
        )

    def after(rows: pd.DataFrame, curve: str) -> float:
        second = rows[(rows["curve"] == curve) & (rows["step"] > rows["step"].max() / 2)]
        return float((second["angle"] / second["expected"]).iloc[0])

    dropped = frame[frame["part"] == DROP]
    networks = [
        equal(
            f"In a network the angle settles at √(2ηλ/(1+α)) in every layer, α = {start}.",
            "S129, equilibrium with momentum" if start != "0" else "S129, equilibrium of SGD",
            "angle over expected, mean of the last 30% of the steps, the layer farthest from 1",
            ratios(NETWORK, "farthest", f"α = {start},"),
            1.0,
            tolerance=0.05,
            reason="a layer whose gradients are small turns slowly until decay has shrunk its norm",
        )
        for start in sorted({curve[4:].split(",")[0] for curve in frame.loc[frame["part"] == NETWORK, "curve"]})
    ]
    return (
        equal(
            "With random gradients the angle settles at √(2ηλ/(1+α)), for each α.",
            "S129, equilibrium",
            "angle over expected, mean of the last 30% of the steps, the α farthest from 1",
            ratios(WALK, "farthest"),
            1.0,
            tolerance=0.01,
        ),
        *networks,
        at_most(
            "Dividing η by 10 makes the angle fall far below its new equilibrium.",
            "S129, change of the learning rate",
            "angle over expected, first window after the drop",
            by_seed(dropped, lambda rows: after(rows, _PLAIN)),
            0.5,
        ),
        equal(
            "Rescaling w by (η_new/η_old)^(1/4) restores the equilibrium at once.",
            "S129, change of the learning rate",
            "angle over expected, first window after the drop",
            by_seed(dropped, lambda rows: after(rows, _RESCALED)),
            1.0,
            tolerance=0.02,
        ),
    )


def _extreme(ratios: pd.Series, pick: str) -> float:
    return float(ratios.iloc[(ratios - 1).abs().argmax()]) if pick == "farthest" else float(ratios.mean())


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the walk, the network, and the drop."""
    axes = style.panels(canvas, columns=3, height=3.1)
    for ax, part in zip(axes, (WALK, NETWORK, DROP), strict=True):
        shown = frame[frame["part"] == part]
        for index, (name, rows) in enumerate(shown.groupby("curve", sort=False)):
            alpha, comma, layer = str(name).partition(", ")
            # layers keep their color for each α, which is written beside the curves
            number = int(layer[-1]) - 1 if comma else index
            style.curve(
                ax, rows, "step", "angle", name="" if comma and number < index else layer or alpha, index=number
            )
            line = rows.groupby("step")["expected"].first()
            style.theory(ax, line.index, line, name=r"$\sqrt{2\eta\lambda/(1+\alpha)}$" if index == 0 else "")
            if comma and number == 0:
                ax.text(line.index[-1], line.iloc[-1] * 1.08, alpha, ha="right")
        style.logarithmic(ax)
        ax.legend(loc="lower right" if part == NETWORK else "upper right")
    axes[2].set_ylim(top=0.3)
    for ax, title in zip(axes, ("random walk", "network", "learning rate divided by 10"), strict=True):
        style.label(ax, title, "step $t$", r"angular update $\Delta_t$ (rad)")
