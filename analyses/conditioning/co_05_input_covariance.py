"""CO-5: correlations and eigenvalues of a layer's input under standardization and whitening."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed, equal
from analyses.conditioning.network import digits
from normscope import norms

ID = "CO-5"
TITLE = "What centering, standardizing and whitening do to the input of a layer"
SOURCES = ("S130", "lecun1998", "S131")
CAPTION = (
    "64 random ReLU features of 1024 MNIST digits. Correlations (absolute) of the first 24 features: BatchNorm (b) "
    "leaves them as (a) they were, whitening in groups of 16 (c) takes those within groups away, whitening (d) all. "
    "(e) Eigenvalues of the second moment: a mean that is not zero costs one large eigenvalue, and their spread is "
    "what (f) gradient descent with step 1/λmax pays for when a linear layer is fitted to the labels (excess loss; "
    "whitened, one step is enough)."
)
COLUMNS = ("method", "quantity", "row", "column", "value")

PLAIN, CENTERED, BN, GROUPS, ZCA = "plain", "centered", "BatchNorm", "ZCA, groups of 16", "ZCA"
METHODS = (PLAIN, CENTERED, BN, GROUPS, ZCA)
_EPS = 1e-7


@dataclass(frozen=True)
class Setting:
    """Features, samples, how many features are shown, steps of gradient descent."""

    features: int = 64
    samples: int = 1024
    shown: int = 24
    steps: int = 1000
    kept: tuple[int, ...] = (0, 1, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100, 200, 300, 500, 700, 1000)


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(samples=512, shown=8) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Normalize the features by each method; correlations, eigenvalues, and the loss of a linear fit by step."""
    (images, labels), _ = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(setting.features, 784, generator=generator, dtype=torch.float64) / 784**0.5
    features = (images[: setting.samples].double() @ weight.T).relu()
    targets = torch.nn.functional.one_hot(labels[: setting.samples], 10).double()
    rows: list[tuple[str, str, int, int, float]] = []
    for method in METHODS:
        x = _normalized(method, features)
        correlation = torch.corrcoef(x.T).abs().numpy()
        np.fill_diagonal(correlation, np.nan)
        rows.append((method, "mean correlation", 0, 0, float(np.nanmean(correlation))))
        shown = range(setting.shown)
        rows += [(method, "correlation", i, j, correlation[i, j]) for i in shown for j in shown if i < j]
        moment = (x.T @ x / len(x)).numpy()
        values = np.linalg.eigvalsh(moment)[::-1]
        rows += [(method, "eigenvalue", i, 0, value) for i, value in enumerate(values, start=1)]
        share = float(x.mean(0).square().sum() / values[0])
        rows.append((method, "‖mean‖²/λ1", 0, 0, share))
        for step, loss in zip(setting.kept, _excess(x, targets, values[0], setting), strict=True):
            rows.append((method, "excess loss", step, 0, loss))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _normalized(method: str, features: torch.Tensor) -> torch.Tensor:
    count = features.shape[1]
    if method == PLAIN:
        return features
    if method == CENTERED:
        return features - features.mean(0)
    name, groups = {BN: ("bn", 1), GROUPS: ("dbn", count // 16), ZCA: ("dbn", 1)}[method]
    norm = norms.build(name, count, eps=_EPS, affine=False, groups=groups).double()
    normalized: torch.Tensor = norm(features)
    return normalized


def _excess(x: torch.Tensor, targets: torch.Tensor, largest: float, setting: Setting) -> list[float]:
    """Return the loss over the least one, over that at the start, after each kept number of steps."""
    centered = targets - targets.mean(0)
    best = torch.linalg.lstsq(x, centered).solution
    apart = -best
    moment = x.T @ x / len(x)
    losses = []
    for step in range(setting.steps + 1):
        if step in setting.kept:
            losses.append(float((apart * (moment @ apart)).sum()))
        apart = apart - moment @ apart / largest
    return [max(loss / losses[0], 1e-16) for loss in losses]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge correlations, condition numbers, and the eigenvalue of the mean."""

    def values(method: str, quantity: str) -> pd.DataFrame:
        return frame[(frame["method"] == method) & (frame["quantity"] == quantity)]

    def one(method: str, quantity: str) -> list[float]:
        return by_seed(values(method, quantity), lambda part: part["value"].iloc[0])

    def condition(method: str) -> list[float]:
        return by_seed(values(method, "eigenvalue"), lambda part: part["value"].max() / part["value"].min())

    def late(method: str) -> list[float]:
        return by_seed(values(method, "excess loss"), lambda part: part.loc[part["row"] == 100, "value"].iloc[0])

    return (
        equal(
            "The eigenvalue that stands out belongs to the mean of the inputs.",
            "S130, spectrum of the covariance",
            "‖mean‖² over the largest eigenvalue of the second moment",
            one(PLAIN, "‖mean‖²/λ1"),
            1.0,
            tolerance=0.1,
        ),
        at_least(
            "Centering improves the condition number.",
            "S130, spectrum of the covariance",
            "condition number, plain over centered",
            [a / b for a, b in zip(condition(PLAIN), condition(CENTERED), strict=True)],
            2.0,
        ),
        equal(
            "BatchNorm leaves correlations as they are.",
            "S131, standardization and whitening",
            "mean absolute correlation, BatchNorm less plain",
            [a - b for a, b in zip(one(BN, "mean correlation"), one(PLAIN, "mean correlation"), strict=True)],
            0.0,
            tolerance=1e-9,
        ),
        at_most(
            "Whitening takes them away.",
            "S131, standardization and whitening",
            "mean absolute correlation, ZCA",
            one(ZCA, "mean correlation"),
            1e-4,
        ),
        equal(
            "Whitening makes the layer perfectly conditioned.",
            "S131, standardization and whitening",
            "condition number, ZCA",
            condition(ZCA),
            1.0,
            tolerance=1e-3,
        ),
        at_least(
            "Whitening in groups lies between.",
            "S131, standardization and whitening",
            "condition number, BatchNorm over groups of 16",
            [a / b for a, b in zip(condition(BN), condition(GROUPS), strict=True)],
            1.2,
        ),
        at_most(
            "The better conditioned, the faster gradient descent fits a linear layer.",
            "lecun1998, convergence of gradient descent",
            "excess loss after 100 steps, largest ratio of a method to the one before it in the order of the figure",
            [max(b / a for a, b in pairwise(run)) for run in zip(*map(late, METHODS), strict=True)],
            1.0,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw four correlation matrices, eigenvalues and excess losses."""
    axes = style.panels(canvas, columns=3, rows=2, height=2.6)
    first = frame[(frame["seed"] == frame["seed"].min()) & (frame["quantity"] == "correlation")]
    for ax, method in zip(axes, (PLAIN, BN, GROUPS, ZCA), strict=False):
        part = first[first["method"] == method].pivot_table(index="row", columns="column", values="value")
        size = len(part) + 1
        full = part.reindex(index=range(size), columns=range(size)).fillna(0).to_numpy()
        ax.imshow(full + full.T + np.eye(size), cmap="Blues", vmin=0, vmax=0.8)
        ax.set(xticks=(), yticks=())
        ax.grid(visible=False)
        style.label(ax, method, "feature", "feature")
    canvas.colorbar(axes[0].images[0], ax=axes[2], label="|correlation|", fraction=0.05)
    spectrum, descent = axes[4:]
    for index, method in enumerate(METHODS):
        part = frame[frame["method"] == method]
        style.curve(spectrum, part[part["quantity"] == "eigenvalue"], "row", "value", name=method, index=index)
        losses = part[(part["quantity"] == "excess loss") & (part["row"] > 0)]
        style.curve(descent, losses, "row", "value", name=method, index=index)
    spectrum.set(yscale="log", ylim=(5e-3, 500))
    spectrum.legend(fontsize=7, ncols=2, loc="upper right", columnspacing=1, handlelength=1.5)
    descent.set(xscale="log", yscale="log", ylim=(1e-4, 1.2))
    style.label(spectrum, "eigenvalues of the second moment", "index", r"$\lambda_i$")
    style.label(descent, "linear fit by gradient descent", "step", "excess loss over that at start")
