"""SI-6: AdamW has an equilibrium of its own; Adam with an L2 term has one for each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, by_seed, equal
from analyses.scale.network import digits, invariant_mlp, relabeled, watch, weights, windowed
from analyses.scale.walk import adamw, walk
from normscope import workbench

ID = "SI-6"
TITLE = "The equilibrium of AdamW, and Adam with an L2 term"
SOURCES = ("kosson2023",)
CAPTION = (
    "Angle between weights before and after a step; dashed: √(2ηλ(1-β₁)/(1+β₁)). (a) AdamW on a random walk (d = 400, "
    "ηλ = 10⁻³). (b) AdamW on a perceptron (784-64-64-64-10, BatchNorm, batch 128, η = 0.003, λ = 0.5, 30% of the "
    "labels random): near the theory in the upper layers, below it in the first. (c) Adam with an L2 term (η = 0.003, "
    "λ = 10⁻⁴), where no common angle is expected."
)
COLUMNS = ("part", "curve", "step", "angle", "norm", "expected", "expected_norm")

WALK, DECOUPLED, PENALTY = "walk", "AdamW", "Adam + L2"
_BETA = 0.9


@dataclass(frozen=True)
class Setting:
    """What is run: steps and (η, λ) of the walks; sizes, batch, (η, λ) for AdamW and Adam, and steps of the network."""

    walked: int = 8000
    features: int = 400
    walks: tuple[tuple[float, float], ...] = ((0.01, 0.1), (0.001, 1.0))
    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    batch: int = 128
    noise: float = 0.3
    decoupled: tuple[float, float] = (3e-3, 0.5)
    penalty: tuple[float, float] = (3e-3, 1e-4)
    steps: int = 1500


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(walked=3000, features=100, sizes=(784, 16, 16, 10), batch=64, steps=250) if fast else Setting()


def turning(lr: float, decay: float) -> float:
    """Return the angle in equilibrium, radians."""
    return math.sqrt(2 * lr * decay * (1 - _BETA) / (1 + _BETA))


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Walk by AdamW, and train by AdamW and by Adam with an L2 term."""
    parts = []
    for lr, decay in setting.walks:
        norm = math.sqrt(lr * setting.features / (2 * decay))
        seen = walk(adamw(lr, decay), setting.features, setting.walked, seed, norm=2 * norm)
        seen = windowed(seen, setting.walked // 60, [])
        curve = f"η = {lr:g}, λ = {decay:g}"
        parts.append(seen.assign(part=WALK, curve=curve, expected=turning(lr, decay), expected_norm=norm))
    parts.append(_network(setting, seed, DECOUPLED, torch.optim.AdamW, setting.decoupled))
    parts.append(_network(setting, seed, PENALTY, torch.optim.Adam, setting.penalty))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _network(
    setting: Setting, seed: int, part: str, make: type[torch.optim.Adam], rates: tuple[float, float]
) -> pd.DataFrame:
    (images, labels), _ = digits(seed)
    torch.manual_seed(seed)
    model = invariant_mlp(setting.sizes)
    optimizer = make(weights(model), lr=rates[0], weight_decay=rates[1])
    sizes = [weight.numel() for weight in weights(model)]
    batches = workbench.batches(
        images, relabeled(labels, setting.noise, seed), setting.batch, torch.Generator().manual_seed(seed)
    )
    rows = windowed(watch(model, optimizer, batches, setting.steps), setting.steps // 50, ["layer"])
    norms = rows["layer"].map(lambda layer: math.sqrt(rates[0] * sizes[layer - 1] / (2 * rates[1])))
    known = part == DECOUPLED
    return rows.assign(
        part=part,
        curve="layer " + rows["layer"].astype(str),
        expected=turning(*rates) if known else math.nan,
        expected_norm=norms if known else math.nan,
    )


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge AdamW's equilibrium, and how unlike the layers are without decoupling."""

    def late(part: str) -> pd.DataFrame:
        return frame[(frame["part"] == part) & (frame["step"] > 0.7 * frame.groupby("part")["step"].transform("max"))]

    def farthest(rows: pd.DataFrame, what: str, expected: str) -> float:
        means = (rows[what] / rows[expected]).groupby(rows["curve"]).mean()
        return float(means.iloc[(means - 1).abs().argmax()])

    def unlike(rows: pd.DataFrame) -> float:
        means = rows.groupby("curve")["angle"].mean()
        return float(means.max() / means.min())

    spread = [a / b for a, b in zip(by_seed(late(PENALTY), unlike), by_seed(late(DECOUPLED), unlike), strict=True)]
    correlated = (
        "gradients of successive steps are correlated, and weights of pixels that are rarely lit take rare steps"
    )
    return (
        equal(
            "AdamW turns weights by √(2ηλ(1-β₁)/(1+β₁)) a step under random gradients.",
            "kosson2023, equilibrium of AdamW",
            "angle over expected, mean of the last 30% of the steps, the setting farthest from 1",
            by_seed(late(WALK), lambda rows: farthest(rows, "angle", "expected")),
            1.0,
            tolerance=0.02,
        ),
        equal(
            "AdamW's norm settles at √(ηC/(2λ)) under random gradients.",
            "kosson2023, equilibrium of AdamW",
            "norm over expected, mean of the last 30% of the steps, the setting farthest from 1",
            by_seed(late(WALK), lambda rows: farthest(rows, "norm", "expected_norm")),
            1.0,
            tolerance=0.03,
        ),
        equal(
            "In a network every layer turns by that angle.",
            "kosson2023, experiments",
            "angle over expected, mean of the last 30% of the steps, the layer farthest from 1",
            by_seed(late(DECOUPLED), lambda rows: farthest(rows, "angle", "expected")),
            1.0,
            tolerance=0.05,
            reason=correlated,
        ),
        at_least(
            "Layers turn more unlike each other with an L2 term than with decoupled decay.",
            "kosson2023, L2 term",
            "largest over smallest angle of the layers, Adam + L2 over AdamW",
            spread,
            1.5,
            reason="the layers of so small a network have gradients of similar size, and AdamW's are unlike already",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the angles of walk and networks."""
    axes = style.panels(canvas, columns=3)
    for ax, part in zip(axes, (WALK, DECOUPLED, PENALTY), strict=True):
        for index, (name, rows) in enumerate(frame[frame["part"] == part].groupby("curve", sort=False)):
            style.curve(ax, rows, "step", "angle", name=str(name), index=index)
            line = rows.groupby("step")["expected"].first().dropna()
            if len(line):
                style.theory(ax, line.index, line, name="theory" if index == 0 else "")
        if part != WALK:
            style.logarithmic(ax)
        ax.legend()
    for ax, title in zip(axes, ("AdamW, random walk", "AdamW, network", "Adam + L2, network"), strict=True):
        style.label(ax, title, "step $t$", r"angular update $\Delta_t$ (rad)")
