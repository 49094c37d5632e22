"""CO-2: largest eigenvalue of each layer's input and gradient, with and without batch normalization."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.conditioning.covariances import NORMS, Training, examined

ID = "CO-2"
TITLE = "The largest eigenvalue of a layer's input and of its gradient"
SOURCES = ("huang2020layerwise",)
CAPTION = (
    "The networks of CO-1. (a) λmax of the second moment Σₓ of a layer's input: BatchNorm holds it at about 11 at "
    "every layer and step. (b) λmax of the second moment of the gradient of one sample's loss at the layer's output: "
    "at initialization BatchNorm makes it grow backward, several hundred-fold over 20 layers, and some steps of "
    "training take most of that away. The largest eigenvalue of the layer's Fisher matrix is about the product of the "
    "two."
)
COLUMNS = ("network", "step", "layer", "factor", "largest")


def setting(fast: bool) -> Training:
    """Return the setting."""
    return Training(width=32, depth=10, images=256, looks=(0, 20)) if fast else Training(looks=(0, 10, 100))


def run(setting: Training, seed: int) -> pd.DataFrame:
    """Examine both networks at each look."""
    frame = examined(setting, seed)
    frame = frame[frame["layer"] > 1].sort_values(["network", "step", "factor", "layer"])
    return frame[list(COLUMNS)]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge stable inputs, and gradients that explode backward at initialization alone."""
    inputs = frame[frame["factor"] == "input"]
    normalized = inputs[inputs["network"] == "BatchNorm"]
    slopes = frame[(frame["factor"] == "gradient") & (frame["network"] == "BatchNorm")]

    def backward(part: pd.DataFrame, step: int) -> float:
        of_step = part[part["step"] == step]["largest"]
        return float(of_step.iloc[0] / of_step.iloc[-1])

    def excess(part: pd.DataFrame) -> float:
        medians = part.groupby("network")["largest"].median()
        return float(medians["none"] / medians["BatchNorm"])

    first, last = int(frame["step"].min()), int(frame["step"].max())
    return (
        at_most(
            "With BatchNorm the largest eigenvalue of the input is nearly the same at all layers and steps.",
            "huang2020layerwise, batch normalized networks",
            "largest over smallest λmax(Σₓ) of layers 2 and up, all looks, BatchNorm",
            by_seed(normalized, lambda part: part["largest"].max() / part["largest"].min()),
            2.0,
        ),
        at_least(
            "Without normalization the largest eigenvalue of the input is larger.",
            "huang2020layerwise, batch normalized networks",
            "median λmax(Σₓ) over layers and looks, none over BatchNorm",
            by_seed(inputs, excess),
            2.0,
        ),
        at_least(
            "At initialization BatchNorm lets gradients explode backward.",
            "huang2020layerwise, batch normalized networks",
            "λmax(Σ_∂h) of layer 2 over that of the head with BatchNorm, initialization",
            by_seed(slopes, lambda part: backward(part, first)),
            30.0,
        ),
        at_most(
            "Training takes most of the explosion of gradients away.",
            "huang2020layerwise, batch normalized networks",
            "the same ratio after training over that at initialization",
            by_seed(slopes, lambda part: backward(part, last) / backward(part, first)),
            0.5,
            reason="Most of the growth is gone after some steps, but it is not the same for all seeds.",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw both eigenvalues by layer, at initialization and at the end."""
    axes = style.panels(canvas, columns=2)
    looks = [(step, network) for network in NORMS for step in (frame["step"].min(), frame["step"].max())]
    for ax, factor in zip(axes, ("input", "gradient"), strict=True):
        for index, (step, network) in enumerate(looks):
            part = frame[(frame["factor"] == factor) & (frame["step"] == step) & (frame["network"] == network)]
            style.curve(ax, part, "layer", "largest", name=f"{network}, step {step}", index=index)
        ax.set(yscale="log", xticks=range(0, int(frame["layer"].max()) + 1, 5))
        ax.legend()
    axes[0].set_ylim(5, 500)
    style.label(axes[0], "input", "layer", r"$\lambda_{\max}(\Sigma_x)$")
    style.label(axes[1], "gradient", "layer", r"$\lambda_{\max}(\Sigma_{\partial h})$")
