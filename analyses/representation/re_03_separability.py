"""RE-3: how well normalized features can be separated."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

from analyses import style
from analyses.claim import Claim, at_least, by_seed
from normscope import norms

ID = "RE-3"
TITLE = "How well normalized features can be separated"
SOURCES = ("S153",)
CAPTION = (
    "Random Gaussian features (512 samples, d = 64) with random labels, normalized within each sample in g "
    "groups, then separated by logistic regression: the training accuracy shows how much freedom the "
    "normalization leaves (0.5 is a guess). Either costs little until groups become small; past its bound g = 9.9 "
    "(red) group whitening lies below group normalization, by no more than seeds differ. At g = d/2 both leave "
    "half the dimensions."
)
COLUMNS = ("method", "groups", "accuracy")

NONE, GN, GW = "none", "group normalization", "group whitening"
_BOUND = 9.9


@dataclass(frozen=True)
class Setting:
    """The data and the fit: samples, features, numbers of groups, random labelings that are averaged, iterations."""

    samples: int = 512
    features: int = 64
    groups: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    labelings: int = 10
    iterations: int = 60


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(groups=(1, 8, 32), labelings=3, iterations=30) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Normalize and separate, no normalization under 0 groups."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(setting.samples, setting.features, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (setting.samples, setting.labelings), generator=generator).double()
    rows = [(NONE, 0, _separated(features, labels, setting.iterations))]
    for groups in setting.groups:
        for method, operation in ((GN, norms.Standardize()), (GW, norms.Whiten("zca"))):
            normalized = norms.Norm(norms.Group(groups), operation)(features)
            rows.append((method, groups, _separated(normalized, labels, setting.iterations)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _separated(features: Tensor, labels: Tensor, iterations: int) -> float:
    """Return the training accuracy of logistic regressions, one for each column of labels."""
    readout = nn.Linear(features.shape[1], labels.shape[1], dtype=features.dtype)
    nn.init.zeros_(readout.weight)
    nn.init.zeros_(readout.bias)
    optimizer = torch.optim.LBFGS(readout.parameters(), max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(readout(features), labels)
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(((readout(features) > 0) == (labels > 0.5)).double().mean())


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge what the constraints take."""

    def accuracy(part: pd.DataFrame, method: str, groups: int) -> float:
        return float(part.loc[(part["method"] == method) & (part["groups"] == groups), "accuracy"].item())

    past = int(frame.loc[frame["groups"] > _BOUND, "groups"].min())
    return (
        at_least(
            "Group whitening past its bound leaves less to separate by.",
            "S153, section 4.1",
            "training accuracy of group whitening at g = 1 less that at the first g past its bound",
            by_seed(frame, lambda part: accuracy(part, GW, 1) - accuracy(part, GW, past)),
            0.02,
            reason="most dimensions are still free; even losing half of them, at g = 32, costs only 0.04",
        ),
        at_least(
            "For equal groups group whitening constrains more than group normalization.",
            "S153, section 4.1",
            "training accuracy of group normalization less that of group whitening at that g",
            by_seed(frame, lambda part: accuracy(part, GN, past) - accuracy(part, GW, past)),
            0.02,
            reason="the difference is there, but half a point: fewer free dimensions cost a linear readout little",
        ),
        at_least(
            "With few groups either costs little.",
            "S153, section 4.1",
            "the lesser training accuracy of both at g = 1 less that without normalization",
            by_seed(frame, lambda part: min(accuracy(part, m, 1) for m in (GN, GW)) - accuracy(part, NONE, 0)),
            -0.02,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the training accuracy by number of groups."""
    (ax,) = style.panels(canvas)
    for index, method in enumerate((GN, GW)):
        part = frame[frame["method"] == method]
        style.curve(ax, part, "groups", "accuracy", name=method, index=index, points=True)
    ax.axhline(frame.loc[frame["method"] == NONE, "accuracy"].median(), color=style.color(2), ls=":", label=NONE)
    style.limit(ax, _BOUND, "bound of group whitening")
    ax.set_xscale("log", base=2)
    ticks = sorted(set(frame["groups"]) - {0})
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.legend(loc="lower left")
    style.label(ax, "", "groups $g$", "training accuracy on random labels")
