"""SI-18: normalization as a projection onto spheres, and training on one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.scale.network import digits, invariant_mlp, squared_norm, weights
from normscope import gradients, norms, workbench

ID = "SI-18"
TITLE = "Normalization puts activations on spheres, and weights can be trained on one"
SOURCES = ("S115", "S114")
CAPTION = (
    "(a) Length of the entries that share statistics, over √m, before and after normalization of a random activation "
    "(16 examples, 8 channels, 6 × 6 places): all end on one sphere, each point a row of an area. (b) Norm and (c) "
    "loss of a perceptron (784-64-64-64-10, BatchNorm, float64, batch 128) trained by SGD (η = 0.1), where the norm "
    "grows, and along geodesics of the unit sphere of each row (η = 0.3, about the same first step), where it cannot."
)
COLUMNS = ("part", "method", "at", "before", "after")

SPHERE, NORM, LOSS = "sphere", "norm", "loss"
SGD, GEODESIC = "SGD", "on the sphere"
_AREAS = {
    "batch": norms.Batch(),
    "layer": norms.Layer(),
    "instance": norms.Instance(),
    "group": norms.Group(4),
}


@dataclass(frozen=True)
class Setting:
    """What is trained: layer sizes, batch size, rates of SGD and on the sphere, steps, and how many are kept."""

    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    batch: int = 128
    sgd: float = 0.1
    sphere: float = 0.3
    steps: int = 400
    kept: int = 50


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(784, 16, 16, 10), steps=100) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Normalize an activation over each area, and train by both optimizers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 8, 6, 6, generator=generator, dtype=torch.float64)
    x = x * (1 + torch.rand(16, 8, 1, 1, generator=generator, dtype=torch.float64)) + 0.5
    operation = norms.Standardize(1e-12)
    rows: list[tuple[str, str, float, float, float]] = []
    for name, area in _AREAS.items():
        view = area.view(x)
        pairs = zip(_lengths(view), _lengths(operation.apply(view, operation.measure(view))), strict=True)
        rows += [(SPHERE, name, float(place), *pair) for place, pair in enumerate(list(pairs)[:32])]
    for name in (SGD, GEODESIC):
        rows += _trained(setting, name, seed)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _lengths(view: torch.Tensor) -> list[float]:
    """Return the length of each row over the root of its number of samples."""
    lengths: list[float] = (view.norm(dim=-1) / view.shape[-1] ** 0.5).flatten().tolist()
    return lengths


def _trained(setting: Setting, name: str, seed: int) -> list[tuple[str, str, float, float, float]]:
    train, _ = digits(seed)
    torch.manual_seed(seed)
    model = invariant_mlp(setting.sizes)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(weights(model), lr=setting.sgd)
        if name == SGD
        else gradients.GrassmannSGD(weights(model), lr=setting.sphere, momentum=0.0, max_norm=None)
    )
    found = []

    def on_step(step: int, loss: float) -> None:
        if step % (setting.steps // setting.kept) == 0 or step == setting.steps - 1:
            found.append((NORM, name, float(step), np.nan, squared_norm(model) ** 0.5))
            found.append((LOSS, name, float(step), np.nan, loss))

    batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
    workbench.fit(
        model, optimizer, batches, workbench.cross_entropy, steps=setting.steps, on_step=on_step, progress=False
    )
    return found


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that activations lie on spheres, that norms grow, and that training on the sphere works."""
    sphere = frame[frame["part"] == SPHERE]

    def last(part: str, method: str) -> list[float]:
        shown = frame[(frame["part"] == part) & (frame["method"] == method)]
        return by_seed(shown, lambda rows: rows["after"].iloc[-1])

    def change(method: str) -> list[float]:
        shown = frame[(frame["part"] == NORM) & (frame["method"] == method)]
        return by_seed(shown, lambda rows: rows["after"].iloc[-1] / rows["after"].iloc[0] - 1)

    return (
        *(
            at_most(
                f"{name.capitalize()} normalization puts its rows on the sphere of radius √m.",
                "S115, unified framework",
                "largest |‖row‖ / √m - 1|",
                by_seed(sphere[sphere["method"] == name], lambda rows: (rows["after"] - 1).abs().max()),
                1e-9,
            )
            for name in _AREAS
        ),
        at_least(
            "Training with normalization makes the norm of weights grow.",
            "S115, norm of weights",
            "last norm over the first, less 1, under SGD",
            change(SGD),
            0.01,
        ),
        at_most(
            "On the sphere the norm stays.",
            "S115, optimization on a sphere",
            "|last norm over the first - 1|, geodesic steps",
            list(map(abs, change(GEODESIC))),
            1e-6,
        ),
        at_most(
            "Training on the sphere works as well as SGD.",
            "S115, optimization on a sphere",
            "last loss on the sphere over that of SGD",
            [own / other for own, other in zip(last(LOSS, GEODESIC), last(LOSS, SGD), strict=True)],
            1.1,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw lengths of rows, norms and losses."""
    lengths, sizes, losses = style.panels(canvas, columns=3)
    for index, name in enumerate(_AREAS):
        rows = frame[(frame["part"] == SPHERE) & (frame["method"] == name)]
        place = index + 0.02 * (rows["at"] - 16)
        before, after = "before" if index == 0 else "", "after" if index == 0 else ""
        lengths.plot(place, rows["before"], ".", color=style.color(5), markersize=3, alpha=0.5, label=before)
        lengths.plot(place, rows["after"], style.MARKERS[index], color=style.color(index), markersize=3, label=after)
    lengths.set_xticks(range(len(_AREAS)), list(_AREAS))
    for ax, part in ((sizes, NORM), (losses, LOSS)):
        for index, name in enumerate((SGD, GEODESIC)):
            rows = frame[(frame["part"] == part) & (frame["method"] == name)]
            if part == NORM:
                rows = rows.assign(after=rows["after"] / rows.groupby("seed")["after"].transform("first"))
            style.curve(ax, rows, "at", "after", name=name, index=index)
    for ax in (lengths, sizes, losses):
        ax.legend()
    style.label(lengths, "rows of activations", "normalization", r"$\|x\|/\sqrt{m}$")
    style.label(sizes, "norm of weights", "step $t$", r"$\|w_t\|/\|w_0\|$ of all hidden weights")
    style.label(losses, "loss", "step $t$", "training loss (nats)")
