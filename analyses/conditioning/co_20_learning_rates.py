"""CO-20: gradient descent with and without batch normalization on least squares, over learning rates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed, equal
from analyses.conditioning.least_squares import Array, LeastSquares, draw_problem

ID = "CO-20"
TITLE = "Batch normalization makes least squares converge at any learning rate"
SOURCES = ("S123",)
CAPTION = (
    "Least squares with d = 50 features, eigenvalues of H log-spaced from 0.01 to 1, solved by gradient descent (GD) "
    "on J(w) and, with batch normalization (BNGD), on J(a, w) = E(y - a w·x/σ)²/2, σ² = wᵀHw, rate 1 for a. (a) Loss "
    "after 500 steps over that of w = 0, by learning rate: GD diverges beyond 2/λmax = 2, BNGD at none, since (b) its "
    "weights grow until the effective rate ε/‖w‖² fits. Above 10¹⁰ the loss is not drawn."
)
COLUMNS = ("method", "rate", "loss", "norm", "condition")

GD, BNGD = "GD", "BNGD"
_SHOWN = 1e10


@dataclass(frozen=True)
class Setting:
    """The problem, the learning rates ε, the fine ones around the threshold, and the steps."""

    features: int = 50
    condition: float = 100.0
    rates: tuple[float, ...] = tuple(float(f"{rate:.3g}") for rate in np.geomspace(0.1, 1e4, 31))
    fine: tuple[float, ...] = tuple(round(1.5 + step / 100, 2) for step in range(101))
    steps: int = 500


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Run both methods at all learning rates at once; `condition` is what governs the rate of each: κ(H), κ(H*)."""
    problem = draw_problem(setting.features, setting.condition, seed)
    rates = np.array(sorted({*setting.rates, *setting.fine}))
    parts = []
    for method, found, condition in (
        (GD, _descend(problem, rates, setting.steps), _condition(problem.hessian, 0)),
        (BNGD, _descend_normalized(problem, rates, setting.steps), _condition(_reduced(problem), 1)),
    ):
        columns = {"method": method, "rate": rates, "loss": found[0], "norm": found[1], "condition": condition}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _descend(problem: LeastSquares, rates: Array, steps: int) -> tuple[Array, Array]:
    """Return relative loss and ‖w‖ after w ← w - ε H(w - w*), one row a rate."""
    w = np.tile(problem.start, (len(rates), 1))
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(steps):
            w = w - rates[:, None] * ((w - problem.minimizer) @ problem.hessian)
        away = w - problem.minimizer
        loss = np.einsum("ri,ij,rj->r", away, problem.hessian, away) / problem.energy
        return np.nan_to_num(loss, nan=np.inf), np.nan_to_num(np.linalg.norm(w, axis=1), nan=np.inf)


def _descend_normalized(problem: LeastSquares, rates: Array, steps: int) -> tuple[Array, Array]:
    """Return relative loss and ‖w‖ after descent on a and w at once."""
    w = np.tile(problem.start, (len(rates), 1))
    a = np.zeros(len(rates))
    g = problem.correlation
    for step in range(steps + 1):
        hw = w @ problem.hessian
        sigma = np.sqrt((w * hw).sum(1))
        along = w @ g / sigma
        if step < steps:
            w = w + (rates * a / sigma)[:, None] * (g - (along / sigma)[:, None] * hw)
            a = along  # the rate of a is 1
    loss = (problem.energy - 2 * a * along + a**2) / problem.energy
    return loss, np.linalg.norm(w, axis=1)


def _reduced(problem: LeastSquares) -> Array:
    """Return H* = H - Hw*w*ᵀH/(w*ᵀHw*), what BNGD sees near the minimum; one of its eigenvalues is 0."""
    g = problem.correlation
    return problem.hessian - np.outer(g, g) / problem.energy


def _condition(matrix: Array, zeros: int) -> float:
    values = np.linalg.eigvalsh(matrix)
    return float(values[-1] / values[zeros])


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge GD's threshold, BNGD's convergence at all rates, and the condition numbers."""
    gd, bn = frame[frame["method"] == GD], frame[frame["method"] == BNGD]
    fine = gd[gd["rate"].between(1.5, 2.5)]
    moderate = bn[bn["rate"].between(0.5, 100)]
    start = gd["rate"] >= 2.1
    return (
        equal(
            "Gradient descent diverges beyond the learning rate 2/λmax.",
            "S123, gradient descent on least squares",
            "smallest rate, in steps of 0.01, after which the loss exceeds that of w = 0",
            by_seed(fine[fine["loss"] > 1], lambda part: part["rate"].min()),
            2.0,
            tolerance=0.03,
        ),
        at_least(
            "Gradient descent diverges at all larger rates.",
            "S123, gradient descent on least squares",
            "smallest relative loss over the rates from 2.1",
            by_seed(gd[start], lambda part: min(part["loss"].min(), 1e300)),
            1.0,
        ),
        at_most(
            "With batch normalization descent converges for any learning rate.",
            "S123, convergence of BNGD",
            "largest relative loss over all rates from 0.5 to 100",
            by_seed(moderate, lambda part: part["loss"].max()),
            1e-4,
        ),
        at_most(
            "It does not diverge at a rate 5000 times the threshold of gradient descent.",
            "S123, convergence of BNGD",
            "relative loss at the rate 10000",
            by_seed(bn[bn["rate"] == 1e4], lambda part: part["loss"].iloc[0]),
            1.0,
        ),
        at_most(
            "Near the minimum the normalized problem is not worse conditioned.",
            "S123, convergence of BNGD",
            "κ(H*)/κ(H), H* on its non-zero spectrum",
            [
                after / before
                for after, before in zip(
                    by_seed(bn, lambda part: part["condition"].iloc[0]),
                    by_seed(gd, lambda part: part["condition"].iloc[0]),
                    strict=True,
                )
            ],
            1.0,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw loss and norm by learning rate."""
    loss, norm = style.panels(canvas, columns=2)
    for index, method in enumerate((GD, BNGD)):
        part = frame[frame["method"] == method]
        style.curve(loss, part[part["loss"] < _SHOWN], "rate", "loss", name=method, index=index)
        style.curve(norm, part[part["loss"] < _SHOWN], "rate", "norm", name=method, index=index)
    for ax in (loss, norm):
        style.limit(ax, 2, r"$2/\lambda_{\max}$")
        ax.set(xscale="log", yscale="log")
        ax.legend()
    loss.set_ylim(1e-14, _SHOWN)
    style.label(loss, "loss after 500 steps", "learning rate $\\varepsilon$", "loss over loss of $w = 0$")
    style.label(norm, "weights after 500 steps", "learning rate $\\varepsilon$", r"$\|w\|$")
