"""CO-8: how far the loss varies along the gradient, with and without batch normalization."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, by_seed
from analyses.conditioning.landscape import NORMS, SMALL, Landscape, explored

ID = "CO-8"
TITLE = "How far the loss varies along the gradient"
SOURCES = ("santurkar2018",)
CAPTION = (
    "A ReLU perceptron with 10 hidden layers of 64 (He initialization), MNIST, SGD, η = 0.1, batches of 128. At a step "
    "the loss of its batch is taken at x - rη∇L(x), r from 0.5 to 4. (a) The range from smallest to largest of these "
    "losses, median over seeds; (b) its width. Without normalization the gradient leads far up and down."
)
COLUMNS = ("network", "step", "lowest", "highest", "range")


def setting(fast: bool) -> Landscape:
    """Return the setting."""
    return SMALL if fast else Landscape()


def run(setting: Landscape, seed: int) -> pd.DataFrame:
    """Take the smallest and the largest loss along the gradient at each look."""
    found = explored(setting, seed).groupby(["network", "step"], sort=False)["loss"].agg(["min", "max"]).reset_index()
    found = found.rename(columns={"min": "lowest", "max": "highest"})
    return found.assign(range=found["highest"] - found["lowest"])[list(COLUMNS)]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that the loss varies less with BatchNorm."""

    def excess(part: pd.DataFrame, statistic: str) -> float:
        of = part.groupby("network")["range"].agg(statistic)
        return float(of["none"] / of["BatchNorm"])

    return (
        at_least(
            "With BatchNorm the loss varies far less along the gradient.",
            "santurkar2018, section 3.1",
            "mean over steps of the range of losses, none over BatchNorm",
            by_seed(frame, lambda part: excess(part, "mean")),
            5.0,
        ),
        at_least(
            "The loss varies less with BatchNorm throughout training, not in a few steps alone.",
            "santurkar2018, section 3.1",
            "median over steps of the range of losses, none over BatchNorm",
            by_seed(frame, lambda part: excess(part, "median")),
            3.0,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the band of losses, and its width."""
    band, width = style.panels(canvas, columns=2)
    for index, network in enumerate(NORMS):
        part = frame[frame["network"] == network]
        middle = part.groupby("step")[["lowest", "highest"]].median()
        band.fill_between(
            middle.index, middle["lowest"], middle["highest"], color=style.color(index), alpha=0.45, label=network
        )
        style.curve(width, part, "step", "range", name=network, index=index)
    for ax in (band, width):
        ax.set_yscale("log")
        ax.legend()
    style.label(band, "losses along the gradient", "step $t$", "loss (nats)")
    style.label(width, "their range", "step $t$", "largest less smallest loss (nats)")
