"""CO-19: how a small noise on the input grows through depth, relative to the signal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from analyses import style
from analyses.claim import Claim, at_most, by_seed, equal

ID = "CO-19"
TITLE = "Sensitivity to noise through depth: vanilla, with batch normalization, and residual"
SOURCES = ("S141",)
CAPTION = (
    "Random ReLU networks of width 256, batches of 64; a small noise dx is carried along with the signal x. χ is the "
    "noise-to-signal ratio over that of the input. (a) Growth of χ per layer: it goes to 1 without normalization, "
    "where (c) the signal becomes one-dimensional; with batch normalization it stays near √(π/(π-1)) = 1.211. (b) So χ "
    "grows exponentially; residual connections with normalization (branches of two layers) make it a power of the "
    "depth."
)
COLUMNS = ("network", "layer", "growth", "chi", "dimension", "branch")

VANILLA, FORWARD, RESIDUAL = "vanilla", "BN", "BN, residual"
LIMIT = math.sqrt(math.pi / (math.pi - 1))
_EPS = 1e-10


@dataclass(frozen=True)
class Setting:
    """Width, batch, depth of the residual network in branches, of the others in layers, layers of a branch."""

    width: int = 256
    batch: int = 64
    depth: int = 100
    residual: int = 200
    branch: int = 2
    runs: int = 3


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(depth=50, residual=60, runs=1) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Carry signal and noise through each network; means over `runs` draws."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(setting.runs):
        for network in (VANILLA, FORWARD, RESIDUAL):
            signal, noise = torch.randn(2, setting.batch, setting.width, generator=generator, dtype=torch.float64)
            walk = _walk(network, signal, noise, setting, generator)
            rows += [(network, index, layer, *values) for layer, values in enumerate(walk, start=1)]
    frame = pd.DataFrame(rows, columns=["network", "draw", "layer", "growth", "log_chi", "dimension", "branch"])
    means = frame.groupby(["network", "layer"], sort=False).mean().reset_index()
    return means.assign(chi=np.exp(means["log_chi"]))[list(COLUMNS)]


def _walk(
    network: str, x: Tensor, dx: Tensor, setting: Setting, generator: torch.Generator
) -> Iterator[tuple[float, float, float, float]]:
    """Yield growth of χ, log χ, dimension of the signal and, of a branch, the growth per layer inside it."""
    last = start = _log_ratio(x, dx)
    for _ in range(setting.residual if network == RESIDUAL else setting.depth):
        inside = math.nan
        if network == RESIDUAL:
            y, dy = x, dx
            for _ in range(setting.branch):
                y, dy = _linear(*_rectify(*_normalize(y, dy)), generator)
            inside = math.exp((_log_ratio(y, dy) - last) / setting.branch)
            x, dx = x + y, dx + dy
        else:
            x, dx = _linear(x, dx, generator)
            if network == FORWARD:
                x, dx = _normalize(x, dx)
            x, dx = _rectify(x, dx)
        now = _log_ratio(x, dx)
        yield math.exp(now - last), now - start, _dimension(x), inside
        last = now


def _linear(x: Tensor, dx: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    width = x.shape[1]
    weight = torch.randn(width, width, generator=generator, dtype=x.dtype) * (2 / width) ** 0.5
    return x @ weight.T, dx @ weight.T


def _normalize(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Standardize; the noise is small and of one sample, so it leaves the statistics as they are."""
    deviation = (x.var(0, correction=0) + _EPS).sqrt()
    return (x - x.mean(0)) / deviation, dx / deviation


def _rectify(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    return x.relu(), dx * (x > 0)


def _log_ratio(x: Tensor, dx: Tensor) -> float:
    """Return log of the root of centered second moments, noise over signal."""
    noise, signal = (value.var(0, correction=0).mean() for value in (dx, x))
    return float((noise / signal).log() / 2)


def _dimension(x: Tensor) -> float:
    """Return tr C/λmax(C), C the covariance of features."""
    values = torch.linalg.svdvals(x - x.mean(0)).square()
    return float(values.sum() / values.max())


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the three regimes."""
    vanilla, forward, residual = (frame[frame["network"] == name] for name in (VANILLA, FORWARD, RESIDUAL))
    deep = frame["layer"].max() // 5

    def late(part: pd.DataFrame) -> list[float]:
        return by_seed(part[part["layer"] > part["layer"].max() // 2], lambda seeds: seeds["growth"].mean())

    fitted, predicted = by_seed(residual[residual["layer"] >= deep], _power), by_seed(residual, _predicted)
    return (
        equal(
            "Without normalization the growth of sensitivity goes to 1.",
            "S141, vanilla networks",
            "mean growth of χ a layer, deeper half",
            late(vanilla),
            1.0,
            tolerance=0.03,
        ),
        at_most(
            "Without normalization the signal becomes one-dimensional.",
            "S141, vanilla networks",
            "tr C/λmax(C) of the last layer",
            by_seed(vanilla, lambda part: part["dimension"].iloc[-1]),
            1.5,
        ),
        equal(
            "With batch normalization the growth stays at that of mean-field theory: an exponential.",
            "S141, batch-normalized feedforward networks",
            "mean growth of χ a layer, deeper half; √(π/(π-1))",
            late(forward),
            LIMIT,
            tolerance=0.03 * LIMIT,
        ),
        equal(
            "Residual connections make it a power law, of the exponent that the growth inside branches gives.",
            "S141, batch-normalized residual networks",
            "fitted exponent less (mean growth⁴ - 1)/2, branches of two layers",
            [a - b for a, b in zip(fitted, predicted, strict=True)],
            0.0,
            tolerance=0.1,
            reason="The prediction takes the growth inside all branches to be equal.",
        ),
    )


def _power(part: pd.DataFrame) -> float:
    return float(np.polyfit(np.log(part["layer"]), np.log(part["chi"]), 1)[0])


def _predicted(part: pd.DataFrame) -> float:
    """Return τ = (mean growth^(2H) - 1)/2 with H = 2."""
    return float((part["branch"].mean() ** 4 - 1) / 2)


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw growth, χ and the dimension of the signal by layer."""
    growth, chi, dimension = style.panels(canvas, columns=3)
    for index, network in enumerate((VANILLA, FORWARD, RESIDUAL)):
        part = frame[frame["network"] == network]
        for ax, column in ((growth, "growth"), (chi, "chi"), (dimension, "dimension")):
            style.curve(ax, part, "layer", column, name=network, index=index)
    layers = np.unique(frame.loc[frame["network"] == FORWARD, "layer"])
    style.theory(growth, layers, np.full(len(layers), LIMIT), name=r"$\sqrt{\pi/(\pi-1)}$")
    growth.set_xscale("log")
    chi.set(xscale="log", yscale="log")
    dimension.set_xscale("log")
    for ax in (growth, chi, dimension):
        ax.legend()
    style.label(growth, "growth", "layer or branch", r"$\delta\chi$, growth of $\chi$ a layer")
    style.label(chi, "noise-to-signal ratio", "layer or branch", r"$\chi$")
    style.label(dimension, "dimension of the signal", "layer or branch", r"${\rm tr}\,C\,/\,\lambda_{\max}(C)$")
