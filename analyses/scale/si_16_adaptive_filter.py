"""SI-16: BatchNorm seen as what adaptive filters call normalized inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed, equal
from analyses.scale.network import digits
from normscope import norms

ID = "SI-16"
TITLE = "Natural modes of a convolution's weights, with and without BatchNorm at its input"
SOURCES = ("S124",)
CAPTION = (
    "Inputs of a 1 × 1 convolution: the 16 channels after three random 3 × 3 convolutions (He) and ReLUs on 200 "
    "digits, as they are or after BatchNorm; least squares to a random target by gradient descent. (a) Eigenvalues of "
    "their autocorrelation: BatchNorm suppresses the largest and amplifies the smallest. (b) Each mode decays "
    "as (1 - ηλ_i)^t, dashed (no norm, η = 1/λ_max). (c) Error after 200 steps over the first: both are stable "
    "up to 2/λ_max, dotted, and just below it BatchNorm leaves orders of magnitude less."
)
COLUMNS = ("part", "inputs", "at", "curve", "value", "expected")

SPECTRUM, MODES, RATES = "spectrum", "modes", "rates"
PLAIN, NORMALIZED = "no norm", "BatchNorm"


@dataclass(frozen=True)
class Setting:
    """What is computed: examples, channels, steps, learning rates."""

    examples: int = 200
    channels: int = 16
    steps: int = 200
    rates: tuple[float, ...] = tuple(float(rate) for rate in np.geomspace(1e-3, 3.0, 30))


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(examples=50) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Take the autocorrelation of both inputs, the decay of modes, and the error after training at each rate."""
    (images, _), _ = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        plain = _features(images[: setting.examples], setting.channels)
        normalized = norms.build("batch", setting.channels, affine=False).double()(plain)
    target = torch.randn(setting.channels, generator=generator, dtype=torch.float64)
    rows: list[tuple[str, str, float, str, float, float]] = []
    for name, inputs in ((PLAIN, plain), (NORMALIZED, normalized)):
        x = inputs.movedim(1, -1).reshape(-1, setting.channels)
        autocorrelation = x.T @ x / len(x)
        values, vectors = torch.linalg.eigh(autocorrelation)
        rows += [(SPECTRUM, name, float(i), name, float(v), np.nan) for i, v in enumerate(values.flip(0), start=1)]
        if name == PLAIN:
            rows += _modes(autocorrelation, values, vectors.T @ target, setting.steps)
        for rate in setting.rates:
            path = _descend(autocorrelation, target, rate, setting.steps)
            ratio = float((path[-1] @ autocorrelation @ path[-1]) / (target @ autocorrelation @ target))
            limit = 2 / float(values[-1])
            rows.append((RATES, name, rate, name, ratio, limit))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _features(images: Tensor, channels: int) -> Tensor:
    """Take images through three random convolutions and ReLUs."""
    for inputs in (1, channels, channels):
        convolution = nn.Conv2d(inputs, channels, 3, bias=False).double()
        nn.init.kaiming_normal_(convolution.weight)
        images = convolution(images).relu()
    return images


def _descend(autocorrelation: Tensor, error: Tensor, rate: float, steps: int) -> list[Tensor]:
    """Return the error of the weights before each step and after the last: e <- e - η R e."""
    path = [error]
    for _ in range(steps):
        path.append(path[-1] - rate * autocorrelation @ path[-1])
    return path


def _modes(
    autocorrelation: Tensor, values: Tensor, start: Tensor, steps: int
) -> list[tuple[str, str, float, str, float, float]]:
    """Return the size of three modes at each step, and what theory gives."""
    rate = 1 / float(values[-1])
    _, vectors = torch.linalg.eigh(autocorrelation)
    path = torch.stack(_descend(autocorrelation, vectors @ start, rate, steps)) @ vectors
    rows = []
    for rank in (2, len(values) // 2, len(values) - 1):
        mode = len(values) - rank
        for step in range(0, steps + 1, 10):
            size = float((path[step, mode] / start[mode]).abs())
            expected = float((1 - rate * values[mode]) ** step)
            rows.append((MODES, PLAIN, float(step), f"mode {rank}", size, expected))
    return rows


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge spectra, modes, and both effects of the rate."""
    spectrum, modes, rates = (frame[frame["part"] == part] for part in (SPECTRUM, MODES, RATES))
    seen = modes[modes["expected"] > 1e-6]

    def eigenvalue(rows: pd.DataFrame, largest: bool) -> float:
        found = rows.groupby("inputs")["value"].max() if largest else rows.groupby("inputs")["value"].min()
        return float(found[NORMALIZED] / found[PLAIN])

    def limit(rows: pd.DataFrame) -> float:
        diverging = rows[~(rows["value"] <= 1)].groupby("inputs").agg({"at": "min", "expected": "min"})
        return float((diverging["at"] / diverging["expected"]).max())

    def best(rows: pd.DataFrame) -> float:
        least = rows.groupby("inputs")["value"].min()
        return float(least[PLAIN] / least[NORMALIZED])

    def slow(rows: pd.DataFrame) -> float:
        least = rows[rows["at"] == rows["at"].min()].set_index("inputs")["value"]
        return float(least[PLAIN] / least[NORMALIZED])

    return (
        at_most(
            "Each natural mode of the weights decays as (1 - ηλ_i)^t.",
            "S124, natural modes",
            "max over modes and steps of |size / (1 - ηλ_i)^t - 1|, sizes above 10⁻⁶",
            by_seed(seen, lambda rows: (rows["value"] / rows["expected"] - 1).abs().max()),
            1e-6,
        ),
        at_most(
            "BatchNorm suppresses the largest eigenvalue of the inputs' autocorrelation.",
            "S124, effects of BatchNorm",
            "largest eigenvalue with BatchNorm over that without",
            by_seed(spectrum, lambda rows: eigenvalue(rows, largest=True)),
            1.0,
        ),
        at_least(
            "BatchNorm amplifies the smallest eigenvalue of the inputs' autocorrelation.",
            "S124, effects of BatchNorm",
            "smallest eigenvalue with BatchNorm over that without",
            by_seed(spectrum, lambda rows: eigenvalue(rows, largest=False)),
            1.0,
        ),
        equal(
            "Descent is stable up to η = 2/λ_max, with and without BatchNorm.",
            "S124, natural modes",
            "smallest rate that diverges over 2/λ_max, the larger of the two",
            by_seed(rates, limit),
            # rates are a factor 1.32 apart
            1.16,
            tolerance=0.17,
        ),
        at_least(
            "At low learning rates BatchNorm converges faster.",
            "S124, effects of BatchNorm",
            "error left without BatchNorm over that with it, smallest rate",
            by_seed(rates, slow),
            1.0,
            reason="at low rates most of the error falls along the largest mode, which BatchNorm makes slower",
        ),
        at_least(
            "At its best learning rate descent converges faster with BatchNorm.",
            "S124, effects of BatchNorm",
            "least error over rates without BatchNorm over that with it",
            by_seed(rates, best),
            1.0,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw spectra, modes and rates."""
    spectrum, modes, rates = style.panels(canvas, columns=3)
    for index, name in enumerate((PLAIN, NORMALIZED)):
        own = frame[frame["inputs"] == name]
        style.curve(spectrum, own[own["part"] == SPECTRUM], "at", "value", name=name, index=index, points=True)
        shown = own[own["part"] == RATES]
        capped = shown.assign(value=shown["value"].fillna(np.inf).clip(1e-12, 1e4))
        style.curve(rates, capped, "at", "value", name=name, index=index)
        rates.axvline(shown["expected"].median(), color=style.color(index), linestyle=":", linewidth=0.9)
    for index, (mode, rows) in enumerate(frame[frame["part"] == MODES].groupby("curve", sort=False)):
        style.curve(modes, rows, "at", "value", name=str(mode), index=index)
        line = rows.groupby("at")["expected"].median()
        style.theory(modes, line.index, line, name=r"$(1-\eta\lambda_i)^t$" if index == 0 else "")
    spectrum.set_yscale("log")
    modes.set(yscale="log", ylim=(1e-3, 2))
    rates.set(xscale="log", yscale="log")
    for ax in (spectrum, modes, rates):
        ax.legend()
    style.label(spectrum, "autocorrelation of the inputs", "rank $i$", r"eigenvalue $\lambda_i$")
    style.label(modes, "decay of modes, no norm", "step $t$", "size over the first")
    style.label(rates, "error after training", r"learning rate $\eta$", "error over the first")
