"""RE-2: too many groups take the accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import nn

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from normscope import norms, workbench

ID = "RE-2"
TITLE = "Too many groups take the accuracy"
SOURCES = ("S153",)
CAPTION = (
    "Perceptrons (784-256-256-10), five passes over 2000 digits, with group normalization or group whitening "
    "(Newton's iteration, T = 5) of g groups; the lines mark where the constraints reach the number of features: "
    "g = d/2 = 128 and g = 21. With groups of two, group normalization leaves signs, which have no gradient, and "
    "nothing is learned; group whitening loses little just past its bound."
)
COLUMNS = ("method", "groups", "train", "test")

GN, GW, BN = "group normalization", "group whitening", "BatchNorm"


@dataclass(frozen=True)
class Setting:
    """What is trained: width, examples, passes over the data, batch size, learning rate, numbers of groups."""

    width: int = 256
    examples: int = 2000
    epochs: int = 5
    batch: int = 128
    rate: float = 0.05
    normalized: tuple[int, ...] = (1, 8, 32, 128)
    whitened: tuple[int, ...] = (1, 4, 16, 32)


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(width=64, examples=1000, normalized=(1, 32), whitened=(2, 16)) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train a network for each number of groups; BatchNorm stands under 0 groups."""
    (images, labels), test = workbench.split(*workbench.mnist(), seed)
    train = images[: setting.examples], labels[: setting.examples]
    networks: list[tuple[str, int, Callable[[int], nn.Module]]] = [(BN, 0, nn.BatchNorm1d)]
    networks += [(GN, groups, _within("group", groups)) for groups in setting.normalized]
    networks += [(GW, groups, _within("group-whitening", groups)) for groups in setting.whitened]
    rows = []
    for method, groups, norm in networks:
        torch.manual_seed(seed)
        model = workbench.mlp((784, setting.width, setting.width, 10), norm=norm)
        optimizer = torch.optim.SGD(model.parameters(), lr=setting.rate, momentum=0.9)
        batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
        steps = setting.epochs * (len(train[0]) // setting.batch)
        workbench.fit(model, optimizer, batches, workbench.cross_entropy, steps=steps, progress=False)
        rows.append((method, groups, *(workbench.evaluate(model, [pair]) for pair in (train, test))))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _within(name: str, groups: int) -> Callable[[int], nn.Module]:
    return lambda width: norms.build(name, width, groups=groups)


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the end of group normalization and the decline of group whitening."""

    def accuracy(part: pd.DataFrame, method: str, groups: int) -> float:
        return float(part.loc[(part["method"] == method) & (part["groups"] == groups), "test"].item())

    def fewest(part: pd.DataFrame, method: str) -> float:
        own = part[part["method"] == method]
        return float(own["test"].iloc[:-1].max())

    most_normalized = int(frame.loc[frame["method"] == GN, "groups"].max())
    most_whitened = int(frame.loc[frame["method"] == GW, "groups"].max())
    return (
        at_most(
            "With groups of two, group normalization learns nothing.",
            "S153, section 4.1",
            "test accuracy at g = d/2",
            by_seed(frame, lambda part: accuracy(part, GN, most_normalized)),
            0.15,
        ),
        at_least(
            "Group whitening loses accuracy where the constraints exceed the features.",
            "S153, section 4.1",
            "best test accuracy less that of the most groups",
            by_seed(frame, lambda part: fewest(part, GW) - accuracy(part, GW, most_whitened)),
            0.01,
            reason="32 groups are just past the bound of 21, and two of three seeds lose less than 0.01",
        ),
        at_least(
            "Below the bound group whitening serves training as well as BatchNorm.",
            "S153, section 4.2",
            "best training accuracy of group whitening less that of BatchNorm",
            by_seed(
                frame,
                lambda part: (
                    part.loc[part["method"] == GW, "train"].max() - part.loc[part["method"] == BN, "train"].item()
                ),
            ),
            -0.005,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw accuracies by number of groups."""
    train, test = style.panels(canvas, columns=2)
    for ax, column in ((train, "train"), (test, "test")):
        for index, method in enumerate((GN, GW)):
            part = frame[frame["method"] == method]
            style.curve(ax, part, "groups", column, name=method, index=index, points=True)
        height = frame.loc[frame["method"] == BN, column].median()
        ax.axhline(height, color=style.color(2), linestyle=":", label=BN)
        for index, bound in ((0, 128), (1, 21.2)):
            ax.axvline(bound, color=style.color(index), linewidth=0.8, linestyle=(0, (2, 2)))
        ax.set_xscale("log", base=2)
        ax.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], ["1", "2", "4", "8", "16", "32", "64", "128"])
        ax.set_ylim(0, 1.03)
        ax.legend(loc="lower left")
    style.label(train, "training data", "groups $g$", "accuracy")
    style.label(test, "test data", "groups $g$", "accuracy")
