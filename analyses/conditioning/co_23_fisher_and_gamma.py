"""CO-23: the scale γ of batch normalization and the sharpness of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

import normscope as ns
from analyses import style
from analyses.claim import Claim, at_least, by_seed
from analyses.conditioning.network import digits, perceptron
from normscope import workbench

ID = "CO-23"
TITLE = "A small scale of batch normalization makes the loss flatter"
SOURCES = ("S140",)
CAPTION = (
    "ReLU perceptrons with 8 hidden layers of 64 (He initialization) on MNIST. (a) Largest eigenvalue of the Fisher "
    "matrix of the outputs at initialization, 256 images, by the scale γ of BatchNorm, and without normalization "
    "(dotted). (b) Training loss after 100 steps of SGD (batches of 128) by learning rate: a small γ "
    "asks for a larger one, and gains nothing by it here."
)
COLUMNS = ("network", "quantity", "lr", "value")

NONE = "none"


@dataclass(frozen=True)
class Setting:
    """Network, values of γ, and training."""

    width: int = 64
    depth: int = 8
    images: int = 256
    gammas: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0)
    trained: tuple[float, ...] = (0.25, 0.5, 1.0)
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    steps: int = 100
    batch: int = 128


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return (
        Setting(width=32, depth=5, gammas=(0.25, 1.0), trained=(0.25, 1.0), rates=(0.1, 1.0), steps=30)
        if fast
        else Setting()
    )


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Take λmax at initialization for each γ, then train."""
    train, _ = digits(seed)
    images = train[0][: setting.images]
    rows: list[tuple[str, str, float, float]] = []
    for gamma in (None, *setting.gammas):
        model = _network(setting, gamma, seed)
        problem = ns.Problem(model, _half_squared, [(images, torch.zeros(len(images), 10))])
        top = ns.eigenpairs(problem, k=1, operator="ggn", tol=1e-2, progress=False)
        rows.append((_name(gamma), "largest", 0.0, float(top.values[0])))
    for gamma in setting.trained:
        for lr in setting.rates:
            model = _network(setting, gamma, seed)
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
            losses = workbench.fit(
                model, optimizer, batches, workbench.cross_entropy, steps=setting.steps, progress=False
            )
            rows.append((_name(gamma), "loss", lr, float(np.mean(losses[-10:]))))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _name(gamma: float | None) -> str:
    return NONE if gamma is None else f"γ = {gamma:g}"


def _network(setting: Setting, gamma: float | None, seed: int) -> nn.Module:
    norm = None if gamma is None else nn.BatchNorm1d
    model = perceptron((784, *[setting.width] * setting.depth, 10), norm, seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) and gamma is not None:
            nn.init.constant_(module.weight, gamma)
    return model


def _half_squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / (2 * len(output))


def _gamma(name: str) -> float:
    return float(name.removeprefix("γ = "))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that a small γ flattens, and bears larger rates."""
    largest = frame[frame["quantity"] == "largest"]
    losses = frame[frame["quantity"] == "loss"]

    def flattening(part: pd.DataFrame) -> float:
        values = part[part["network"] != NONE]["value"]
        return float((values / values.shift()).min())

    def beside(part: pd.DataFrame) -> float:
        of = part.set_index("network")["value"]
        return float(of[NONE] / of.drop(NONE).iloc[0])

    def best(part: pd.DataFrame) -> float:
        place = part.loc[part.groupby("network", sort=False)["value"].idxmin()].set_index("network")["lr"]
        return float(place.iloc[0] / place.iloc[-1])

    return (
        at_least(
            "The largest eigenvalue of the Fisher matrix falls with γ.",
            "S140, largest eigenvalue of the Fisher matrix",
            "λmax over that of the next smaller γ, smallest over γ",
            by_seed(largest, flattening),
            1.0,
        ),
        at_least(
            "With a small γ the loss is flatter than without normalization.",
            "S140, largest eigenvalue of the Fisher matrix",
            "λmax, none over smallest γ",
            by_seed(largest, beside),
            2.0,
        ),
        at_least(
            "A smaller γ is trained best by a larger learning rate.",
            "S140, experiments",
            "best learning rate, smallest trained γ over largest",
            by_seed(losses, best),
            1.5,
            reason="The grid of learning rates is coarse, and γ itself is trained and leaves its initial value.",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw λmax by γ, and loss by learning rate."""
    largest, loss = style.panels(canvas, columns=2)
    of = frame[(frame["quantity"] == "largest") & (frame["network"] != NONE)]
    part = of.assign(gamma=of["network"].map(_gamma))
    style.curve(largest, part, "gamma", "value", name="BatchNorm", index=0, points=True)
    plain = frame.loc[(frame["quantity"] == "largest") & (frame["network"] == NONE), "value"].median()
    style.rule(largest, plain, "no normalization")
    losses = frame[frame["quantity"] == "loss"]
    for index, network in enumerate(losses["network"].unique()):
        name = str(network).replace("γ", r"$\gamma$")
        style.curve(loss, losses[losses["network"] == network], "lr", "value", name=name, index=index, points=True)
    gammas = sorted(part["gamma"].unique())
    largest.set(xscale="log", yscale="log", xticks=gammas, xticklabels=[f"{gamma:g}" for gamma in gammas])
    largest.minorticks_off()
    loss.set_xscale("log")
    style.logarithmic(loss)
    for ax in (largest, loss):
        ax.legend()
    style.label(largest, "sharpness at initialization", r"scale $\gamma$ of BatchNorm", r"$\lambda_{\max}(F)$")
    style.label(loss, "after 100 steps", r"learning rate $\eta$", "training loss (nats)")
