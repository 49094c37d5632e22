"""AP-3: entropy tells error, and Tent lowers it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

from analyses import style
from analyses.claim import Claim, at_least, by_seed, untestable
from normscope import applications, workbench

ID = "AP-3"
TITLE = "Entropy tells error, and Tent lowers it"
SOURCES = ("S169",)
CAPTION = (
    "A perceptron with BatchNorm trained on clean digits meets shifted ones. (a) Test digits in five equal groups "
    "by the entropy of their prediction: the higher, the more errors. (b) Accuracy with stored statistics "
    "(source), with those of test batches of 200 (norm), and with γ and β moved as well to lower the entropy "
    "(Tent): most of the gain is the statistics'. (c) Mean entropy of the predictions."
)
COLUMNS = ("shift", "kind", "place", "entropy", "value")

SHIFTS = ("contrast", "blur", "noise")
METHODS = ("source", "norm", "Tent")
_GROUP, _METHOD = "group", "method"


@dataclass(frozen=True)
class Setting:
    """What is trained and adapted: examples, passes over the data, groups by entropy, test batch, passes of Tent."""

    examples: int = 4000
    epochs: int = 8
    groups: int = 5
    batch: int = 200
    passes: int = 3


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(examples=1000, epochs=5, passes=1) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Group test digits by entropy (`value` is their error), and adapt in each way (`value` is the accuracy)."""
    train, (images, labels) = workbench.digits(seed, setting.examples)
    model = workbench.classifier(train, seed, epochs=setting.epochs)
    rows: list[tuple[object, ...]] = []
    for shift in SHIFTS:
        shifted = workbench.corrupt(images, shift, seed=seed)
        with torch.no_grad():
            outputs = model(shifted)
        entropy = applications.entropy(outputs)
        wrong = (outputs.argmax(1) != labels).double()
        for place, index in enumerate(entropy.argsort().chunk(setting.groups)):
            rows.append((shift, _GROUP, place + 1, float(entropy[index].mean()), float(wrong[index].mean())))
        for place, adapted in enumerate(_adapted(model, shifted, setting)):
            accuracy = float(workbench.accuracy(adapted, labels))
            rows.append((shift, _METHOD, place, float(applications.entropy(adapted).mean()), accuracy))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _adapted(model: nn.Module, images: Tensor, setting: Setting) -> tuple[Tensor, ...]:
    """Return the outputs of each method; Tent sees the batches so many times, its last predictions count."""
    batches = torch.split(images, setting.batch)
    running = applications.prediction_time(model)
    tent = applications.Tent(model)
    with torch.no_grad():
        source = model(images)
        norm = torch.cat([running(batch) for batch in batches])
    for _ in range(setting.passes):
        last = torch.cat([tent(batch) for batch in batches])
    return source, norm, last


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that entropy orders errors, and what adapting gains."""
    groups, methods = frame[frame["kind"] == _GROUP], frame[frame["kind"] == _METHOD]

    def smallest_rise(part: pd.DataFrame) -> float:
        return min(float(np.diff(own["value"]).min()) for _, own in part.groupby("shift"))

    def last_share(part: pd.DataFrame) -> float:
        return min(float(own["value"].iloc[-1] / own["value"].sum()) for _, own in part.groupby("shift"))

    def gain(part: pd.DataFrame, shift: str, first: str, second: str) -> float:
        own = part[part["shift"] == shift]["value"].to_numpy()
        return float(own[METHODS.index(second)] - own[METHODS.index(first)])

    def entropies(part: pd.DataFrame) -> float:
        table = part.pivot(index="shift", columns="place", values="entropy")
        return float((table[METHODS.index("Tent")] / table[METHODS.index("norm")]).max())

    return (
        at_least(
            "The higher the entropy of predictions, the more are wrong.",
            "S169, figure 1",
            "smallest rise of the error from one fifth by entropy to the next, over shifts",
            by_seed(groups, smallest_rise),
            0.0,
            reason="in the lowest fifths next to none is wrong, and a single error decides",
        ),
        at_least(
            "Entropy separates: the most uncertain fifth holds most errors.",
            "S169, figure 1",
            "smallest share of all errors that the last fifth holds, over shifts",
            by_seed(
                groups, lambda part: min(own["value"].iloc[-1] / own["value"].sum() for _, own in part.groupby("shift"))
            ),
            0.4,
            reason="low contrast raises the entropy of all predictions, so that it orders them less",
        ),
        at_least(
            "Lower entropy is what Tent reaches.",
            "S169, section 3",
            "smallest ratio of mean entropy, norm over Tent, over shifts",
            by_seed(methods, lambda part: 1 / entropies(part)),
            1.0,
        ),
        at_least(
            "Tent does not lose what batch statistics gain.",
            "S169, table 2",
            "least accuracy of Tent less that of norm, over shifts",
            by_seed(methods, lambda part: min(gain(part, shift, "norm", "Tent") for shift in SHIFTS)),
            -0.01,
        ),
        untestable(
            "Tent improves on batch statistics alone.",
            "S169, table 2",
            "accuracy of Tent less that of norm under noise",
            by_seed(methods, lambda part: gain(part, "noise", "norm", "Tent")),
            "0.02 to 0.05 on CIFAR-100-C and ImageNet-C",
            reason="15 updates of 400 gains and biases move a perceptron by less than a test set of 1000 resolves",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw error by entropy, accuracies and entropies by method."""
    errors, accuracies, entropies = style.panels(canvas, columns=3)
    groups, methods = frame[frame["kind"] == _GROUP], frame[frame["kind"] == _METHOD]
    for index, shift in enumerate(SHIFTS):
        style.curve(errors, groups[groups["shift"] == shift], "place", "value", name=shift, index=index, points=True)
    errors.set_xticks(range(1, 6), ["lowest", "2", "3", "4", "highest"])
    errors.legend()
    for ax, column in ((accuracies, "value"), (entropies, "entropy")):
        for index, method in enumerate(METHODS):
            over = methods[methods["place"] == index].groupby("shift")[column]
            middle, low, high = (statistic.reindex(SHIFTS) for statistic in (over.median(), over.min(), over.max()))
            places = np.arange(len(SHIFTS)) + 0.27 * (index - 1)
            color = ("#b4b6ba", style.color(0), style.color(1))[index]
            spread = [middle - low, high - middle]
            ax.bar(places, middle, 0.25, yerr=spread, color=color, label=method, error_kw={"linewidth": 0.8})
        ax.set_xticks(range(len(SHIFTS)), SHIFTS)
    accuracies.set(ylim=(0, 1.25), yticks=np.linspace(0, 1, 6))
    accuracies.legend(ncols=3, loc="upper center", columnspacing=0.8, handlelength=1.2)
    style.label(errors, "error by entropy", "fifth by entropy", "error")
    style.label(accuracies, "accuracy", "", "accuracy")
    style.label(entropies, "entropy", "", "mean entropy (nats)")
