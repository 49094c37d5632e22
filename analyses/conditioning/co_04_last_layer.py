"""CO-4: the last layer of a deep residual network, with and without batch normalization before it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import nn

import normscope as ns
from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.conditioning.network import Pair, digits, residual_perceptron
from normscope import workbench

ID = "CO-4"
TITLE = "The last layer of a deep residual network wants normalization"
SOURCES = ("huang2020layerwise",)
CAPTION = (
    "Pre-activation residual perceptrons (width 64, blocks of two layers with BatchNorm) on MNIST-4000, SGD with "
    "momentum, η = 0.1. The stream adds up over blocks, so (a) the largest eigenvalue of the last layer's input grows "
    "with depth, and training for 120 steps takes only a part of that away; BatchNorm before the last layer holds it. "
    "(b) Test accuracy after 120 steps."
)
COLUMNS = ("last", "blocks", "step", "largest", "accuracy")

WITH, WITHOUT = "BatchNorm before last layer", "none before last layer"


@dataclass(frozen=True)
class Setting:
    """Width, numbers of blocks, learning rate, steps, batch size."""

    width: int = 64
    blocks: tuple[int, ...] = (2, 4, 8, 16, 32)
    lr: float = 0.1
    steps: int = 120
    batch: int = 128


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(width=32, blocks=(2, 8), steps=40) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train both variants of each depth; λmax before and after, accuracy after."""
    train, test = digits(seed)
    rows = []
    for blocks in setting.blocks:
        for last in (WITHOUT, WITH):
            model = residual_perceptron(setting.width, blocks, seed, last=last == WITH)
            optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=0.9)
            batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
            rows.append((last, blocks, 0, _largest(model, train), _accuracy(model, test)))
            workbench.fit(model, optimizer, batches, workbench.cross_entropy, steps=setting.steps, progress=False)
            rows.append((last, blocks, setting.steps, _largest(model, train), _accuracy(model, test)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _largest(model: nn.Module, train: Pair) -> float:
    """Return λmax of the second moment of the last layer's input over 1024 samples."""
    batch = train[0][:1024], train[1][:1024]
    record = ns.examine(model, workbench.cross_entropy, [batch], layers="head", probes="covariance", progress=False)
    frame = record.frame()
    found = frame[(frame["stat"] == "moment.max") & (frame["site"] == "head/input")]
    return float(found["value"].iloc[0])


def _accuracy(model: nn.Module, test: Pair) -> float:
    return workbench.evaluate(model, [test])


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the eigenvalue, its growth with depth, and accuracy."""
    deepest = frame["blocks"].max()
    trained = frame[frame["step"] > 0]
    start = frame[(frame["step"] == 0) & (frame["last"] == WITHOUT)]

    def gain(part: pd.DataFrame) -> float:
        deep = part[part["blocks"] == deepest].set_index("last")["accuracy"]
        return float(deep[WITH] - deep[WITHOUT])

    def excess(part: pd.DataFrame) -> float:
        wide = part.pivot_table(index=["blocks", "step"], columns="last", values="largest")
        return float((wide[WITHOUT] / wide[WITH]).min())

    def grown(part: pd.DataFrame) -> float:
        values = part.sort_values("blocks")["largest"]
        return float(values.iloc[-1] / values.iloc[0])

    return (
        at_least(
            "Without normalization before it, the last layer of a deeper network has a larger eigenvalue.",
            "huang2020layerwise, last layer of residual networks",
            "λmax(Σₓ) at initialization, most blocks over fewest",
            by_seed(start, grown),
            2.0,
        ),
        at_least(
            "Without BatchNorm before the last layer the eigenvalue is larger than with it, at every depth.",
            "huang2020layerwise, last layer of residual networks",
            "λmax(Σₓ), none over BatchNorm, smallest over depths, initialization and after training",
            by_seed(frame, excess),
            2.0,
        ),
        at_most(
            "BatchNorm before the last layer holds the eigenvalue at all depths.",
            "huang2020layerwise, last layer of residual networks",
            "λmax(Σₓ) after training, largest over depths, BatchNorm",
            by_seed(trained[trained["last"] == WITH], lambda part: part["largest"].max()),
            30.0,
        ),
        at_least(
            "BatchNorm before the last layer makes the deepest network better.",
            "huang2020layerwise, last layer of residual networks",
            "test accuracy of the deepest network, BatchNorm less none",
            by_seed(trained, gain),
            0.03,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the eigenvalue before and after training, and the accuracy."""
    largest, accuracy = style.panels(canvas, columns=2)
    trained = frame["step"].max()
    index = 0
    for last in (WITHOUT, WITH):
        for step in (0, trained):
            part = frame[(frame["last"] == last) & (frame["step"] == step)]
            short = "none" if last == WITHOUT else "BatchNorm"
            style.curve(largest, part, "blocks", "largest", name=f"{short}, step {step}", index=index, points=True)
            if step:
                style.curve(accuracy, part, "blocks", "accuracy", name=last, index=index, points=True)
            index += 1
    blocks = sorted(frame["blocks"].unique())
    for ax in (largest, accuracy):
        ax.set(xscale="log", xticks=blocks, xticklabels=blocks)
        ax.minorticks_off()
        ax.legend()
    largest.set(yscale="log", ylim=(5, 5e4))
    largest.legend(loc="upper left", ncols=2, title="before last layer", title_fontsize=8)
    style.label(largest, "largest eigenvalue", "residual blocks", r"$\lambda_{\max}(\Sigma_x)$ of the last layer")
    style.label(accuracy, f"after {trained} steps", "residual blocks", "test accuracy")
