"""CO-1: condition number of each layer's input, with and without batch normalization."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.conditioning.covariances import NORMS, Training, examined

ID = "CO-1"
TITLE = "The condition number of a layer's input, layer by layer"
SOURCES = ("huang2020layerwise", "ioffe2015")
CAPTION = (
    "A ReLU perceptron with 20 hidden layers of 64 (He initialization), 1024 MNIST digits, full-batch gradient "
    "descent, η = 0.1. κ₅₀ is the largest eigenvalue of the second moment Σₓ of a layer's input over the median one. "
    "(a) At initialization it grows with depth to the tens of thousands without normalization and stays below a "
    "hundred with BatchNorm; (b) after 100 steps it still does. 10⁸ stands for a median of zero, where half of the "
    "units are dead."
)
COLUMNS = ("network", "step", "loss", "layer", "condition")


_MOST = 1e8  # with more than half of the units dead the median eigenvalue is 0


def setting(fast: bool) -> Training:
    """Return the setting."""
    return Training(width=32, depth=10, images=256, looks=(0, 20)) if fast else Training()


def run(setting: Training, seed: int) -> pd.DataFrame:
    """Examine both networks at each look."""
    frame = examined(setting, seed)
    frame = frame[(frame["factor"] == "input") & (frame["layer"] > 1)]
    median = frame["median"].clip(lower=frame["largest"] / _MOST)
    frame = frame.assign(condition=frame["largest"] / median).sort_values(["network", "step", "layer"])
    return frame[list(COLUMNS)]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge growth without normalization, and its absence with it."""

    def conditions(network: str, *, first: bool) -> pd.DataFrame:
        step = frame["step"].min() if first else frame["step"].max()
        found: pd.DataFrame = frame[(frame["network"] == network) & (frame["step"] == step)]
        return found

    def ratio(part: pd.DataFrame) -> float:
        return float(part["condition"].iloc[-1] / part["condition"].iloc[0])

    trained = [
        float(none / batch)
        for none, batch in zip(
            by_seed(conditions("none", first=False), lambda part: part["condition"].iloc[-1]),
            by_seed(conditions("BatchNorm", first=False), lambda part: part["condition"].iloc[-1]),
            strict=True,
        )
    ]
    return (
        at_least(
            "At initialization the condition number grows with depth without normalization.",
            "huang2020layerwise, batch normalized networks",
            "κ₅₀(Σₓ) of the last layer over that of the second",
            by_seed(conditions("none", first=True), ratio),
            30.0,
        ),
        at_most(
            "With BatchNorm it hardly depends on the layer.",
            "huang2020layerwise, batch normalized networks",
            "largest over smallest κ₅₀(Σₓ) of layers 2 and up, initialization",
            by_seed(
                conditions("BatchNorm", first=True), lambda part: part["condition"].max() / part["condition"].min()
            ),
            3.0,
        ),
        at_most(
            "With BatchNorm it hardly does after training either.",
            "huang2020layerwise, batch normalized networks",
            "largest over smallest κ₅₀(Σₓ) of layers 2 and up with BatchNorm, after training",
            by_seed(
                conditions("BatchNorm", first=False), lambda part: part["condition"].max() / part["condition"].min()
            ),
            3.0,
        ),
        at_least(
            "After training the last layer is conditioned far worse without normalization.",
            "huang2020layerwise, batch normalized networks",
            "κ₅₀(Σₓ) of the last layer, none over BatchNorm",
            trained,
            10.0,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw the condition number by layer at both looks."""
    axes = style.panels(canvas, columns=2)
    for ax, step in zip(axes, (frame["step"].min(), frame["step"].max()), strict=True):
        shown = frame[frame["step"] == step]
        for index, network in enumerate(NORMS):
            part = shown[shown["network"] == network]
            loss = part["loss"].median()
            style.curve(ax, part, "layer", "condition", name=f"{network}, loss {loss:.2g}", index=index, points=True)
        low, high = frame["condition"].min(), frame["condition"].max()
        ax.set(yscale="log", ylim=(low / 2, high * 2), xticks=range(0, int(frame["layer"].max()) + 1, 5))
        ax.legend()
        title = "initialization" if step == 0 else f"after {step} steps"
        style.label(ax, title, "layer", r"$\kappa_{50}(\Sigma_x)$ of the input")
