"""AP-2: second moments as style."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure as Canvas
from sklearn.datasets import load_sample_images
from torch import Tensor

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from normscope import applications

ID = "AP-2"
TITLE = "Style as second moments"
SOURCES = ("gatys2016", "S185", "S188")
CAPTION = (
    "Adaptive instance normalization (AdaIN) gives the channels of a content mean and deviation of a style, "
    "whitening and coloring (WCT) their whole covariance. Top: applied to the colors of two photographs; the "
    "temple takes the colors of the flower, with WCT also their correlation. Bottom: relative errors on 16 "
    "features (random 5 x 5 filters, ReLU) of the photographs: AdaIN matches mean and deviation exactly and "
    "leaves much of the Gram matrix, WCT matches it."
)
COLUMNS = ("method", "quantity", "value", "row", "column", "color")

CONTENT, STYLE, ADAIN, WCT = "content", "style", "AdaIN", "WCT"
_QUANTITIES = ("mean", "deviation", "Gram matrix")
_SHOWN = (38, 58)


@dataclass(frozen=True)
class Setting:
    """The features: channels, size of the filters, pixels of the photographs."""

    channels: int = 16
    filters: int = 5
    size: tuple[int, int] = (107, 160)


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(size=(43, 64)) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Transfer the style of features with random filters, a row an error; the first seed keeps pixels as well."""
    photographs = [_photograph(image, setting.size) for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(seed)
    filters = torch.randn(
        setting.channels, 3, setting.filters, setting.filters, generator=generator, dtype=torch.float64
    )
    content, target = (torch.relu(F.conv2d(image - image.mean(), filters)) for image in photographs)
    rows: list[tuple[object, ...]] = []
    for method, features in (
        (CONTENT, content),
        (ADAIN, applications.adain(content, target, eps=0.0)),
        (WCT, applications.wct(content, target)),
    ):
        errors = (*_moments(features, target), float(applications.gram_error(features, target)))
        rows += [(method, quantity, error, -1, -1, "") for quantity, error in zip(_QUANTITIES, errors, strict=True)]
    if seed == 0:
        rows += _pixels(*(_photograph(image, _SHOWN) for image in load_sample_images().images))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _photograph(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Return a photograph as float64 [1, 3, height, width] between 0 and 1."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).unsqueeze(0).double() / 255
    return F.interpolate(pixels, size=size, mode="area")


def _moments(features: Tensor, target: Tensor) -> tuple[float, ...]:
    """Return the relative errors of means and of deviations over places."""
    found = [(f.flatten(2).mean(2), f.flatten(2).std(2)) for f in (features, target)]
    return tuple(float((own - wanted).norm() / wanted.norm()) for own, wanted in zip(*found, strict=True))


def _pixels(content: Tensor, target: Tensor) -> list[tuple[object, ...]]:
    """Return a row a pixel, of both photographs and of the content in the colors of the style."""
    images = {
        CONTENT: content,
        STYLE: target,
        ADAIN: applications.adain(content, target, eps=0.0),
        WCT: applications.wct(content, target),
    }
    rows: list[tuple[object, ...]] = []
    for name, image in images.items():
        levels = (image[0].clamp(0, 1) * 255).round().int().permute(1, 2, 0).tolist()
        for row, line in enumerate(levels):
            for column, (red, green, blue) in enumerate(line):
                rows.append((name, "pixel", 0.0, row, column, f"#{red:02x}{green:02x}{blue:02x}"))
    return rows


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge what each matches."""

    def error(method: str, quantity: str) -> list[float]:
        part = frame[(frame["method"] == method) & (frame["quantity"] == quantity)]
        return by_seed(part, lambda own: own["value"].item())

    moments = [max(pair) for pair in zip(error(ADAIN, "mean"), error(ADAIN, "deviation"), strict=True)]
    return (
        at_most(
            "AdaIN gives features the mean and the deviation of the style.",
            "S185, section 5",
            "the larger relative error of means and deviations",
            moments,
            1e-10,
        ),
        at_least(
            "It leaves the correlations of channels as they were.",
            "S188, section 3",
            "relative error of the Gram matrix after AdaIN",
            error(ADAIN, "Gram matrix"),
            0.01,
        ),
        at_most(
            "WCT gives features the Gram matrix of the style.",
            "S188, section 3.2",
            "relative error of the Gram matrix",
            error(WCT, "Gram matrix"),
            1e-5,
        ),
        at_least(
            "AdaIN already brings features closer to the style.",
            "S185, section 5",
            "relative error of the Gram matrix before over after AdaIN",
            [
                before / after
                for before, after in zip(error(CONTENT, "Gram matrix"), error(ADAIN, "Gram matrix"), strict=True)
            ],
            1.0,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the photographs, and the errors."""
    canvas.set_size_inches(7.0, 4.2)
    parts: object = canvas.subfigures(2, 1, height_ratios=(1, 1.5))
    top, bottom = np.ravel(np.asarray(parts, dtype=object))
    pixels = frame[frame["quantity"] == "pixel"]
    for ax, name in zip(top.subplots(1, 4), (CONTENT, STYLE, ADAIN, WCT), strict=True):
        own = pixels[pixels["method"] == name].pivot(index="row", columns="column", values="color")
        levels = [[[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in line] for line in own.to_numpy()]
        ax.imshow(np.array(levels, dtype=np.uint8), interpolation="bicubic")
        ax.set_axis_off()
        ax.set_title(name)
    ax = bottom.subplots()
    errors = frame[frame["quantity"] != "pixel"]
    for index, method in enumerate((CONTENT, ADAIN, WCT)):
        over = errors[errors["method"] == method].groupby("quantity")["value"]
        middle, low, high = (s.reindex(_QUANTITIES).clip(lower=1e-17) for s in (over.median(), over.min(), over.max()))
        places = np.arange(3) + 0.26 * (index - 1)
        ax.plot(places, middle, style.MARKERS[index], color=style.color(index), label=method, markersize=6)
        ax.vlines(places, low, high, color=style.color(index), linewidth=1.2)
    ax.set_xticks(range(3), _QUANTITIES)
    ax.set(yscale="log", ylim=(1e-17, 30))
    ax.legend(ncols=3, loc="lower right")
    ax.set_ylabel("relative error to the style")
