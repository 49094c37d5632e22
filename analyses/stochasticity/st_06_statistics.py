"""ST-6: how far the statistics of a batch scatter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from analyses import style
from analyses.claim import Claim, at_most, by_seed, equal
from analyses.stochasticity.layers import digit_features, gaussian

ID = "ST-6"
TITLE = "How far the statistics of a batch scatter"
SOURCES = ("S147", "S148")
CAPTION = (
    "Mean and standard deviation of a batch as random variables, median over 64 features. (a) The mean scatters "
    "as $\\sigma/\\sqrt{B}$ whatever the distribution. (b) The standard deviation scatters as $1/\\sqrt{2B}$ of "
    "itself for Gaussian features, in general as $\\sqrt{(k-1)/4B}$ with k the kurtosis: after a ReLU, where k is "
    "about 5 here, 1.5 times as far."
)
COLUMNS = ("features", "batch", "mean_scatter", "deviation_scatter", "mean_predicted", "deviation_predicted")

GAUSSIAN, DIGITS, RECTIFIED = "Gaussian", "projected digits", "after ReLU"
_SHOWN = (GAUSSIAN, DIGITS, RECTIFIED)


@dataclass(frozen=True)
class Setting:
    """What is measured: features, batch sizes, batches of each size."""

    features: int = 64
    batches: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    draws: int = 600


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(batches=(8, 64, 512), draws=200) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Draw batches with replacement and take the spread of their statistics, relative to the feature's deviation."""
    digits = digit_features(setting.features, seed)
    populations = {
        GAUSSIAN: gaussian(len(digits), setting.features, seed).double(),
        DIGITS: digits,
        RECTIFIED: torch.relu((digits - digits.mean(0)) / digits.std(0)),
    }
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for name, population in populations.items():
        kurtosis = _kurtosis(population)
        for batch in setting.batches:
            index = torch.randint(len(population), (setting.draws, batch), generator=generator)
            drawn = torch.stack([population[row] for row in index])
            mean, deviation = drawn.mean(1), drawn.std(1, correction=0)
            of_mean = (mean.std(0) / population.std(0)).median()
            of_deviation = (deviation.std(0) / deviation.mean(0)).median()
            theory = float(((kurtosis - 1) / (4 * batch)).sqrt().median())
            rows.append((name, batch, float(of_mean), float(of_deviation), batch**-0.5, theory))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _kurtosis(x: Tensor) -> Tensor:
    centered = x - x.mean(0)
    return centered.pow(4).mean(0) / centered.square().mean(0).square()


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge both laws."""

    def slope(name: str, column: str) -> list[float]:
        part = frame[frame["features"] == name]
        return by_seed(part, lambda own: np.polyfit(np.log(own["batch"]), np.log(own[column]), 1)[0])

    def deviation(column: str, predicted: str, part: pd.DataFrame) -> float:
        return float((part[column] / part[predicted] - 1).abs().max())

    large = frame[frame["batch"] >= 32]
    normal = large[large["features"] == GAUSSIAN].assign(gaussian=lambda part: (2 * part["batch"]) ** -0.5)
    return (
        at_most(
            "The mean of a batch scatters as σ/√B, for any distribution.",
            "S148, section 3",
            "largest |std(μ_B) √B / σ - 1|",
            by_seed(frame, lambda part: deviation("mean_scatter", "mean_predicted", part)),
            0.1,
        ),
        at_most(
            "For Gaussian features the standard deviation of a batch scatters by 1/√(2B) of itself.",
            "S148, section 3",
            "largest |CV(σ_B) √(2B) - 1|, B ≥ 32",
            by_seed(normal, lambda part: deviation("deviation_scatter", "gaussian", part)),
            0.1,
        ),
        at_most(
            "For others by √((k - 1)/4B), k the kurtosis.",
            "S148, section 3",
            "largest |CV(σ_B) / predicted - 1|, B ≥ 32",
            by_seed(large, lambda part: deviation("deviation_scatter", "deviation_predicted", part)),
            0.15,
        ),
        equal(
            "The noise of BatchNorm falls with the root of the batch size.",
            "S147, section 3",
            "slope of log CV(σ_B) over log B, after ReLU",
            slope(RECTIFIED, "deviation_scatter"),
            -0.5,
            tolerance=0.05,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the scatter of both statistics."""
    mean, deviation = style.panels(canvas, columns=2)
    for ax, kind in ((mean, "mean"), (deviation, "deviation")):
        for index, name in enumerate(_SHOWN):
            part = frame[frame["features"] == name]
            style.curve(ax, part, "batch", f"{kind}_scatter", name=name, index=index, points=True)
            line = part.groupby("batch")[f"{kind}_predicted"].median()
            style.theory(ax, line.index, line, name="theory" if index == 0 else "")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xticks([8, 16, 32, 64, 128, 256, 512], ["8", "16", "32", "64", "128", "256", "512"])
        ax.set_yticks([2.0**-k for k in range(1, 6)], ["1/2", "1/4", "1/8", "1/16", "1/32"])
        ax.legend()
    style.label(mean, "mean", "batch size $B$", "std($\\mu_B$) / $\\sigma$")
    style.label(deviation, "standard deviation", "batch size $B$", "std($\\sigma_B$) / mean($\\sigma_B$)")
