"""ST-7: the gap between training and inference by batch size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, by_seed, equal
from analyses.stochasticity.network import logits, scores
from normscope import workbench

ID = "ST-7"
TITLE = "The gap between training and inference by batch size"
SOURCES = ("ioffe2017", "wu2021")
CAPTION = (
    "Perceptrons with BatchNorm (784-100-100-10), each trained on 2000 digits with batches of B and a learning "
    "rate proportional to B. (a) Loss on the training data with statistics of batches of B, as in training, less "
    "that with the stored statistics: it falls about as 1/B; at the largest B, after few steps, the lag of the "
    "moving averages is as large. (b) Accuracy on the same data in both modes, and on test data."
)
COLUMNS = ("batch", "loss_batch", "loss_stored", "gap", "accuracy_batch", "accuracy_stored", "accuracy_test")

_ACCURACIES = {
    "accuracy_batch": "batch statistics",
    "accuracy_stored": "stored statistics",
    "accuracy_test": "on test data",
}


@dataclass(frozen=True)
class Setting:
    """What is trained: examples, batch sizes, passes over the data."""

    examples: int = 2000
    batches: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    epochs: int = 8


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(examples=500, batches=(8, 32, 128), epochs=4) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train with each batch size and compare both modes."""
    train, test = workbench.digits(seed, setting.examples)
    rows = []
    for batch in setting.batches:
        model = workbench.classifier(train, seed, batch=batch, epochs=setting.epochs)
        loss_batch, accuracy_batch = scores(logits(model, train[0], batch), train[1])
        loss_stored, accuracy_stored = scores(logits(model, train[0]), train[1])
        accuracy_test = scores(logits(model, test[0]), test[1])[1]
        gap = abs(loss_batch - loss_stored)
        rows.append((batch, loss_batch, loss_stored, gap, accuracy_batch, accuracy_stored, accuracy_test))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the size of the gap and its fall."""
    return (
        at_least(
            "With small batches training and inference compute different functions.",
            "ioffe2017, section 2",
            "gap of the smallest batch size over that of the largest",
            by_seed(frame, lambda part: part["gap"].iloc[0] / part["gap"].iloc[-1]),
            10.0,
        ),
        equal(
            "The gap falls about as 1/B.",
            "wu2021, section 3",
            "slope of log gap over log B",
            by_seed(frame, lambda part: np.polyfit(np.log(part["batch"]), np.log(part["gap"]), 1)[0]),
            -1.0,
            tolerance=0.3,
        ),
        at_least(
            "With small batches the batch statistics cost accuracy even on the data trained on.",
            "ioffe2017, section 2",
            "accuracy with stored statistics less that with batch statistics, smallest batch size",
            by_seed(frame, lambda part: part["accuracy_stored"].iloc[0] - part["accuracy_batch"].iloc[0]),
            0.02,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the gap, and the accuracies."""
    gap, accuracy = style.panels(canvas, columns=2)
    style.curve(gap, frame, "batch", "gap", name="measured", index=0, points=True)
    middle = frame.groupby("batch")["gap"].median()
    batches = middle.index.to_numpy(dtype=float)
    style.theory(gap, batches, np.exp(np.log(middle * batches).mean()) / batches, name="$\\propto 1/B$")
    gap.set_yscale("log")
    for index, (column, name) in enumerate(_ACCURACIES.items()):
        style.curve(accuracy, frame, "batch", column, name=name, index=index, points=True)
    for ax in (gap, accuracy):
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(middle.index), [str(batch) for batch in middle.index])
        ax.legend()
    style.label(gap, "gap", "batch size $B$", "|loss, batch - loss, stored| (nats)")
    style.label(accuracy, "accuracy", "batch size $B$", "accuracy")
