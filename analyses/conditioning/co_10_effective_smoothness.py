"""CO-10: effective smoothness along the gradient, with and without batch normalization."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, by_seed
from analyses.conditioning.landscape import NORMS, SMALL, Landscape, explored

ID = "CO-10"
TITLE = "Effective smoothness along the gradient"
SOURCES = ("santurkar2018",)
CAPTION = (
    "The runs of CO-8. (a) β = the largest over r of ‖∇L(x) - ∇L(x - rη∇L(x))‖ / (rη‖∇L(x)‖), by step. (b) Its median "
    "and its largest value over steps, a bar for each, with the range over seeds. The largest is smaller with "
    "BatchNorm; the usual value need not be, since the gradient of a normalized network depends on the scale of its "
    "weights, 1/‖w‖, and that of the other does not."
)
COLUMNS = ("network", "step", "smoothness")


def setting(fast: bool) -> Landscape:
    """Return the setting."""
    return SMALL if fast else Landscape()


def run(setting: Landscape, seed: int) -> pd.DataFrame:
    """Take the largest ratio at each look."""
    found = explored(setting, seed).groupby(["network", "step"], sort=False)["smoothness"].max()
    return found.reset_index()[list(COLUMNS)]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the largest and the median ratio."""

    def excess(part: pd.DataFrame, statistic: str) -> float:
        of = part.groupby("network")["smoothness"].agg(statistic)
        return float(of["none"] / of["BatchNorm"])

    return (
        at_least(
            "With BatchNorm the worst effective smoothness is better.",
            "santurkar2018, section 3.1",
            "largest β over steps, none over BatchNorm",
            by_seed(frame, lambda part: excess(part, "max")),
            1.2,
        ),
        at_least(
            "The usual effective smoothness is better too.",
            "santurkar2018, section 3.1",
            "median β over steps, none over BatchNorm",
            by_seed(frame, lambda part: excess(part, "median")),
            1.2,
            reason="β of a normalized network goes as 1/‖w‖², so the comparison depends on the initialization; at this "
            "one and this depth the two are about equal but for the worst steps.",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw β by step, and its median and maximum."""
    by_step, bars = style.panels(canvas, columns=2)
    for index, network in enumerate(NORMS):
        part = frame[frame["network"] == network]
        style.curve(by_step, part, "step", "smoothness", name=network, index=index)
        for place, statistic in enumerate(("median", "max")):
            values = part.groupby("seed")["smoothness"].agg(statistic)
            ends = [[values.median() - values.min()], [values.max() - values.median()]]
            bars.bar(
                place + 0.4 * index,
                values.median(),
                yerr=ends,
                width=0.36,
                color=style.color(index),
                label=network if place == 0 else None,
                error_kw={"linewidth": 0.8},
            )
    by_step.set_ylim(0, None)
    bars.set(xticks=(0.2, 1.2), xticklabels=("median over steps", "largest"))
    for ax in (by_step, bars):
        ax.legend()
    style.label(by_step, "by step", "step $t$", r"effective smoothness $\beta$")
    style.label(bars, "over steps", "", r"effective smoothness $\beta$")
