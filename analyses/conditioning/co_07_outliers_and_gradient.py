"""CO-7: how far outliers stand out, and how much of the gradient lies along them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import nn

import normscope as ns
from analyses import style
from analyses.claim import Claim, at_least, by_seed
from analyses.conditioning.network import digits
from normscope import workbench

ID = "CO-7"
TITLE = "Outliers of the Hessian hold the gradient without batch normalization"
SOURCES = ("ghorbani2019",)
CAPTION = (
    "The networks of CO-6. (a) ζ = λ₁/λ₁₀: how far the largest eigenvalue stands above the tenth. (b) Share of the "
    "gradient's squared norm in the span of the ten leading eigenvectors. (c) Training loss. Compare where both "
    "networks are still learning, steps 25 to 100: later the loss is nearly zero and curvature vanishes with it."
)
COLUMNS = ("network", "step", "loss", "zeta", "energy")

NORMS: Final = {"none": None, "BatchNorm": nn.BatchNorm1d}


@dataclass(frozen=True)
class Setting:
    """Network, training, looks, and how many eigenpairs are taken, one a class."""

    width: int = 32
    depth: int = 4
    images: int = 1000
    lr: float = 0.05
    looks: tuple[int, ...] = (25, 50, 75, 100)
    pairs: int = 10


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(width=12, depth=2, images=200, looks=(10, 20)) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train both networks; eigenpairs and gradient at each look."""
    (images, labels), _ = digits(seed)
    batch = images[: setting.images], labels[: setting.images]
    rows = []
    for network, norm in NORMS.items():
        torch.manual_seed(seed)
        model = workbench.mlp((784, *[setting.width] * setting.depth, 10), norm)
        optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=0.9)
        losses: list[float] = []
        for look in setting.looks:
            steps = look - len(losses)
            losses += workbench.fit(
                model, optimizer, [batch] * steps, workbench.cross_entropy, steps=steps, progress=False
            )
            problem = ns.Problem(model, workbench.cross_entropy, [batch])
            pairs = ns.eigenpairs(problem, k=setting.pairs, tol=1e-2, seed=seed, progress=False)
            gradient = problem.gradient()
            energy = float((pairs.vectors.T @ gradient).square().sum() / gradient.square().sum())
            rows.append((network, look, losses[-1], float(pairs.values[0] / pairs.values[-1]), energy))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge both at step 50, and over all looks."""

    def compare(column: str, step: int | None) -> list[float]:
        part = frame if step is None else frame[frame["step"] == step]

        def ratio(seeds: pd.DataFrame) -> float:
            means = seeds.groupby("network")[column].mean()
            return float(means["none"] / means["BatchNorm"])

        return by_seed(part, ratio)

    step = 50 if 50 in frame["step"].unique() else int(frame["step"].max())
    return (
        at_least(
            "Without BatchNorm the largest eigenvalue stands farther above the tenth.",
            "ghorbani2019, outliers and batch normalization",
            f"λ₁/λ₁₀ at step {step}, none over BatchNorm",
            compare("zeta", step),
            2.0,
        ),
        at_least(
            "The largest eigenvalue stands farther above the tenth through training.",
            "ghorbani2019, outliers and batch normalization",
            "λ₁/λ₁₀, mean over looks, none over BatchNorm",
            compare("zeta", None),
            2.0,
            reason="Once its loss is below 0.01, from step 75 on, a network with BatchNorm may have an outlier too.",
        ),
        at_least(
            "Without BatchNorm more of the gradient lies in the span of the leading eigenvectors.",
            "ghorbani2019, outliers and batch normalization",
            f"share of ‖∇L‖² in ten leading eigenvectors at step {step}, none over BatchNorm",
            compare("energy", step),
            1.05,
            reason="The gap is small at this size, and of either sign for some seeds.",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw ζ, the share of the gradient, and the loss by step."""
    zeta, energy, loss = style.panels(canvas, columns=3)
    for index, network in enumerate(NORMS):
        part = frame[frame["network"] == network]
        for ax, column in ((zeta, "zeta"), (energy, "energy"), (loss, "loss")):
            style.curve(ax, part, "step", column, name=network, index=index, points=True)
    zeta.set_ylim(0, None)
    energy.set_ylim(0, 1.05)
    loss.set_yscale("log")
    for ax in (zeta, energy, loss):
        ax.legend()
    style.label(zeta, "outliers", "step $t$", r"$\zeta = \lambda_1/\lambda_{10}$")
    style.label(energy, "gradient", "step $t$", r"$\|P_{10}\,\nabla L\|^2\,/\,\|\nabla L\|^2$")
    style.label(loss, "loss", "step $t$", "training loss (nats)")
