"""CO-21: least squares in length and direction, at the rate that theory promises."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.conditioning.least_squares import LeastSquares, draw_problem

ID = "CO-21"
TITLE = "Length and direction decoupled: a linear rate on a problem that is not convex"
SOURCES = ("S142",)
CAPTION = (
    "Least squares with d = 50, eigenvalues of S log-spaced from 0.01 to 1. GDNP descends on the direction alone, that "
    "is on ρ(w) = -(uᵀw)²/(wᵀSw), which is not convex, with the step ‖w‖²_S/(2L|ρ(w)|); GD has the constant step 1/L. "
    "(a) Gap to the minimum over the gap at the start, and the bound (1 - μ/L)²ᵗ that the paper proves for GDNP. "
    "(b) The optimal length g follows in closed form; its relative distance to the end value."
)
COLUMNS = ("method", "step", "gap", "bound", "length")

GD, GDNP = "GD", "GDNP"


@dataclass(frozen=True)
class Setting:
    """The problem, the steps, and of how many of them a row is kept."""

    features: int = 50
    condition: float = 100.0
    steps: int = 600
    every: int = 10


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Descend by both methods from one start."""
    problem = draw_problem(setting.features, setting.condition, seed)
    parts = [_gd(problem, setting.steps), _gdnp(problem, setting.steps)]
    frame = pd.concat(parts, ignore_index=True)
    frame["bound"] = (1 - 1 / setting.condition) ** (2 * frame["step"])
    return frame.loc[frame["step"] % setting.every == 0, list(COLUMNS)]


def _gd(problem: LeastSquares, steps: int) -> pd.DataFrame:
    """Descend on w with the step 1/L, L = 1; the length is ‖w‖_S."""
    w = problem.start
    gaps: list[float] = []
    lengths: list[float] = []
    for _ in range(steps + 1):
        away = w - problem.minimizer
        gaps.append(float(away @ problem.hessian @ away))
        lengths.append(float(np.sqrt(w @ problem.hessian @ w)))
        w = w - problem.hessian @ away
    return _frame(GD, gaps, lengths, problem)


def _gdnp(problem: LeastSquares, steps: int) -> pd.DataFrame:
    """Descend on the direction; the best length for it, uᵀw/‖w‖_S, is taken at every step."""
    u, w = problem.correlation, problem.start
    gaps: list[float] = []
    lengths: list[float] = []
    for _ in range(steps + 1):
        sw = problem.hessian @ w
        squared = w @ sw
        length = u @ w / np.sqrt(squared)
        gaps.append(float(problem.energy - length**2))  # ρ(w) - ρ(w*)
        lengths.append(float(abs(length)))
        slope = -2 * (u @ w) * (u - (u @ w / squared) * sw) / squared
        w = w - squared / (2 * length**2) * slope
    return _frame(GDNP, gaps, lengths, problem)


def _frame(method: str, gaps: list[float], lengths: list[float], problem: LeastSquares) -> pd.DataFrame:
    """Make a frame of gaps over the first one, and of relative distances of the length."""
    best = np.sqrt(problem.energy)
    found = np.array(gaps) / gaps[0]
    distance = np.abs(np.array(lengths) / best - 1)
    return pd.DataFrame({"method": method, "step": range(len(gaps)), "gap": found, "length": distance})


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the bound, and that the rate is linear."""
    gdnp = frame[frame["method"] == GDNP]
    gd = frame[frame["method"] == GD]

    def rate(part: pd.DataFrame) -> float:
        late = part[part["gap"] > 1e-12].iloc[5:]
        return float(-np.polyfit(late["step"], np.log(late["gap"]), 1)[0])

    promised = float(-np.log(gdnp.loc[gdnp["step"] == 10, "bound"].iloc[0]) / 10)
    return (
        at_most(
            "GDNP stays below the bound (1 - μ/L)²ᵗ at every step.",
            "S142, least squares by GDNP",
            "largest gap over bound",
            by_seed(gdnp[gdnp["step"] > 0], lambda part: (part["gap"] / part["bound"]).max()),
            1.0,
        ),
        at_least(
            "The rate is linear, no slower than the bound's.",
            "S142, least squares by GDNP",
            "slope of -log gap over steps, over the bound's",
            by_seed(gdnp, lambda part: rate(part) / promised),
            1.0,
        ),
        at_least(
            "So a problem that is not convex is solved as fast as the convex one by gradient descent with step 1/L.",
            "S142, least squares by GDNP",
            "slope of -log gap over steps, GDNP over GD",
            [a / b for a, b in zip(by_seed(gdnp, rate), by_seed(gd, rate), strict=True)],
            1.0 - 0.05,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw gaps with the bound, and lengths."""
    gaps, lengths = style.panels(canvas, columns=2)
    for index, method in enumerate((GD, GDNP)):
        part = frame[frame["method"] == method]
        style.curve(gaps, part.assign(gap=part["gap"].clip(lower=1e-14)), "step", "gap", name=method, index=index)
        shown = part.assign(length=part["length"].clip(lower=1e-14))
        style.curve(lengths, shown, "step", "length", name=method, index=index)
    bound = frame[frame["method"] == GDNP].groupby("step")["bound"].first()
    style.theory(gaps, bound.index, bound, name=r"$(1 - \mu/L)^{2t}$, proved for GDNP")
    for ax in (gaps, lengths):
        ax.set(yscale="log", ylim=(1e-12, 3))
        ax.legend(loc="lower left")
    style.label(gaps, "gap", "step $t$", "gap to the minimum over gap at start")
    style.label(lengths, "length", "step $t$", r"$|\,\|w\|_S\,/\,\|w^*\|_S - 1|$")
