"""AS-1: what associate normalization adds in parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_most, by_seed, equal
from normscope import norms

ID = "AS-1"
TITLE = "What associate normalization adds in parameters"
SOURCES = ("S244",)
CAPTION = (
    "Parameters that associate normalization adds to ResNets for ImageNet, in percent of those that they have, on "
    "group normalization (32 groups, 2 hidden units) and on instance normalization (a group a channel, a "
    "sixteenth hidden): counted from the layers here (bars) and as published (crosses). All ten numbers of the "
    "table agree."
)
COLUMNS = ("base", "depth", "layers", "parameters", "added", "ratio", "published")

GROUP, INSTANCE = "group", "instance"
_BLOCKS: Final = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_PUBLISHED: Final = {GROUP: (0.03, 0.03, 0.04, 0.04, 0.05), INSTANCE: (2.79, 2.46, 20.70, 20.31, 20.18)}
# torchvision's counts, weights and affine maps
_KNOWN: Final = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


@dataclass(frozen=True)
class Setting:
    """Which networks: their depths."""

    depths: tuple[int, ...] = (18, 34, 50, 101, 152)


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(depths=(18, 34)) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Build each layer that the networks have, and count."""
    rows = []
    extra: dict[tuple[str, int], int] = {}
    for depth in setting.depths:
        channels, parameters = _resnet(depth)
        for base, published in _PUBLISHED.items():
            for width in {*channels}:
                if (base, width) not in extra:
                    layer = norms.build("associate", width, base=base)
                    extra[base, width] = sum(parameter.numel() for parameter in layer.parameters()) - 2 * width
            added = sum(extra[base, width] for width in channels)
            value = published[list(_BLOCKS).index(depth)]
            rows.append((base, depth, len(channels), parameters, added, 100 * added / parameters, value))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _resnet(depth: int) -> tuple[list[int], int]:
    """Return the channels of each normalization layer of a ResNet for 1000 classes, and its number of parameters."""
    bottleneck = depth >= 50
    norm_layers, weights, inputs = [64], 7 * 7 * 3 * 64, 64
    for stage, count in enumerate(_BLOCKS[depth]):
        width = 64 * 2**stage
        outputs = 4 * width if bottleneck else width
        for block in range(count):
            inner = ((inputs, width, 1), (width, width, 3), (width, outputs, 1))
            plain = ((inputs, width, 3), (width, width, 3))
            convolutions = [*(inner if bottleneck else plain)]
            if block == 0 and inputs != outputs:
                convolutions.append((inputs, outputs, 1))
            weights += sum(before * after * size * size for before, after, size in convolutions)
            norm_layers += [after for _, after, _ in convolutions]
            inputs = outputs
    return norm_layers, weights + 2 * sum(norm_layers) + (inputs + 1) * 1000


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge each number of the table, to its two decimals, and the counts that it stands on."""
    counts = at_most(
        "The networks counted are those of ImageNet.",
        "S244, table 4",
        "largest |parameters - known parameters|",
        by_seed(frame, lambda part: float((part["parameters"] - part["depth"].map(_KNOWN)).abs().max())),
        0.0,
    )
    return (
        counts,
        *(
            equal(
                f"On {base} normalization ResNet-{depth} grows by {published:.2f} %.",
                "S244, table 4",
                "added parameters in percent of those of the network",
                by_seed(part, lambda own: own["ratio"].item()),
                float(part["published"].iloc[0]),
                tolerance=0.005,
            )
            for (base, depth, published), part in frame.groupby(["base", "depth", "published"])
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the ratios beside the published ones."""
    first = frame[frame["seed"] == frame["seed"].min()]
    for ax, base in zip(style.panels(canvas, columns=2), _PUBLISHED, strict=True):
        part = first[first["base"] == base]
        places = np.arange(len(part))
        ax.bar(places, part["ratio"], 0.55, color=style.color(0), label="counted")
        ax.plot(places, part["published"], "x", color="black", markersize=6, label="published")
        for place, ratio in zip(places, part["ratio"], strict=True):
            ax.annotate(f"{ratio:.2f}", (place, ratio), xytext=(0, 5), textcoords="offset points", ha="center")
        ax.set_xticks(places, [f"ResNet-{depth}" for depth in part["depth"]], rotation=20)
        ax.set_ylim(0, 1.25 * part["ratio"].max())
        ax.legend(loc="upper left")
        style.label(ax, f"on {base} normalization", "", "added parameters (%)")
