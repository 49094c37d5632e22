"""AP-4: sparse gains tell which channels a network can do without."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from normscope import applications, workbench

ID = "AP-4"
TITLE = "Sparse gains tell which channels a network can do without"
SOURCES = ("liu2017",)
CAPTION = (
    "Perceptrons (784-128-128-10) trained with a penalty λ Σ|γ| on the gains of BatchNorm (γ = 0.5 at first). (a) "
    "The larger λ, the more gains are zero. (b) Accuracy when the channels of the smallest gains are pruned, "
    "without training afterwards: with λ = 0.01 seven of ten can go at next to no cost, without a penalty hardly "
    "two."
)
COLUMNS = ("strength", "kind", "x", "value")

_HISTOGRAM, _PRUNED, _SPARSE = "histogram", "pruned", "sparse"
_NEAR = 0.01


@dataclass(frozen=True)
class Setting:
    """What is trained: width, examples, passes over the data, penalties, fractions pruned, bins."""

    width: int = 128
    examples: int = 4000
    epochs: int = 12
    strengths: tuple[float, ...] = (0.0, 1e-3, 3e-3, 1e-2)
    fractions: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    bins: int = 40
    largest: float = 1.0


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(examples=1000, epochs=6, strengths=(0.0, 1e-2), fractions=(0.0, 0.5, 0.7)) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train with each penalty; keep the histogram of gains, the share near zero, and the accuracy when pruned."""
    train, test = workbench.digits(seed, setting.examples)
    rows: list[tuple[object, ...]] = []
    for strength in setting.strengths:
        model = _trained(setting, train, strength, seed)
        gains = torch.cat([*applications.gains(model).values()]).numpy()
        counts, edges = np.histogram(gains.clip(max=setting.largest), setting.bins, (0, setting.largest))
        centers = (edges[:-1] + edges[1:]) / 2
        rows += [(strength, _HISTOGRAM, x, share) for x, share in zip(centers, counts / gains.size, strict=True)]
        rows.append((strength, _SPARSE, _NEAR, float((gains < _NEAR).mean())))
        for fraction in setting.fractions:
            pruned = applications.prune(model, fraction) if fraction else model
            rows.append((strength, _PRUNED, fraction, workbench.evaluate(pruned, [test])))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _trained(setting: Setting, train: tuple[Tensor, Tensor], strength: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = workbench.mlp((784, setting.width, setting.width, 10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.constant_(module.weight, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    batches = workbench.batches(*train, 64, torch.Generator().manual_seed(seed))
    for _, (inputs, targets) in zip(range(setting.epochs * (len(train[0]) // 64)), batches, strict=False):
        optimizer.zero_grad()
        torch.autograd.backward(workbench.cross_entropy(model(inputs), targets))
        applications.add_sparsity(model, strength)
        optimizer.step()
    return model


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge sparsity, and what it allows."""
    strongest = frame["strength"].max()

    def value(part: pd.DataFrame, strength: float, kind: str, x: float) -> float:
        own = part[(part["strength"] == strength) & (part["kind"] == kind) & np.isclose(part["x"], x)]
        return float(own["value"].item())

    def sparse(part: pd.DataFrame) -> np.ndarray:
        return np.diff(part.loc[part["kind"] == _SPARSE, "value"])

    return (
        at_least(
            "The larger the penalty, the more gains are near zero.",
            "liu2017, figure 4",
            f"smallest rise of the share of gains below {_NEAR} from one penalty to the next",
            by_seed(frame, lambda part: float(sparse(part).min())),
            0.0,
        ),
        at_least(
            "A strong penalty makes most channels dispensable.",
            "liu2017, section 4",
            f"share of gains below {_NEAR} with the strongest penalty",
            by_seed(frame, lambda part: value(part, strongest, _SPARSE, _NEAR)),
            0.5,
        ),
        at_most(
            "Of a network trained with the penalty, 70 % of the channels can be pruned at little cost.",
            "liu2017, table 1",
            "accuracy before less after pruning 70 %, strongest penalty, no training afterwards",
            by_seed(frame, lambda part: value(part, strongest, _PRUNED, 0.0) - value(part, strongest, _PRUNED, 0.7)),
            0.02,
            reason="in one seed less than 70 % of the gains are zero",
        ),
        at_least(
            "Without the penalty pruning as many ruins it.",
            "liu2017, section 4",
            "accuracy before less after pruning 70 %, no penalty",
            by_seed(frame, lambda part: value(part, 0.0, _PRUNED, 0.0) - value(part, 0.0, _PRUNED, 0.7)),
            0.3,
        ),
        at_most(
            "The penalty costs little accuracy.",
            "liu2017, table 1",
            "accuracy without penalty less that with the strongest",
            by_seed(frame, lambda part: value(part, 0.0, _PRUNED, 0.0) - value(part, strongest, _PRUNED, 0.0)),
            0.02,
            reason="a network of 256 units needs a penalty a hundred times that of the paper to become sparse",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the histograms, and accuracy by fraction pruned."""
    histogram, pruned = style.panels(canvas, columns=2)
    for index, (strength, part) in enumerate(frame.groupby("strength")):
        name = f"λ = {strength:g}"
        style.curve(histogram, part[part["kind"] == _HISTOGRAM], "x", "value", name=name, index=index)
        style.curve(pruned, part[part["kind"] == _PRUNED], "x", "value", name=name, index=index, points=True)
    histogram.set_yscale("symlog", linthresh=0.02)
    histogram.set_yticks([0, 0.01, 0.02, 0.1, 0.5], ["0", "0.01", "0.02", "0.1", "0.5"])
    histogram.set_ylim(bottom=0)
    for ax in (histogram, pruned):
        ax.legend()
    pruned.set_ylim(0, 1.02)
    style.label(histogram, "gains after training", "$|\\gamma|$", "share of channels")
    style.label(pruned, "pruned without training afterwards", "fraction of channels pruned", "test accuracy")
