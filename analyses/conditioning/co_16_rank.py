"""CO-16: rank of the representation through depth, with and without batch normalization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.conditioning.least_squares import Array

ID = "CO-16"
TITLE = "Batch normalization avoids the collapse of rank with depth"
SOURCES = ("S138",)
CAPTION = (
    "Random networks (width d, weights of variance 1/d), N = 256 random inputs; r(H) = (tr M)²/‖M‖²_F of M = HHᵀ/N "
    "bounds the rank of H from below. Batch normalization as in the theory: each feature divided by its root mean "
    "square. (a) By depth at d = 64: without normalization r falls to 1, with it r stays where the network is linear. "
    "(b) The mean over layers grows as √d. With ReLU and this uncentered normalization r stays low, since the mean "
    "direction dominates; centering the features first (true BN) brings it back."
)
COLUMNS = ("network", "width", "depth", "rank")

_ROOT: Final = 1e-300


def _linear(z: Array) -> Array:
    return z


def _rectified(z: Array) -> Array:
    return np.maximum(z, 0)


def _unit(z: Array) -> Array:
    """Divide each feature (row) by its root mean square over samples."""
    return np.asarray(z / np.sqrt((z**2).mean(1, keepdims=True) + _ROOT))


def _overall(z: Array) -> Array:
    """Divide by the root mean square of all: r(H) does not see it, and nothing under- or overflows."""
    return np.asarray(z / np.sqrt((z**2).mean()))


def _centered(z: Array) -> Array:
    return _unit(z - z.mean(1, keepdims=True))


Step = Callable[[Array], Array]
# what follows the product with the weights
_NETWORKS: Final[dict[str, tuple[Step, Step]]] = {
    "linear, BN": (_unit, _linear),
    "linear, none": (_overall, _linear),
    "ReLU, BN uncentered": (_unit, _rectified),
    "ReLU, BN": (_centered, _rectified),
    "ReLU, none": (_overall, _rectified),
}


@dataclass(frozen=True)
class Setting:
    """Widths d, samples N, depth, from which layer means are taken, and of how many layers a row is kept."""

    widths: tuple[int, ...] = (16, 32, 64, 128)
    samples: int = 256
    depth: int = 200
    every: int = 4


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(widths=(16, 32, 64), depth=100) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Propagate random inputs through each network, in float64, and take r(H) of centered features for "ReLU, BN"."""
    rows = []
    for width in setting.widths:
        generator = np.random.default_rng([seed, width])
        inputs = generator.standard_normal((width, setting.samples))
        weights = generator.uniform(-1, 1, (setting.depth, width, width)) * np.sqrt(3 / width)
        for network, (normalize, activate) in _NETWORKS.items():
            hidden = _overall(inputs)
            for depth in range(setting.depth + 1):
                if depth % setting.every == 0:
                    shown = hidden - hidden.mean(1, keepdims=True) if network == "ReLU, BN" else hidden
                    rows.append((network, width, depth, _rank(shown)))
                if depth < setting.depth:
                    hidden = activate(normalize(weights[depth] @ hidden))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _rank(hidden: Array) -> float:
    gram = hidden @ hidden.T
    return float(np.trace(gram) ** 2 / (gram**2).sum())


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge collapse without normalization, and growth as the square root of the width with it."""

    def last(network: str) -> list[float]:
        part = frame[(frame["network"] == network) & (frame["depth"] == frame["depth"].max())]
        return by_seed(part, lambda seeds: seeds["rank"].max())

    normalized = frame[frame["network"] == "linear, BN"]
    return (
        at_most(
            "Without normalization the rank of a deep linear network collapses.",
            "S138, rank without normalization",
            "largest r(H) over widths, last layer, linear without BN",
            last("linear, none"),
            2.0,
        ),
        at_most(
            "So does that of a ReLU network.",
            "S138, rank without normalization",
            "largest r(H) over widths, last layer, ReLU without BN",
            last("ReLU, none"),
            1.1,
        ),
        at_least(
            "With batch normalization it stays at the order of √d at every depth.",
            "S138, rank of linear networks",
            "smallest r(H)/√d over widths and layers from 20, linear with BN",
            by_seed(
                normalized[normalized["depth"] >= 20],
                lambda part: (
                    (part.groupby(["width", "depth"])["rank"].mean().reset_index())
                    .assign(ratio=lambda mean: mean["rank"] / np.sqrt(mean["width"]))["ratio"]
                    .min()
                ),
            ),
            0.5,
        ),
        at_least(
            "The mean rank over layers grows at least as the square root of the width.",
            "S138, rank of linear networks",
            "slope of log mean r(H) over log d, linear with BN",
            by_seed(normalized, _exponent),
            0.5,
        ),
        at_least(
            "Batch normalization keeps the rank of deep ReLU networks too.",
            "S138, rank of nonlinear networks",
            "r(H) of the last layer with BN (features centered) over without, smallest over widths",
            by_seed(
                frame[frame["depth"] == frame["depth"].max()],
                lambda part: min(
                    _of(part, "ReLU, BN", width) / _of(part, "ReLU, none", width) for width in part["width"].unique()
                ),
            ),
            2.0,
        ),
    )


def _of(part: pd.DataFrame, network: str, width: int) -> float:
    return float(part.loc[(part["network"] == network) & (part["width"] == width), "rank"].iloc[0])


def _exponent(part: pd.DataFrame) -> float:
    means = part.groupby("width")["rank"].mean()
    return float(np.polyfit(np.log(means.index.to_numpy(float)), np.log(means.to_numpy()), 1)[0])


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw r by depth at one width, and its mean over layers by width."""
    depth, width = style.panels(canvas, columns=2)
    shown = frame["width"].unique()[-2]
    for index, network in enumerate(_NETWORKS):
        part = frame[frame["network"] == network]
        style.curve(depth, part[part["width"] == shown], "depth", "rank", name=network, index=index)
        mean = part.groupby(["seed", "width"])["rank"].mean().reset_index()
        style.curve(width, mean, "width", "rank", name=network, index=index, points=True)
    widths = np.sort(frame["width"].unique())
    style.theory(width, widths, np.sqrt(widths), name=r"$\sqrt{d}$")
    depth.set(yscale="log", ylim=(0.9, 150))
    width.set(xscale="log", yscale="log", ylim=(0.9, 150), xticks=widths, xticklabels=widths)
    width.minorticks_off()
    width.legend(fontsize=7, ncols=2, loc="upper left")
    style.label(depth, f"$d$ = {shown}", "layer", "$r(H)$")
    style.label(width, "mean over layers", "width $d$", "mean $r(H)$")
