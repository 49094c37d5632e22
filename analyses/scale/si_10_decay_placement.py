"""SI-10: which weights weight decay acts on, and what it does there."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, by_seed, equal, untestable
from analyses.scale.network import digits, invariant_mlp, squared_norm, weights
from normscope import workbench

ID = "SI-10"
TITLE = "Weight decay acts through the effective learning rate"
SOURCES = ("S127",)
CAPTION = (
    "SGD with momentum 0.9 (η = 0.03, batch 100) on 1000 digits, with decay λ = 2·10⁻³ on no weights, on the head "
    "alone, on the scale-invariant hidden weights alone, or on all (784-64-64-64-10, BatchNorm). (a) The effective "
    "learning rate of the hidden weights rises only where they decay; (b) test accuracies at this size lie "
    "within the spread over seeds."
)
COLUMNS = ("decayed", "epoch", "rate", "accuracy")

NONE, HEAD, HIDDEN, ALL = "none", "head", "hidden", "all"


@dataclass(frozen=True)
class Setting:
    """What is trained: layer sizes, examples, batch size, rate, decay, epochs."""

    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    examples: int = 1000
    batch: int = 100
    lr: float = 0.03
    decay: float = 2e-3
    epochs: int = 30


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(784, 32, 32, 10), examples=500, epochs=20) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train with decay in each place."""
    (images, labels), test = digits(seed)
    rows = []
    for name in (NONE, HEAD, HIDDEN, ALL):
        torch.manual_seed(seed)
        model = invariant_mlp(setting.sizes)
        hidden, head = weights(model), list(model[-1].parameters())
        for parameter in head:
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(hidden, lr=setting.lr, momentum=0.9)
        optimizer.add_param_group({"params": head})
        for group, places in zip(optimizer.param_groups, ((HIDDEN, ALL), (HEAD, ALL)), strict=True):
            group["weight_decay"] = setting.decay if name in places else 0.0
        batches = workbench.batches(
            images[: setting.examples], labels[: setting.examples], setting.batch, torch.Generator().manual_seed(seed)
        )
        for epoch in range(setting.epochs):
            steps = setting.examples // setting.batch
            workbench.fit(model, optimizer, batches, workbench.cross_entropy, steps=steps, progress=False)
            norm = squared_norm(model) - sum(float(p.detach().square().sum()) for p in head)
            rows.append((name, epoch + 1, setting.lr / norm, workbench.evaluate(model, [test])))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge where decay acts; accuracy is beyond this scale."""
    last = frame[frame["epoch"] == frame["epoch"].max()]

    def over_none(name: str, column: str) -> list[float]:
        def ratio(rows: pd.DataFrame) -> float:
            value = rows.set_index("decayed")[column]
            return float(value[name] / value[NONE])

        return by_seed(last, ratio)

    def gain(rows: pd.DataFrame) -> float:
        accuracy = rows.set_index("decayed")["accuracy"]
        return float(accuracy[HIDDEN] - accuracy[NONE])

    return (
        at_least(
            "Decay of the scale-invariant weights raises their effective learning rate.",
            "S127, first mechanism",
            "effective rate after the last epoch, decay on hidden weights over none",
            over_none(HIDDEN, "rate"),
            1.1,
        ),
        equal(
            "Decay of the head leaves the effective learning rate as it is.",
            "S127, first mechanism",
            "effective rate after the last epoch, decay on the head over none",
            over_none(HEAD, "rate"),
            1.0,
            tolerance=0.05,
        ),
        equal(
            "Decay of all weights does to the effective rate what that of the hidden weights does.",
            "S127, first mechanism",
            "effective rate after the last epoch, decay on all over decay on hidden weights",
            [every / own for every, own in zip(over_none(ALL, "rate"), over_none(HIDDEN, "rate"), strict=True)],
            1.0,
            tolerance=0.05,
        ),
        untestable(
            "Most of the gain in accuracy comes from decay of the scale-invariant weights.",
            "S127, accuracy by layer",
            "test accuracy, decay on hidden weights minus none",
            by_seed(last, gain),
            "> 0",
            reason="on 1000 digits any gain is smaller than the spread over seeds",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw effective rates by epoch, and accuracies."""
    rates, accuracies = style.panels(canvas, columns=2)
    names = (NONE, HEAD, HIDDEN, ALL)
    for index, name in enumerate(names):
        style.curve(rates, frame[frame["decayed"] == name], "epoch", "rate", name=f"decay on {name}", index=index)
    rates.legend()
    _dots(accuracies, frame[frame["epoch"] == frame["epoch"].max()], names)
    style.label(rates, "effective learning rate", "epoch", r"$\eta/\|w\|^2$, hidden weights")
    style.label(accuracies, "accuracy", "decay on", "test accuracy")


def _dots(ax: Axes, last: pd.DataFrame, names: tuple[str, ...]) -> None:
    """Draw every seed, and the median as a bar."""
    for index, name in enumerate(names):
        values = last.loc[last["decayed"] == name, "accuracy"]
        ax.plot([index] * len(values), values, style.MARKERS[index], color=style.color(index))
        ax.plot([index - 0.25, index + 0.25], [values.median()] * 2, color=style.color(index))
    ax.set(xticks=range(len(names)), xticklabels=names)
