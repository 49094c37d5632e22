"""CO-6: density of the Hessian's eigenvalues through training, with and without batch normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import nn

import normscope as ns
from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.conditioning.network import digits
from normscope import workbench

ID = "CO-6"
TITLE = "Density of the Hessian's eigenvalues: outliers without batch normalization"
SOURCES = ("ghorbani2019",)
CAPTION = (
    "A ReLU perceptron 784-32-32-32-32-10 (torch's initialization) on 1000 MNIST digits, full batch, η = 0.05, "
    "momentum 0.9. Density of the eigenvalues of the Hessian of the training loss (statistics of the batch), by "
    "stochastic Lanczos quadrature with 60 steps and 3 probes, smoothed by a Gaussian of variance 0.001 times the "
    "width, seed 0; (a) at initialization, (b) after 50 steps. (c) Largest and smallest eigenvalue by step, all seeds. "
    "After 50 steps the network without BatchNorm has outliers far from the bulk."
)
COLUMNS = ("network", "step", "quantity", "eigenvalue", "value")

_KERNEL: Final = 1e-3  # variance of the kernel over the width of the spectrum: few probes leave gaps between nodes
NORMS: Final = {"none": None, "BatchNorm": nn.BatchNorm1d}


@dataclass(frozen=True)
class Setting:
    """Network, training, looks, and the quadrature."""

    width: int = 32
    depth: int = 4
    images: int = 1000
    lr: float = 0.05
    looks: tuple[int, ...] = (0, 25, 50)
    lanczos: int = 60
    probes: int = 3
    points: int = 240


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(width=12, depth=2, images=200, looks=(0, 20), lanczos=20, probes=2) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train both networks; density, extremes, share of negative mass and loss at each look."""
    (images, labels), _ = digits(seed)
    batch = images[: setting.images], labels[: setting.images]
    parts = []
    for network, norm in NORMS.items():
        torch.manual_seed(seed)
        model = workbench.mlp((784, *[setting.width] * setting.depth, 10), norm)
        optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=0.9)
        done = 0
        for look in setting.looks:
            if look > done:
                workbench.fit(
                    model,
                    optimizer,
                    [batch] * (look - done),
                    workbench.cross_entropy,
                    steps=look - done,
                    progress=False,
                )
                done = look
            problem = ns.Problem(model, workbench.cross_entropy, [batch])
            parts.append(_density(problem, setting, seed).assign(network=network, step=look))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _density(problem: ns.Problem, setting: Setting, seed: int) -> pd.DataFrame:
    found = ns.spectrum(problem, steps=setting.lanczos, probes=setting.probes, method="slq", seed=seed, progress=False)
    low, high = float(found.nodes.min()), float(found.nodes.max())
    # dense near 0, where the bulk is, and reaching both ends
    side = np.geomspace(1e-3, 1, setting.points // 2)
    grid = np.concatenate([-abs(low) * 1.1 * side[::-1], high * 1.1 * side])
    rows = [("density", x, y) for x, y in zip(grid, found.density(grid, _KERNEL * max(1.0, high - low)), strict=True)]
    mass = np.abs(found.nodes) * found.weights
    rows += [
        ("largest", 0.0, high),
        ("smallest", 0.0, low),
        ("negative share", 0.0, mass[found.nodes < 0].sum() / mass.sum()),
        ("trace", 0.0, float(found.moment(1).value) * found.size),
    ]
    return pd.DataFrame(rows, columns=["quantity", "eigenvalue", "value"])


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the outliers."""
    first, last = (frame[frame["step"] == step] for step in (frame["step"].min(), frame["step"].max()))

    def value(part: pd.DataFrame, network: str, quantity: str) -> float:
        return float(part.loc[(part["network"] == network) & (part["quantity"] == quantity), "value"].iloc[0])

    return (
        at_least(
            "Early in training the network without BatchNorm has eigenvalues far above those with it.",
            "ghorbani2019, outliers and batch normalization",
            "largest eigenvalue after 50 steps, none over BatchNorm",
            by_seed(last, lambda part: value(part, "none", "largest") / value(part, "BatchNorm", "largest")),
            3.0,
        ),
        at_least(
            "These are outliers: more of the trace is in the largest eigenvalue than with BatchNorm.",
            "ghorbani2019, outliers and batch normalization",
            "largest eigenvalue over trace after 50 steps, none over BatchNorm",
            by_seed(
                last,
                lambda part: (
                    value(part, "none", "largest")
                    / value(part, "none", "trace")
                    / (value(part, "BatchNorm", "largest") / value(part, "BatchNorm", "trace"))
                ),
            ),
            1.5,
        ),
        at_most(
            "The weight of negative eigenvalues falls as soon as training begins.",
            "ghorbani2019, negative eigenvalues",
            "share of negative eigenvalues in Σ|λ|, after training over before, BatchNorm",
            [
                after / before
                for before, after in zip(
                    by_seed(first, lambda part: value(part, "BatchNorm", "negative share")),
                    by_seed(last, lambda part: value(part, "BatchNorm", "negative share")),
                    strict=True,
                )
            ],
            0.5,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the density of the first seed at both ends of the looks, and the extremes of all by step."""
    axes = style.panels(canvas, columns=3)
    first = frame[(frame["seed"] == frame["seed"].min()) & (frame["quantity"] == "density")]
    for ax, step in zip(axes, (frame["step"].min(), frame["step"].max()), strict=False):
        for index, network in enumerate(NORMS):
            part = first[(first["step"] == step) & (first["network"] == network)]
            ax.plot(
                part["eigenvalue"],
                part["value"].clip(lower=1e-6),
                color=style.color(index),
                linestyle=style.DASHES[index],
                label=network,
            )
        ax.set(xscale="symlog", yscale="log", ylim=(1e-5, 1e3))
        ax.legend()
        style.label(ax, f"step {step}", r"eigenvalue $\lambda$", "density")
    extremes = axes[2]
    for index, network in enumerate(NORMS):
        for quantity in ("largest", "smallest"):
            part = frame[(frame["network"] == network) & (frame["quantity"] == quantity)]
            name = f"{network}, {quantity}"
            style.curve(extremes, part, "step", "value", name=name, index=2 * index + (quantity != "largest"))
    extremes.set_yscale("symlog", linthresh=1)
    extremes.set_ylim(-50, 1e4)
    extremes.legend(fontsize=7, ncols=2, loc="upper left")
    style.label(extremes, "extremes", "step $t$", r"eigenvalue $\lambda$")
