"""CO-22: weight normalization finds the solution of smallest norm, from many starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.conditioning.least_squares import Array

ID = "CO-22"
TITLE = "Weight normalization finds the solution of smallest norm"
SOURCES = ("S144",)
CAPTION = (
    "Least squares with 10 equations in 40 unknowns (orthonormal rows), from starts of length ‖w₀‖. (a) Gradient "
    "descent (GD) keeps the part of w₀ that the data do not see, and ends as far from the solution w_min of smallest "
    "norm as that part is long. With w = g v/‖v‖ and a small rate for g the part fades while v learns, so w_min is "
    "found as long as ‖w₀‖ < ‖w_min‖; (b) a rate for g that is not small, or a longer start, breaks it. 40 000 steps."
)
COLUMNS = ("method", "start", "distance", "expected", "residual")

GD, SLOW, QUICK = "GD", "WN, small rate for g", "WN, equal rates"


@dataclass(frozen=True)
class Setting:
    """The problem, lengths of the start over ‖w_min‖, learning rates, steps."""

    equations: int = 10
    unknowns: int = 40
    starts: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 4.0)
    rate: float = 0.1
    slow: float = 1e-3
    steps: int = 40_000


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(starts=(0.01, 0.1, 1.0, 4.0), steps=5000) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Run all methods from all starts; `expected` is ‖P_null w₀‖/‖w_min‖, where descent on w must end."""
    generator = np.random.default_rng(seed)
    rows = np.linalg.qr(generator.standard_normal((setting.unknowns, setting.equations)))[0].T
    smallest = rows.T @ generator.standard_normal(setting.equations)
    smallest /= np.linalg.norm(smallest)
    target = rows @ smallest
    direction = generator.standard_normal(setting.unknowns)
    starts = np.array(setting.starts)[:, None] * (direction / np.linalg.norm(direction))
    unseen = np.linalg.norm(starts - starts @ rows.T @ rows, axis=1)
    ends = {
        GD: _descend(rows, target, starts, setting.rate, setting.steps),
        SLOW: _descend_normalized(rows, target, starts, (setting.rate, setting.slow), setting.steps),
        QUICK: _descend_normalized(rows, target, starts, (setting.rate, setting.rate), setting.steps),
    }
    parts = []
    for method, w in ends.items():
        columns = {
            "method": method,
            "start": setting.starts,
            "distance": np.linalg.norm(w - smallest, axis=1),
            "expected": unseen,
            "residual": np.linalg.norm(w @ rows.T - target, axis=1),
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _descend(rows: Array, target: Array, starts: Array, rate: float, steps: int) -> Array:
    w = starts.copy()
    for _ in range(min(steps, 2000)):  # converged long before
        w -= rate * (w @ rows.T - target) @ rows
    return w


def _descend_normalized(rows: Array, target: Array, starts: Array, rates: tuple[float, float], steps: int) -> Array:
    """Descend on v and g of w = g v/‖v‖, begun at w = v = w₀, each row a run."""
    v = starts.copy()
    g = np.linalg.norm(v, axis=1, keepdims=True)
    for _ in range(steps):
        length = np.sqrt((v * v).sum(1, keepdims=True))
        unit = v / length
        slope = (g * (unit @ rows.T) - target) @ rows
        along = (slope * unit).sum(1, keepdims=True)
        v -= rates[0] * g / length * (slope - along * unit)
        g -= rates[1] * along
    return np.asarray(g * v / np.sqrt((v * v).sum(1, keepdims=True)))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge where each method ends."""
    short = frame[frame["start"] < 1]
    slow, quick = short[short["method"] == SLOW], short[short["method"] == QUICK]
    gd = frame[frame["method"] == GD]
    longer = frame[(frame["method"] == SLOW) & (frame["start"] == frame["start"].max())]
    return (
        at_most(
            "Gradient descent ends as far from the solution of smallest norm as the unseen part of the start is long.",
            "S144, solution of minimum norm",
            "largest |distance - ‖P_null w₀‖|, ‖w_min‖ = 1",
            by_seed(gd, lambda part: (part["distance"] - part["expected"]).abs().max()),
            1e-9,
        ),
        at_most(
            "Weight normalization with a small rate for g ends near the solution of smallest norm for all starts "
            "shorter than it.",
            "S144, convergence of weight normalization",
            "largest distance over that of gradient descent, starts ‖w₀‖ < ‖w_min‖",
            by_seed(slow, lambda part: (part["distance"] / part["expected"]).max()),
            0.1,
        ),
        at_least(
            "The rate for g has to be small.",
            "S144, convergence of weight normalization",
            "median distance with equal rates over that with a small rate for g, starts ‖w₀‖ < ‖w_min‖",
            [
                b / a
                for a, b in zip(
                    by_seed(slow, lambda part: part["distance"].median()),
                    by_seed(quick, lambda part: part["distance"].median()),
                    strict=True,
                )
            ],
            10.0,
        ),
        at_least(
            "A start longer than the solution keeps weight normalization away from it.",
            "S144, convergence of weight normalization",
            "distance from the longest start, ‖w_min‖ = 1",
            by_seed(longer, lambda part: part["distance"].iloc[0]),
            0.1,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the distance by the length of the start, up to the solution's norm and beyond it."""
    axes = style.panels(canvas, columns=2)
    line = frame[frame["method"] == GD].groupby("start")["expected"].median()
    for ax, part in zip(axes, (frame[frame["start"] <= 1], frame[frame["start"] >= 0.4]), strict=True):
        for index, method in enumerate((GD, SLOW, QUICK)):
            shown = part[part["method"] == method].assign(distance=part["distance"].clip(lower=1e-4))
            style.curve(ax, shown, "start", "distance", name=method, index=index, points=True)
        inside = line[line.index.isin(part["start"].unique())]
        style.theory(ax, inside.index, inside, name=r"$\|P_{\rm null}\,w_0\|\,/\,\|w_{\min}\|$")
    axes[0].set(xscale="log", yscale="log", ylim=(5e-5, 200))
    axes[0].legend(fontsize=7, title="less than $10^{-4}$ is drawn there", title_fontsize=7, loc="upper left")
    style.limit(axes[1], 1, r"$\|w_0\| = \|w_{\min}\|$")
    axes[1].legend(fontsize=7)
    x, y = r"length of the start $\|w_0\|\,/\,\|w_{\min}\|$", r"$\|w - w_{\min}\|\,/\,\|w_{\min}\|$ at the end"
    style.label(axes[0], "starts up to the solution's norm", x, y)
    style.label(axes[1], "longer starts", x, y)
