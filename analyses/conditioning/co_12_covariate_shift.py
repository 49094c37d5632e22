"""CO-12: internal covariate shift, as the change of a layer's gradient when the layers before it are updated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.conditioning.network import digits, perceptron
from normscope import workbench

ID = "CO-12"
TITLE = "Batch normalization does not reduce internal covariate shift"
SOURCES = ("santurkar2018",)
CAPTION = (
    "Cosine between the gradient G of a layer and the gradient G' of the same batch once the layers before it have "
    "made their step: 1 is no internal covariate shift. Perceptrons on MNIST, SGD, η = 0.1, batches of 128; mean over "
    "layers from the second to the last hidden one. (a) 6 hidden layers, torch's initialization; (b) 10 hidden layers, "
    "He initialization; (c) training loss. In (a) the plain network sits on a plateau, where nothing shifts, while the "
    "one with BatchNorm shifts and trains; in (b) the one with BatchNorm shifts less."
)
COLUMNS = ("network", "step", "loss", "cosine", "distance")

SHALLOW, DEEP = "6 layers, torch init.", "10 layers, He init."
NORMS: Final = {"none": None, "BatchNorm": nn.BatchNorm1d}


@dataclass(frozen=True)
class Setting:
    """Training and how often the shift is measured, at how many layers."""

    width: int = 64
    depths: tuple[int, int] = (6, 10)
    lr: float = 0.1
    batch: int = 128
    steps: int = 400
    every: int = 10
    layers: int = 3


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(width=32, depths=(4, 5), steps=60) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train four networks, and measure the shift between a step and the next."""
    train, _ = digits(seed)
    rows = []
    for name, depth in zip((SHALLOW, DEEP), setting.depths, strict=True):
        for network, norm in NORMS.items():
            sizes = (784, *[setting.width] * depth, 10)
            torch.manual_seed(seed)
            model = workbench.mlp(sizes, norm) if name == SHALLOW else perceptron(sizes, norm, seed)
            optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr)
            batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
            for step, batch in zip(range(setting.steps), batches, strict=False):
                if step % setting.every:
                    workbench.fit(model, optimizer, [batch], workbench.cross_entropy, steps=1, progress=False)
                else:
                    values = _shift(model, batch, setting)
                    rows.append((f"{name}: {network}", step, *values))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _shift(model: nn.Sequential, batch: tuple[Tensor, Tensor], setting: Setting) -> tuple[float, float, float]:
    """Make a step layer by layer; return loss, mean cosine and mean ‖G - G'‖/‖G‖ over some layers."""
    groups = [list(layer.parameters()) for layer in model.children() if list(layer.parameters())]
    loss = workbench.cross_entropy(model(batch[0]), batch[1])
    weights = [p for group in groups for p in group]
    slopes = iter(torch.autograd.grad(loss, weights))
    gradients = [[next(slopes) for _ in group] for group in groups]
    count = len(groups) - 2
    measured = {1 + round(i * (count - 1) / (setting.layers - 1)) for i in range(setting.layers)}
    cosines, distances = [], []
    for index, (group, gradient) in enumerate(zip(groups, gradients, strict=True)):
        if index in measured:
            shifted = torch.autograd.grad(workbench.cross_entropy(model(batch[0]), batch[1]), group[0])[0]
            before = gradient[0]
            cosines.append(float(nn.functional.cosine_similarity(before.flatten(), shifted.flatten(), 0)))
            distances.append(float((before - shifted).norm() / before.norm()))
        with torch.no_grad():
            for weight, slope in zip(group, gradient, strict=True):
                weight.sub_(setting.lr * slope)
    return float(loss.detach()), sum(cosines) / len(cosines), sum(distances) / len(distances)


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge whether BatchNorm reduces the shift."""

    def difference(part: pd.DataFrame, name: str, column: str) -> float:
        means = part.groupby("network")[column].mean()
        return float(means[f"{name}: BatchNorm"] - means[f"{name}: none"])

    def better(part: pd.DataFrame, name: str) -> float:
        late = part[part["step"] > part["step"].max() * 0.75].groupby("network")["loss"].mean()
        return float(late[f"{name}: none"] / late[f"{name}: BatchNorm"])

    statistic = "mean cosine of G and G' over steps and layers, BatchNorm less none"
    return (
        at_most(
            "BatchNorm does not reduce internal covariate shift: it may even raise it.",
            "santurkar2018, section 2.2",
            f"{statistic}, {SHALLOW}",
            by_seed(frame, lambda part: difference(part, SHALLOW, "cosine")),
            0.0,
        ),
        at_most(
            "BatchNorm does not reduce the shift by much in a deeper network either.",
            "santurkar2018, section 2.2",
            f"{statistic}, {DEEP}",
            by_seed(frame, lambda part: difference(part, DEEP, "cosine")),
            0.2,
            reason="Without BatchNorm the gradient of the deep network turns far at each step (CO-9), with the layers "
            "before it.",
        ),
        at_least(
            "The network with BatchNorm trains better all the same.",
            "santurkar2018, section 2.2",
            f"mean training loss of the last quarter, none over BatchNorm, {SHALLOW}",
            by_seed(frame, lambda part: better(part, SHALLOW)),
            2.0,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw cosines of both networks, and losses."""
    axes = style.panels(canvas, columns=3)
    for ax, name in zip(axes, (SHALLOW, DEEP), strict=False):
        for index, network in enumerate(NORMS):
            part = frame[frame["network"] == f"{name}: {network}"]
            style.curve(ax, part, "step", "cosine", name=network, index=index)
        ax.set_ylim(-0.6, 1.05)
        ax.legend()
        style.label(ax, name, "step $t$", r"$\cos(G, G')$")
    for index, network in enumerate(frame["network"].unique()):
        style.curve(axes[2], frame[frame["network"] == network], "step", "loss", name=network, index=index)
    axes[2].set(yscale="log", ylim=(None, 100))
    axes[2].legend(fontsize=6.5)
    style.label(axes[2], "loss", "step $t$", "training loss (nats)")
