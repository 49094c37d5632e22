"""ST-10: batch statistics at prediction time against shifts of the data."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.stochasticity.network import logits, scores
from normscope import workbench

ID = "ST-10"
TITLE = "Batch statistics at prediction time against shifted data"
SOURCES = ("nado2020",)
CAPTION = (
    "A perceptron with BatchNorm (784-100-100-10), trained on clean digits, tested on shifted ones: with the "
    "stored statistics (gray, dotted) and with those of test batches. A change of contrast or "
    "brightness is removed exactly by the first layer, blur nearly; additive noise is not helped, inverted digits "
    "are lost. (b) On clean data batch statistics cost accuracy where test batches are small."
)
COLUMNS = ("corruption", "batch", "accuracy", "ece")

CLEAN = "clean"
_STORED = 0  # in place of a batch size


@dataclass(frozen=True)
class Setting:
    """What is trained and tested: examples, passes over the data, sizes of test batches."""

    examples: int = 4000
    epochs: int = 8
    batches: tuple[int, ...] = (4, 8, 20, 50, 100, 200, 500, 1000)


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(examples=1000, epochs=5, batches=(8, 100, 1000)) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Test with stored and with batch statistics on each corruption; a batch size of 0 stands for the stored ones."""
    train, (images, labels) = workbench.digits(seed, setting.examples)
    model = workbench.classifier(train, seed, batch=64, epochs=setting.epochs)
    rows = []
    for kind in (CLEAN, *workbench.CORRUPTIONS):
        shifted = images if kind == CLEAN else workbench.corrupt(images, kind, seed=seed)
        for batch in (_STORED, *setting.batches):
            outputs = logits(model, shifted, batch or None)
            rows.append((kind, batch, scores(outputs, labels)[1], _calibration_error(outputs, labels)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _calibration_error(outputs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error: mean |accuracy - confidence| over equal bins of confidence."""
    confidence, predicted = outputs.softmax(-1).max(-1)
    right = (predicted == labels[: len(outputs)]).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - confidence.double())
    return float(gaps.abs().sum() / len(outputs))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge gains by kind of shift, and the cost on clean data."""
    largest, smallest = frame["batch"].max(), frame.loc[frame["batch"] > 0, "batch"].min()

    def accuracy(part: pd.DataFrame, kind: str, batch: int) -> float:
        return float(part.loc[(part["corruption"] == kind) & (part["batch"] == batch), "accuracy"].item())

    def gain(kind: str) -> list[float]:
        return by_seed(frame, lambda part: accuracy(part, kind, largest) - accuracy(part, kind, _STORED))

    exact = by_seed(
        frame,
        lambda part: max(
            abs(accuracy(part, kind, batch) - accuracy(part, CLEAN, batch))
            for kind in ("contrast", "brightness")
            for batch in part.loc[part["batch"] > 0, "batch"].unique()
        ),
    )
    return (
        at_most(
            "An affine change of the input is undone exactly by batch statistics.",
            "nado2020, section 3",
            "contrast and brightness: largest |accuracy - accuracy on clean data|, over all batch sizes",
            exact,
            0.002,
        ),
        *(
            at_least(
                f"Prediction-time batch statistics raise accuracy under {words}.",
                "nado2020, section 4",
                "accuracy with batches of the largest size less that with stored statistics",
                gain(kind),
                0.02,
                reason=reason,
            )
            for kind, words, reason in (
                ("contrast", "low contrast", ""),
                (
                    "blur",
                    "blur",
                    "blur costs 0.04 here, half of which returns; one seed is short of 0.02",
                ),
                (
                    "noise",
                    "additive noise",
                    "noise on each pixel raises all variances of the first layer alike, which costs little; "
                    "what it does to single examples no statistic of the batch undoes",
                ),
            )
        ),
        at_least(
            "On clean data small test batches cost accuracy.",
            "nado2020, section 4",
            "accuracy with stored statistics less that with batches of the smallest size",
            by_seed(frame, lambda part: accuracy(part, CLEAN, _STORED) - accuracy(part, CLEAN, smallest)),
            0.02,
        ),
        at_most(
            "Batch statistics help with some shifts only: where the content changes they do not.",
            "nado2020, section 5",
            "inverted digits: accuracy with batches of the largest size",
            by_seed(frame, lambda part: accuracy(part, "invert", largest)),
            0.2,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw accuracies by corruption and by batch size, and calibration errors by corruption."""
    bars, curves, errors = style.panels(canvas, columns=3, height=3.0)
    _bars(bars, frame, "accuracy")
    _bars(errors, frame, "ece")
    bars.set_ylim(0, 1.18)
    for index, kind in enumerate((CLEAN, "contrast", "blur", "noise")):
        part = frame[frame["corruption"] == kind]
        style.curve(curves, part[part["batch"] > 0], "batch", "accuracy", name=kind, index=index, points=True)
        stored = part.loc[part["batch"] == _STORED, "accuracy"].median()
        curves.axhline(stored, color=style.color(index), linewidth=0.9, linestyle=":")
    curves.set_xscale("log")
    curves.minorticks_off()
    curves.set_xticks([4, 10, 30, 100, 300, 1000], ["4", "10", "30", "100", "300", "1000"])
    curves.set_ylim(0, 1.02)
    curves.legend(loc="lower right")
    style.label(bars, "accuracy", "", "accuracy")
    style.label(curves, "by size of the test batches", "test batch size", "accuracy")
    style.label(errors, "calibration", "", "expected calibration error")


def _bars(ax: Axes, frame: pd.DataFrame, column: str) -> None:
    """Draw the median over seeds by corruption, with stored statistics and with those of the largest batch."""
    kinds = (CLEAN, *workbench.CORRUPTIONS)
    largest = frame["batch"].max()
    groups = ((-0.2, _STORED, "stored", "#b4b6ba"), (0.2, largest, f"batches of {largest}", style.color(0)))
    for offset, batch, name, color in groups:
        over = frame[frame["batch"] == batch].groupby("corruption")[column]
        middle, low, high = (statistic.reindex(kinds) for statistic in (over.median(), over.min(), over.max()))
        places = [place + offset for place in range(len(kinds))]
        spread = [middle - low, high - middle]
        ax.bar(places, middle, 0.38, yerr=spread, color=color, label=name, error_kw={"linewidth": 0.8})
    ax.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right")
    ax.legend(ncols=1 if column == "ece" else 2, loc="upper left")
