"""AS-2: associate normalization by batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed, untestable
from normscope import norms, workbench

ID = "AS-2"
TITLE = "Associate normalization by batch size"
SOURCES = ("S244",)
CAPTION = (
    "Test error by batch size. (a) Residual networks here (16 channels, digits of 14 x 14 pixels, eight passes "
    "over 1000, learning rate proportional to the batch size); (b) as published for CIFAR-10 and ResNet-101: "
    "BatchNorm loses with small batches, group and associate normalization do not depend on the batch. Of that (a) "
    "shows only that small batches do not harm the latter two: eight passes are so few steps at 64 that every network "
    "is still learning there, which outweighs what the noise of small batches costs."
)
COLUMNS = ("method", "batch", "error", "published")

BN, GN, ASSOCIATE = "BatchNorm", "group normalization", "associate"
_PUBLISHED: Final = {
    BN: {64: 6.43, 32: 6.48, 16: 7.39, 8: 9.78, 4: 11.15, 2: 13.79},
    GN: {64: 7.02, 32: 7.14, 16: 7.24, 8: 7.22, 4: 7.31, 2: 7.29},
    ASSOCIATE: {64: 6.19, 32: 6.49, 16: 6.64, 8: 6.70, 4: 7.05, 2: 7.11},
}
_NAMES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    BN: ("batch", {}),
    GN: ("group", {"groups": 8}),
    ASSOCIATE: ("associate", {"groups": 8, "hidden": 2}),
}


@dataclass(frozen=True)
class Setting:
    """What is trained: examples, passes over the data, batch sizes, learning rate at a batch size of 64."""

    examples: int = 1000
    epochs: int = 8
    batches: tuple[int, ...] = (2, 8, 64)
    rate: float = 0.1
    blocks: tuple[int, ...] = (1,)


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(examples=200, epochs=2, batches=(8, 64)) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train with each method and batch size."""
    images, labels = workbench.mnist()
    (inputs, targets), test = workbench.split(F.avg_pool2d(images, 2), labels, seed)
    inputs, targets = inputs[: setting.examples], targets[: setting.examples]
    rows = []
    for method, (name, options) in _NAMES.items():
        for batch in setting.batches:
            torch.manual_seed(seed)
            model = workbench.residual_cnn(16, setting.blocks)
            if method != BN:
                norms.convert(model, to=name, **options)
            optimizer = torch.optim.SGD(model.parameters(), lr=setting.rate * batch / 64, momentum=0.9)
            batches = workbench.batches(inputs, targets, batch, torch.Generator().manual_seed(seed))
            steps = setting.epochs * (setting.examples // batch)
            workbench.fit(model, optimizer, batches, workbench.cross_entropy, steps=steps, progress=False)
            error = 100 * (1 - workbench.evaluate(model, [test]))
            rows.append((method, batch, error, _PUBLISHED[method][batch]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge who depends on the batch size; the order of accuracies is beyond this scale."""

    def rise(method: str) -> list[float]:
        part = frame[frame["method"] == method]
        return by_seed(part, lambda own: own["error"].iloc[0] - own["error"].iloc[-1])

    def best(part: pd.DataFrame, method: str) -> float:
        return float(part.loc[part["method"] == method, "error"].min())

    return (
        at_least(
            "BatchNorm loses accuracy with small batches.",
            "S244, table 3",
            "test error at the smallest batch size less that at the largest (points)",
            rise(BN),
            2.0,
            reason="In so few passes small batches take more steps, which outweighs what their noise costs.",
        ),
        *(
            at_most(
                f"{title} does not.",
                "S244, table 3",
                "test error at the smallest batch size less that at the largest (points)",
                rise(method),
                1.0,
            )
            for method, title in ((GN, "Group normalization"), (ASSOCIATE, "Associate normalization"))
        ),
        untestable(
            "Associate normalization is more accurate than group normalization.",
            "S244, table 3",
            "least test error of group less that of associate normalization (points)",
            by_seed(frame, lambda part: best(part, GN) - best(part, ASSOCIATE)),
            "0.18 to 0.83",
            reason="a test set of 1000 digits resolves 0.5 points, and training is eight passes, not 350",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the errors here and as published."""
    here, published = style.panels(canvas, columns=2)
    for index, method in enumerate(_NAMES):
        part = frame[frame["method"] == method]
        style.curve(here, part, "batch", "error", name=method, index=index, points=True)
        style.curve(published, part, "batch", "published", name=method, index=index, points=True)
    for ax in (here, published):
        ax.set_xscale("log", base=2)
        ticks = sorted(frame["batch"].unique())
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.set_ylim(bottom=0)
        ax.legend()
    style.label(here, "here, digits", "batch size $B$", "test error (%)")
    style.label(published, "published, CIFAR-10", "batch size $B$", "test error (%)")
