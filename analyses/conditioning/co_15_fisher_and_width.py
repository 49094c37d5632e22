"""CO-15: largest eigenvalue of the Fisher matrix by width, under several normalizations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

import normscope as ns
from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed

ID = "CO-15"
TITLE = "Sharpness grows with width, unless the last layer is normalized"
SOURCES = ("S136",)
CAPTION = (
    "Random ReLU networks (3 hidden layers of width M, 10 outputs, weights of variance 2/M, biases of 0.1²) on T "
    "Gaussian inputs; largest eigenvalue of the Fisher matrix F = Σ ∇f∇fᵀ/T, mean over outputs included. (a) T = M/2, "
    "the regime of the theorem: λmax grows as M without normalization and with normalization of variance or of hidden "
    "layers alone, but not where the mean of the last layer is subtracted. (b) Slope of log λmax over log M."
)
COLUMNS = ("network", "width", "samples", "largest")


class Output(nn.Module):
    """Normalize outputs over the batch: subtract the mean, divide by the deviation, or both."""

    def __init__(self, *, mean: bool, variance: bool) -> None:
        """Hold which of the two."""
        super().__init__()
        self.mean, self.variance = mean, variance

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        away = x - x.mean(0)
        deviation = away.square().mean(0).sqrt() if self.variance else torch.ones(())
        return (away if self.mean else x) / deviation


def _batch(width: int) -> nn.Module:
    return nn.BatchNorm1d(width)


def _layer(width: int) -> nn.Module:
    return nn.LayerNorm(width)


# normalization of the last layer, of the hidden layers
NETWORKS: Final[dict[str, tuple[nn.Module | None, Callable[[int], nn.Module] | None]]] = {
    "none": (None, None),
    "LayerNorm, hidden": (None, _layer),
    "BatchNorm, hidden": (None, _batch),
    "last: variance": (Output(mean=False, variance=True), None),
    "last: mean": (Output(mean=True, variance=False), None),
    "last: BatchNorm": (Output(mean=True, variance=True), None),
}


@dataclass(frozen=True)
class Setting:
    """Widths M, samples T as a share of M, hidden layers, outputs, variance of weights, deviation of biases."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    share: float = 0.5
    hidden: int = 3
    outputs: int = 10
    variance: float = 2.0
    bias: float = 0.1


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(widths=(32, 64, 128)) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Take λmax of F, the Gauss-Newton matrix of half the squared error; a median over draws at small widths."""
    rows = []
    for width in setting.widths:
        samples = int(setting.share * width)
        for network in NETWORKS:
            found = []
            for index in range(max(setting.widths) // width):
                generator = torch.Generator().manual_seed(1000 * seed + 10 * index + width)
                batch = torch.randn(samples, width, generator=generator), torch.zeros(samples, setting.outputs)
                problem = ns.Problem(_network(setting, width, network, generator), _half_squared, [batch])
                found.append(ns.eigenpairs(problem, k=1, operator="ggn", tol=1e-2, progress=False).values[0])
            rows.append((network, width, samples, float(np.median(found))))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _half_squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / (2 * len(output))


def _network(setting: Setting, width: int, network: str, generator: torch.Generator) -> nn.Module:
    last, hidden = NETWORKS[network]
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for layer in range(setting.hidden + 1):
        final = layer == setting.hidden
        linear = nn.Linear(width, setting.outputs if final else width)
        nn.init.normal_(linear.weight, std=(setting.variance / width) ** 0.5, generator=generator)
        nn.init.normal_(linear.bias, std=setting.bias, generator=generator)
        parts[f"linear{layer + 1}"] = linear
        if not final:
            if hidden is not None:
                parts[f"norm{layer + 1}"] = hidden(width)
            parts[f"relu{layer + 1}"] = nn.ReLU()
    if last is not None:
        parts["last"] = last
    return nn.Sequential(parts)


def _slope(part: pd.DataFrame, network: str) -> float:
    own = part[part["network"] == network]
    return float(np.polyfit(np.log(own["width"]), np.log(own["largest"]), 1)[0])


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the exponents of λmax in the width."""

    def slopes(network: str) -> list[float]:
        return by_seed(frame, lambda part: _slope(part, network))

    growing = {
        "none": "Without normalization the largest eigenvalue grows in proportion to the width.",
        "last: variance": "Dividing the last layer by its deviation does not help.",
        "BatchNorm, hidden": "BatchNorm in the hidden layers does not help.",
        "LayerNorm, hidden": "LayerNorm in the hidden layers does not help.",
    }
    flat = {
        "last: mean": "Subtracting the mean of the last layer keeps it from growing so.",
        "last: BatchNorm": "With BatchNorm in the last layer it grows at most as the square root of the width.",
    }
    small = "At the smallest width the 32 samples are few for BatchNorm, whose gradients grow then (CO-17)."
    statistic = "slope of log λmax over log M"
    return (
        *(
            at_least(
                words,
                "S136, largest eigenvalue of the Fisher matrix",
                f"{statistic}, {network}",
                slopes(network),
                0.6,
                reason=small,
            )
            for network, words in growing.items()
        ),
        *(
            at_most(
                words, "S136, largest eigenvalue of the Fisher matrix", f"{statistic}, {network}", slopes(network), 0.5
            )
            for network, words in flat.items()
        ),
        at_least(
            "So BatchNorm in the last layer makes wide networks flatter.",
            "S136, largest eigenvalue of the Fisher matrix",
            "λmax without normalization over that with BatchNorm in the last layer, largest width",
            by_seed(
                frame[frame["width"] == frame["width"].max()],
                lambda part: (
                    part.loc[part["network"] == "none", "largest"].iloc[0]
                    / part.loc[part["network"] == "last: BatchNorm", "largest"].iloc[0]
                ),
            ),
            3.0,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw λmax by width, and the slopes."""
    largest, slopes = style.panels(canvas, columns=2, height=3.2)
    for index, network in enumerate(NETWORKS):
        part = frame[frame["network"] == network]
        style.curve(largest, part, "width", "largest", name=network, index=index, points=True)
        values = [_slope(seeds, network) for _, seeds in frame.groupby("seed")]
        middle = float(np.median(values))
        ends = [[middle - min(values)], [max(values) - middle]]
        slopes.barh(network, middle, xerr=ends, color=style.color(index), height=0.6, error_kw={"linewidth": 0.8})
    widths = sorted(frame["width"].unique())
    largest.set(xscale="log", yscale="log", xticks=widths, xticklabels=widths, ylim=(3, 2e4))
    largest.minorticks_off()
    largest.legend(fontsize=7, ncols=2, loc="upper left")
    slopes.invert_yaxis()
    slopes.axvline(0, color="black", linewidth=0.7)
    style.limit(slopes, 1, "as $M$")
    slopes.legend(loc="lower center")
    style.label(largest, "$T = M/2$", "width $M$", r"$\lambda_{\max}(F)$")
    style.label(slopes, "exponent", r"slope of $\log\,\lambda_{\max}$ over $\log\,M$", "")
