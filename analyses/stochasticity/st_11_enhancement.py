"""ST-11: a gate by each example's own channels against the noise of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure as Canvas
from torch import nn

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed, untestable
from normscope import norms, workbench

ID = "ST-11"
TITLE = "A gate by each example against the noise of the batch"
SOURCES = ("S151",)
CAPTION = (
    "Instance enhancement gates each channel by σ(a mean(x) + b), mean over the example's own pixels. Small "
    "residual networks (16 channels, digits of 14 x 14 pixels, ten passes over 1000) with BatchNorm, and with "
    "that gate. (a) Test accuracy by batch size; (b) loss on the training data in training mode less that in "
    "evaluation mode, what the noise of the batch costs. The gate, a constant factor at first, does not lessen it "
    "here: at 64 the gated network is still learning after ten passes, and its stored statistics lag behind (below 0)."
)
COLUMNS = ("method", "batch", "accuracy", "noise")

BN, ENHANCED = "BatchNorm", "instance enhancement"


@dataclass(frozen=True)
class Setting:
    """What is trained: examples, passes over the data, batch sizes, learning rate at a batch size of 64."""

    examples: int = 1000
    epochs: int = 10
    batches: tuple[int, ...] = (4, 8, 64)
    rate: float = 0.1


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(examples=200, epochs=2, batches=(8, 64)) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train with and without the gate for each batch size."""
    images, labels = workbench.mnist()
    (inputs, targets), test = workbench.split(F.avg_pool2d(images, 2), labels, seed)
    inputs, targets = inputs[: setting.examples], targets[: setting.examples]
    rows = []
    for method in (BN, ENHANCED):
        for batch in setting.batches:
            torch.manual_seed(seed)
            model = workbench.residual_cnn(16, (1,))
            if method == ENHANCED:
                norms.convert(model, to="instance-enhancement")
            optimizer = torch.optim.SGD(model.parameters(), lr=setting.rate * batch / 64, momentum=0.9)
            batches = workbench.batches(inputs, targets, batch, torch.Generator().manual_seed(seed))
            steps = setting.epochs * (setting.examples // batch)
            workbench.fit(model, optimizer, batches, workbench.cross_entropy, steps=steps, progress=False)
            accuracy = workbench.evaluate(model, [test])
            stored = workbench.evaluate(model, [(inputs, targets)], workbench.cross_entropy)
            rows.append((method, batch, accuracy, _in_training(model, inputs, targets, batch) - stored))
    return pd.DataFrame(rows, columns=list(COLUMNS))


@torch.no_grad()
def _in_training(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, batch: int) -> float:
    """Return the mean loss with the statistics of batches; nothing is evaluated with the model afterwards."""
    pairs = zip(torch.split(inputs, batch), torch.split(targets, batch), strict=True)
    losses = [float(workbench.cross_entropy(model(x), y)) for x, y in pairs if len(x) == batch]
    return sum(losses) / len(losses)


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge what the gate changes where noise is large."""

    def at(part: pd.DataFrame, method: str, column: str) -> float:
        return float(part.loc[part["method"] == method, column].iloc[0])

    return (
        at_most(
            "The gate lessens what the noise of small batches costs.",
            "S151, section 3",
            "loss in training mode less that in evaluation mode, with the gate over without, smallest batch size",
            by_seed(frame, lambda part: at(part, ENHANCED, "noise") / at(part, BN, "noise")),
            1.0,
            reason="in ten passes the gate learns little, and it starts as the same factor for all examples",
        ),
        at_least(
            "With small batches noise costs BatchNorm training loss.",
            "S151, section 1",
            "loss in training mode less that in evaluation mode, BatchNorm, smallest batch size (nats)",
            by_seed(frame, lambda part: at(part, BN, "noise")),
            0.05,
            reason="In one seed the difference is smaller than what training has left of the loss.",
        ),
        untestable(
            "Instance enhancement is the more accurate.",
            "S151, table 1",
            "mean test accuracy over batch sizes, with the gate less without",
            by_seed(
                frame,
                lambda part: (
                    part.loc[part["method"] == ENHANCED, "accuracy"].mean()
                    - part.loc[part["method"] == BN, "accuracy"].mean()
                ),
            ),
            "0.005 to 0.02 on CIFAR",
            reason="a test set of 1000 digits resolves 0.01, and the networks of the work are fifty times as deep",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw accuracy and cost of noise by batch size."""
    accuracy, noise = style.panels(canvas, columns=2)
    for ax, column in ((accuracy, "accuracy"), (noise, "noise")):
        for index, method in enumerate((BN, ENHANCED)):
            part = frame[frame["method"] == method]
            style.curve(ax, part, "batch", column, name=method, index=index, points=True)
        ax.set_xscale("log", base=2)
        ticks = sorted(frame["batch"].unique())
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.legend()
    noise.axhline(0, color="#b4b6ba", linewidth=0.7)
    style.label(accuracy, "accuracy", "batch size $B$", "test accuracy")
    style.label(noise, "cost of noise", "batch size $B$", "loss, training - evaluation mode (nats)")
