"""CO-14: means and deviations of channels by depth at initialization, and which class a network prefers there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import nn

import normscope as ns
from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.conditioning.network import digits, perceptron
from normscope import workbench

ID = "CO-14"
TITLE = "Without normalization channels of a deep network drift off, and all inputs get one class"
SOURCES = ("S135",)
CAPTION = (
    "ReLU perceptrons with 12 hidden layers of 64 at initialization (He), 1024 MNIST digits. (a) Root mean square over "
    "channels of the mean of a layer's linear output, over the mean deviation. (b) Share of the inputs by predicted "
    "class, classes sorted: without normalization nearly all get the same. (c) So the gradient at the output of a "
    "class has one sign for all samples: |mean| over mean |·| of ∂L/∂(logit) of the preferred class."
)
COLUMNS = ("network", "quantity", "index", "value")

NORMS: Final = {"none": None, "BatchNorm": nn.BatchNorm1d}
OFFSET, SHARE, SIGN, BIAS = "offset of channels", "share of class", "one-sided gradient", "largest gradient of biases"


@dataclass(frozen=True)
class Setting:
    """Network and samples."""

    width: int = 64
    depth: int = 12
    images: int = 1024


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(width=32, images=256) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Examine both networks at initialization."""
    (images, labels), _ = digits(seed)
    batch = images[: setting.images], labels[: setting.images]
    rows: list[tuple[str, str, int, float]] = []
    for network, norm in NORMS.items():
        model = perceptron((784, *[setting.width] * setting.depth, 10), norm, seed)
        rows += [(network, OFFSET, layer, value) for layer, value in enumerate(_offsets(model, batch), start=1)]
        logits = model(batch[0])
        counts = np.sort(np.bincount(logits.argmax(1).numpy(), minlength=10))[::-1] / setting.images
        rows += [(network, SHARE, place, share) for place, share in enumerate(counts, start=1)]
        slopes = torch.autograd.grad(workbench.cross_entropy(logits, batch[1]), logits, retain_graph=True)[0]
        one = slopes[:, int(logits.sum(0).argmax())]
        rows.append((network, SIGN, 0, float(one.mean().abs() / one.abs().mean())))
        biases = [weight for name, weight in model.named_parameters() if name.endswith("linear.bias")]
        loss = workbench.cross_entropy(logits, batch[1])
        largest = max(float(slope.abs().max()) for slope in torch.autograd.grad(loss, biases))
        rows.append((network, BIAS, 0, largest))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _offsets(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    """Return of each linear layer the rms over channels of the mean over the mean deviation."""
    record = ns.examine(model, workbench.cross_entropy, [batch], layers=nn.Linear, probes="moments", progress=False)
    frame = record.frame(index=True)
    frame = frame[(frame["role"] == "value") & frame["site"].str.endswith("/output")]
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            own = frame[frame["site"] == f"{name}/output"]
            mean, variance = (own.loc[own["stat"] == stat, "value"].to_numpy() for stat in ("mean", "var"))
            found.append(float(np.sqrt(np.square(mean).mean()) / np.sqrt(variance).mean()))
    return found


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge offsets, preferred classes, one-sided gradients, and that biases before BatchNorm have none."""

    def values(network: str, quantity: str) -> pd.DataFrame:
        return frame[(frame["network"] == network) & (frame["quantity"] == quantity)]

    def one(network: str, quantity: str) -> list[float]:
        return by_seed(values(network, quantity), lambda part: part["value"].iloc[0])

    def last(network: str) -> list[float]:
        return by_seed(values(network, OFFSET), lambda part: part["value"].iloc[-1] / part["value"].iloc[0])

    return (
        at_least(
            "Without normalization the means of channels grow with depth, beside their deviations.",
            "S135, learning rates and divergence",
            "rms of channel means over mean deviation, last layer over first, none",
            last("none"),
            2.0,
        ),
        at_most(
            "With BatchNorm the means of channels do not grow with depth.",
            "S135, learning rates and divergence",
            "rms of channel means over mean deviation, last layer over first, BatchNorm",
            last("BatchNorm"),
            1.5,
        ),
        at_least(
            "Without normalization a deep network gives nearly all inputs the same class at initialization.",
            "S135, gradients at initialization",
            "share of the most frequent predicted class, none",
            one("none", SHARE),
            0.8,
        ),
        at_most(
            "With BatchNorm no class is that frequent.",
            "S135, gradients at initialization",
            "share of the most frequent predicted class, BatchNorm",
            one("BatchNorm", SHARE),
            0.5,
        ),
        at_least(
            "Without normalization the gradient at the preferred logit is one-sided.",
            "S135, gradients at initialization",
            "|mean|/mean |·| of the gradient at the preferred logit, none less BatchNorm",
            [a - b for a, b in zip(one("none", SIGN), one("BatchNorm", SIGN), strict=True)],
            0.0,
        ),
        at_most(
            "A bias before BatchNorm has no gradient.",
            "ioffe2015, section 3.2",
            "largest |∂L/∂bias| of hidden layers, BatchNorm over none",
            [a / b for a, b in zip(one("BatchNorm", BIAS), one("none", BIAS), strict=True)],
            1e-4,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw offsets by layer, shares of classes, and how one-sided the gradient is."""
    offset, share, sign = style.panels(canvas, columns=3)
    for index, network in enumerate(NORMS):
        part = frame[frame["network"] == network]
        own = part[part["quantity"] == OFFSET]
        style.curve(offset, own, "index", "value", name=network, index=index, points=True)
        shares = part[part["quantity"] == SHARE].groupby("index")["value"]
        spread = np.stack([shares.median() - shares.min(), shares.max() - shares.median()])
        share.bar(
            shares.median().index + 0.4 * (index - 0.5),
            shares.median(),
            yerr=spread,
            width=0.4,
            color=style.color(index),
            label=network,
            error_kw={"linewidth": 0.7},
        )
        values = part.loc[part["quantity"] == SIGN, "value"]
        ends = [[values.median() - values.min()], [values.max() - values.median()]]
        sign.bar(network, values.median(), yerr=ends, color=style.color(index), width=0.6, error_kw={"linewidth": 0.8})
    offset.set_xticks(range(1, int(frame["index"].max()) + 1, 2))
    share.set_xticks(range(1, 11))
    sign.set_ylim(0, 1.05)
    for ax in (offset, share):
        ax.legend()
    style.label(offset, "channels", "layer", "rms of means over mean deviation")
    style.label(share, "predicted classes", "class, by frequency", "share of inputs")
    style.label(sign, "gradient of the preferred logit", "", "|mean| over mean |·|")
