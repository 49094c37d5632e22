"""CO-9: how far the gradient turns along itself, with and without batch normalization."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, by_seed
from analyses.conditioning.landscape import NORMS, SMALL, Landscape, explored

ID = "CO-9"
TITLE = "How well the gradient predicts the gradient further on"
SOURCES = ("santurkar2018",)
CAPTION = (
    "The runs of CO-8. (a) Distance ‖∇L(x) - ∇L(x - rη∇L(x))‖ from the gradient at a step to those along it, from the "
    "smallest to the largest over r = 0.5 to 4, median over seeds; (b) the largest. With BatchNorm the gradient stays "
    "near what it was."
)
COLUMNS = ("network", "step", "lowest", "highest")


def setting(fast: bool) -> Landscape:
    """Return the setting."""
    return SMALL if fast else Landscape()


def run(setting: Landscape, seed: int) -> pd.DataFrame:
    """Take the smallest and the largest distance at each look."""
    found = explored(setting, seed).groupby(["network", "step"], sort=False)["turn"].agg(["min", "max"]).reset_index()
    return found.rename(columns={"min": "lowest", "max": "highest"})[list(COLUMNS)]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that the gradient turns less with BatchNorm."""

    def excess(part: pd.DataFrame, statistic: str) -> float:
        of = part.groupby("network")["highest"].agg(statistic)
        return float(of["none"] / of["BatchNorm"])

    return (
        at_least(
            "With BatchNorm the gradient further on is predicted better: the largest distance is smaller.",
            "santurkar2018, section 3.1",
            "largest distance over steps and r, none over BatchNorm",
            by_seed(frame, lambda part: excess(part, "max")),
            2.0,
        ),
        at_least(
            "The usual distance is smaller with BatchNorm too.",
            "santurkar2018, section 3.1",
            "median over steps of the largest distance over r, none over BatchNorm",
            by_seed(frame, lambda part: excess(part, "median")),
            1.0,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the band of distances, and its upper end with the spread over seeds."""
    band, largest = style.panels(canvas, columns=2)
    for index, network in enumerate(NORMS):
        part = frame[frame["network"] == network]
        middle = part.groupby("step")[["lowest", "highest"]].median()
        band.fill_between(
            middle.index, middle["lowest"], middle["highest"], color=style.color(index), alpha=0.45, label=network
        )
        style.curve(largest, part, "step", "highest", name=network, index=index)
    for ax in (band, largest):
        ax.set_yscale("log")
        ax.legend()
    distance = r"$\|\nabla L(x) - \nabla L(x - r\eta\nabla L)\|$"
    style.label(band, "range over $r$", "step $t$", distance)
    style.label(largest, "largest over $r$", "step $t$", distance)
