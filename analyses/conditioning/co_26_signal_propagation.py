"""CO-26: the signal through a residual network, normalized, plain, and with normalized weights instead."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

import normscope as ns
from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed, equal
from normscope import weights, workbench

ID = "CO-26"
TITLE = "Signal propagation in residual networks, and how to do without normalization"
SOURCES = ("S087",)
CAPTION = (
    "Pre-activation residual CNNs (64 channels, blocks of two 3x3 convolutions, He initialization) on 64 MNIST digits "
    "of 7x7 at initialization, block by block. (a) Variance of a channel over batch and positions, mean over "
    "channels: doubled by each block without normalization, with BatchNorm larger by a constant. Scaled weight "
    "standardization with the input of a branch divided by the predicted deviation behaves as with BatchNorm, without "
    "it; (b) without the standardization the squared mean of channels grows beside the variance."
)
COLUMNS = ("network", "block", "mean", "variance")

BATCH, NONE, HE, SCALED = "BatchNorm", "none", "predicted scale", "predicted scale, standardized weights"
NETWORKS = (BATCH, NONE, HE, SCALED)
RELU_GAIN = float((2 / (1 - 1 / np.pi)) ** 0.5)  # makes the variance of ReLU(x) 1 for standard normal x


class Block(nn.Module):
    """A pre-activation block: x + branch(x / scale)."""

    def __init__(self, channels: int, scale: float, *, normalized: bool) -> None:
        """Build the parts."""
        super().__init__()
        self.scale = scale
        self.stream = nn.Identity()  # where the sum is looked at
        self.norm1 = nn.BatchNorm2d(channels) if normalized else nn.Identity()
        self.norm2 = nn.BatchNorm2d(channels) if normalized else nn.Identity()
        self.conv1, self.conv2 = (
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular", bias=False) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the stream."""
        y = self.conv1(self.norm1(x / self.scale).relu())
        added: Tensor = self.stream(x + self.conv2(self.norm2(y).relu()))
        return added


@dataclass(frozen=True)
class Setting:
    """Blocks, channels, images."""

    blocks: int = 12
    channels: int = 64
    images: int = 64


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(blocks=6, channels=16, images=32) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Examine each network at initialization."""
    images, labels = workbench.mnist()
    (images, labels), _ = workbench.split(images, labels, seed)
    small = F.avg_pool2d(images[: setting.images], 4)
    batch = (small - small.mean()) / small.std(), labels[: setting.images]
    parts = []
    for network in NETWORKS:
        torch.manual_seed(seed)
        model = _network(setting, network)
        record = ns.examine(
            model, workbench.cross_entropy, [batch], layers="*.stream", probes="moments", progress=False
        )
        frame = record.frame(index=True)
        frame = frame[frame["role"] == "value"]
        for block in range(1, setting.blocks + 1):
            own = frame[frame["site"] == f"block{block}.stream/output"]
            mean, variance = (own.loc[own["stat"] == stat, "value"].to_numpy() for stat in ("mean", "var"))
            parts.append((network, block, float(np.square(mean).mean()), float(variance.mean())))
    return pd.DataFrame(parts, columns=list(COLUMNS))


def _network(setting: Setting, network: str) -> nn.Module:
    """Build a network; the stream has unit variance after the stem, and each branch is meant to add 1."""
    predicted = network in (HE, SCALED)
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Conv2d(1, setting.channels, 3, padding=1, bias=False))
    parts["unit"] = nn.BatchNorm2d(setting.channels, affine=False)
    for block in range(1, setting.blocks + 1):
        scale = block**0.5 if predicted else 1.0
        parts[f"block{block}"] = Block(setting.channels, scale, normalized=network == BATCH)
    parts["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts["head"] = nn.Linear(setting.channels, 10)
    model = nn.Sequential(parts)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name != "stem":
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if network == SCALED:
                weights.apply(module, "scaled-standardized", gamma=RELU_GAIN)
    return model


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge doubling, linear growth, the prediction, and the shift of means."""

    def of(network: str) -> pd.DataFrame:
        found: pd.DataFrame = frame[frame["network"] == network]
        return found

    def slope(part: pd.DataFrame) -> float:
        return float(np.polyfit(part["block"], np.log2(part["variance"] + part["mean"]), 1)[0])

    def linear(part: pd.DataFrame) -> float:
        return float(np.corrcoef(part["block"], part["variance"])[0, 1] ** 2)

    def shift(part: pd.DataFrame) -> float:
        return float(part["mean"].iloc[-1] / part["variance"].iloc[-1])

    return (
        equal(
            "Without normalization each block doubles the second moment of the stream.",
            "S087, signal propagation plots",
            "slope of log2 (variance + squared mean) over blocks, none",
            by_seed(of(NONE), slope),
            1.0,
            tolerance=0.15,
            reason="Few channels: the second moment of one network wanders about the mean over networks.",
        ),
        at_least(
            "With BatchNorm the variance grows linearly.",
            "S087, signal propagation plots",
            "R² of a line through variance by block, BatchNorm",
            by_seed(of(BATCH), linear),
            0.98,
        ),
        at_least(
            "With standardized weights and predicted scales it grows linearly without BatchNorm.",
            "S087, scaled weight standardization",
            "R² of a line through variance by block",
            by_seed(of(SCALED), linear),
            0.98,
        ),
        equal(
            "The variance then is what was predicted, 1 + the number of blocks.",
            "S087, scaled weight standardization",
            "variance after the last block over 1 + blocks, standardized weights",
            by_seed(of(SCALED), lambda part: part["variance"].iloc[-1] / (1 + part["block"].iloc[-1])),
            1.0,
            tolerance=0.25,
            reason="The prediction takes inputs of ReLUs to be normal, and sums over few channels and images vary.",
        ),
        at_least(
            "Without the standardization of weights the means of channels grow beside their variances.",
            "S087, scaled weight standardization",
            "squared mean over variance after the last block, plain weights over standardized",
            [a / b for a, b in zip(by_seed(of(HE), shift), by_seed(of(SCALED), shift), strict=True)],
            3.0,
        ),
        at_most(
            "Standardized weights keep the means small.",
            "S087, scaled weight standardization",
            "squared mean over variance after the last block, standardized weights",
            by_seed(of(SCALED), shift),
            0.2,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw variance and squared mean over variance by block."""
    variance, mean = style.panels(canvas, columns=2, height=3.1)
    shown = frame.assign(shift=frame["mean"] / frame["variance"])
    for index, network in enumerate(NETWORKS):
        part = shown[shown["network"] == network]
        style.curve(variance, part, "block", "variance", name=network, index=index, points=True)
        style.curve(mean, part, "block", "shift", name=network, index=index, points=True)
    blocks = np.sort(frame["block"].unique())
    style.theory(variance, blocks, 1 + blocks, name="1 + block")
    variance.set(yscale="log", ylim=(1, 2e4))
    mean.set_yscale("log")
    variance.legend(fontsize=7)
    style.label(variance, "variance", "block", "mean variance of channels")
    style.label(mean, "shift of means", "block", "squared mean over variance")
