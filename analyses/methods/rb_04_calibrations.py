"""RB-4: what the two calibrations do to feature maps, and to accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_most, by_seed, untestable
from analyses.methods.representative import BN, BOTH, KINDS, digits, inputs, layers, trained
from normscope import workbench

ID = "RB-4"
TITLE = "The two calibrations: feature maps and accuracy"
SOURCES = ("S062",)
CAPTION = (
    "(a) Three channels of the stem of a residual network with representative batch normalization, for one digit: "
    "input, after centering, after standardization and after scaling calibration, either pair on one scale of "
    "gray; centering adds the same to all pixels of a channel. (b) Test accuracy with BatchNorm, with one "
    "calibration and with both, one mark a seed: the differences are no larger than those between seeds."
)
COLUMNS = ("kind", "channel", "row", "column", "value", "accuracy", "deviation")

_PATH = "stem.norm"
_MAPS = ("input", "centered", "standardized", "scaled")


@dataclass(frozen=True)
class Setting:
    """What is trained: examples, passes over the data; channels shown."""

    examples: int = 1000
    epochs: int = 6
    channels: int = 3


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(examples=200, epochs=3) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train with each, keep the accuracy (a row a kind), and the maps of one digit (a row a pixel)."""
    _, test = digits(seed, setting.examples)
    rows: list[tuple[object, ...]] = []
    for kind in KINDS:
        model = trained(kind, seed, examples=setting.examples, epochs=setting.epochs)
        accuracy = workbench.evaluate(model, [test])
        deviation = float("nan")
        if kind == BOTH:
            maps, deviation = _maps(model, test[0][:1])
            for name, values in maps.items():
                for channel, image in enumerate(values[: setting.channels].tolist()):
                    rows += [
                        (name, channel, row, column, value, float("nan"), float("nan"))
                        for row, line in enumerate(image)
                        for column, value in enumerate(line)
                    ]
        rows.append((kind, -1, -1, -1, float("nan"), accuracy, deviation))
    return pd.DataFrame(rows, columns=list(COLUMNS))


@torch.no_grad()
def _maps(model: torch.nn.Module, image: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """Return the maps by equations 5 to 7, and how far the layer is from them, over its largest output."""
    layer = layers(model)[_PATH]
    held = {name: value[None, :, None, None] for name, value in layer.state_dict().items() if value.ndim == 1}
    x = inputs(model, _PATH, image)
    centered = x + held["center_weight"] * x.mean((2, 3), keepdim=True)
    standardized = (centered - held["running_mean"]) * (held["running_var"] + layer.eps).rsqrt()
    gate = torch.sigmoid(held["scale_weight"] * standardized.mean((2, 3), keepdim=True) + held["scale_bias"])
    scaled = standardized * gate
    own = layer(x)
    deviation = (own - (scaled * held["weight"] + held["bias"])).abs().max() / own.abs().max()
    return dict(zip(_MAPS, (x[0], centered[0], standardized[0], scaled[0]), strict=True)), float(deviation)


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the equations, and state what accuracy shows here."""
    table = frame[frame["channel"] < 0].set_index("kind")

    def gain(part: pd.DataFrame) -> float:
        accuracy = part["accuracy"].to_dict()
        return float(accuracy[BOTH] - accuracy[BN])

    def even(part: pd.DataFrame) -> float:
        wide = part[part["channel"] >= 0].pivot(index=["channel", "row", "column"], columns="kind", values="value")
        moved = (wide["centered"] - wide["input"]).groupby("channel")
        return float((moved.max() - moved.min()).max() / wide["input"].abs().max())

    return (
        at_most(
            "Representative batch normalization is centering, standardizing and scaling one after the other.",
            "S062, equations 5 to 7",
            "largest |layer - equations| over the largest output",
            by_seed(table, lambda part: part["deviation"].max()),
            1e-5,
        ),
        at_most(
            "Centering moves all pixels of a channel alike, by what the example's own mean says.",
            "S062, equation 8",
            "largest difference within a channel of what centering adds, over the largest input",
            by_seed(frame, even),
            1e-5,
        ),
        untestable(
            "Both calibrations together lower the error of BatchNorm.",
            "S062, table 2",
            "test accuracy with both less that with BatchNorm",
            by_seed(table, gain),
            "0.012 on ImageNet, ResNet-50",
            reason="the differences here are as large as those between seeds; a test set of 1000 digits resolves 0.01",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the maps of the first seed, and the accuracies of all."""
    canvas.set_size_inches(7.6, 3.3)
    parts: Any = canvas.subfigures(1, 2, width_ratios=(1.35, 1))
    left, right = parts
    maps = frame[(frame["seed"] == frame["seed"].min()) & (frame["channel"] >= 0)]
    channels = sorted(maps["channel"].unique())
    grid = left.subplots(len(channels), len(_MAPS))
    for line, channel in zip(grid, channels, strict=True):
        for ax, name in zip(line, _MAPS, strict=True):
            own = maps[maps["channel"] == channel]
            scale = own.loc[own["kind"].isin(_MAPS[:2] if name in _MAPS[:2] else _MAPS[2:]), "value"]
            part = own[own["kind"] == name].pivot(index="row", columns="column", values="value")
            ax.imshow(part, cmap="gray", vmin=scale.min(), vmax=scale.max())
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            if channel == channels[0]:
                ax.set_title(name, loc="center")
        line[0].set_ylabel(f"channel {channel + 1}")
    left.suptitle("(a) feature maps", x=0.02, ha="left", fontsize=9)
    right.suptitle("(b) accuracy", x=0.02, ha="left", fontsize=9)
    ax = right.subplots()
    table = frame[frame["channel"] < 0]
    for index, (seed, part) in enumerate(table.groupby("seed")):
        values = part.set_index("kind")["accuracy"].reindex(KINDS)
        marker = style.MARKERS[index % len(style.MARKERS)]
        ax.plot(range(len(KINDS)), values, marker, color=style.color(index), label=f"seed {seed}")
    medians = table.groupby("kind")["accuracy"].median().reindex(KINDS)
    ax.plot(range(len(KINDS)), medians, "_", color="black", markersize=18, label="median")
    ax.set_xticks(range(len(KINDS)), KINDS, rotation=20)
    ax.set_xlim(-0.5, len(KINDS) - 0.5)
    ax.legend(fontsize=7)
    ax.set_ylabel("test accuracy")
