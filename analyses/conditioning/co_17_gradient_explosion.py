"""CO-17: the rate at which batch normalization makes gradients grow backward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, by_seed, equal
from analyses.conditioning.random_networks import gradient_energies, propagate

ID = "CO-17"
TITLE = "Batch normalization makes gradients explode with depth, at the rate of mean-field theory"
SOURCES = ("yang2019",)
CAPTION = (
    "Random networks of width 512 and 40 layers with batch normalization, Gaussian inputs. (a) Squared gradient norm "
    "at each layer over that of the last: a straight line in this scale is exponential growth backward. (b) Growth per "
    "layer less 1, by batch size B: without activation (B-2)/(B-3), with ReLU and large batches π/(π-1) = 1.467. The "
    "rate is fitted over layers 5 to 30; 512 features are few against large batches, where rates fall short."
)
COLUMNS = ("activation", "batch", "layer", "energy", "rate", "expected")

RELU_LIMIT = math.pi / (math.pi - 1)


@dataclass(frozen=True)
class Setting:
    """Width, depth, batch sizes for each activation, and the layers of the fit."""

    width: int = 512
    depth: int = 40
    batches: tuple[int, ...] = (4, 5, 8, 16, 32, 64, 128, 256)
    rectified: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    hyperbolic: tuple[int, ...] = (16, 64, 256)
    fitted: tuple[int, int] = (5, 30)


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(width=256, batches=(5, 8, 16, 64), rectified=(16, 64), hyperbolic=(64,)) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Backpropagate a random cotangent through each network; `rate` is the growth per layer of ‖∂L/∂h‖²."""
    parts = []
    for activation, sizes in (
        ("linear", setting.batches),
        ("ReLU", setting.rectified),
        ("tanh", setting.hyperbolic),
    ):
        for batch in sizes:
            generator = torch.Generator().manual_seed(1000 * seed + batch)
            inputs = torch.randn(batch, setting.width, generator=generator)
            linear, active = propagate(inputs, setting.depth, activation, generator)
            energies = np.array(gradient_energies(linear, active, generator))
            first, last = setting.fitted
            slope = np.polyfit(np.arange(first, last), np.log(energies[first:last]), 1)[0]
            expected = {"linear": (batch - 2) / (batch - 3), "ReLU": RELU_LIMIT}.get(activation, math.nan)
            columns = {
                "activation": activation,
                "batch": batch,
                "layer": range(1, setting.depth + 1),
                "energy": energies / energies[-1],
                "rate": math.exp(-slope),
                "expected": expected,
            }
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the rates against theory."""

    def rates(activation: str, batch: int) -> list[float]:
        part = frame[(frame["activation"] == activation) & (frame["batch"] == batch)]
        return by_seed(part, lambda seeds: seeds["rate"].iloc[0])

    few = "Of 512 features the squared norms at this batch size have heavy tails, and the fitted growth falls short."
    linear = [
        equal(
            f"Without activation the squared gradient norm grows by (B-2)/(B-3) a layer, B = {batch}.",
            "yang2019, gradient explosion",
            f"growth a layer, B = {batch}",
            rates("linear", batch),
            (batch - 2) / (batch - 3),
            tolerance=0.03 * (batch - 2) / (batch - 3),
            reason=few,
        )
        for batch in (5, 8, 16)
        if batch in frame["batch"].unique()
    ]
    largest = int(frame.loc[frame["activation"] == "ReLU", "batch"].max())
    return (
        *linear,
        equal(
            "With ReLU and large batches it grows by π/(π-1) a layer.",
            "yang2019, gradient explosion",
            f"growth a layer, B = {largest}",
            rates("ReLU", largest),
            RELU_LIMIT,
            tolerance=0.03 * RELU_LIMIT,
            reason="The limit is that of large batches; smaller ones have a larger rate.",
        ),
        at_least(
            "Gradients grow with every nonlinear activation, whatever the batch size.",
            "yang2019, gradient explosion",
            "smallest growth a layer over batch sizes, ReLU and tanh",
            by_seed(frame[frame["activation"] != "linear"], lambda part: part["rate"].min()),
            1.1,
        ),
        at_least(
            "Gradients grow without activation at large batches too.",
            "yang2019, gradient explosion",
            "growth a layer without activation, largest B",
            by_seed(frame[frame["activation"] == "linear"], lambda part: part["rate"].iloc[-1]),
            1.0,
            reason="Theory asks for 1/(B-3) above 1, less than what 512 features take away at such a batch.",
        ),
        at_least(
            "The smaller the batch, the faster gradients grow.",
            "yang2019, gradient explosion",
            "growth a layer less 1 with ReLU, smallest batch over largest",
            by_seed(
                frame[frame["activation"] == "ReLU"],
                lambda part: (part["rate"].iloc[0] - 1) / (part["rate"].iloc[-1] - 1),
            ),
            1.05,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw energies by layer, and rates by batch size."""
    energy, rate = style.panels(canvas, columns=2)
    for index, (activation, batch) in enumerate((("linear", 8), ("linear", 64), ("ReLU", 64), ("tanh", 64))):
        part = frame[(frame["activation"] == activation) & (frame["batch"] == batch)]
        style.curve(energy, part, "layer", "energy", name=f"{activation}, B = {batch}", index=index)
    excess = frame.assign(excess=frame["rate"] - 1)
    for index, activation in zip((0, 2, 3), ("linear", "ReLU", "tanh"), strict=True):
        part = excess[excess["activation"] == activation]
        style.curve(rate, part, "batch", "excess", name=activation, index=index, points=True)
    sizes = np.geomspace(4, 256, 60)
    style.theory(rate, sizes, 1 / (sizes - 3), name="theory: $1/(B-3)$; $1/(\\pi-1)$")
    style.theory(rate, sizes[sizes >= 8], np.full((sizes >= 8).sum(), RELU_LIMIT - 1), name="")
    energy.set_yscale("log")
    energy.legend()
    rate.set(xscale="log", yscale="log", ylim=(1e-3, 2), xticks=(4, 16, 64, 256), xticklabels=(4, 16, 64, 256))
    rate.minorticks_off()
    rate.legend(loc="lower left")
    style.label(energy, "gradient by layer", "layer", r"$\|\partial L/\partial h_l\|^2$ over that of the last")
    style.label(rate, "growth", "batch size $B$", "growth a layer less 1")
