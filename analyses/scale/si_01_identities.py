"""SI-1: what a positive factor on the weights before BatchNorm does to loss, gradient and curvature."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

import normscope as ns
from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.scale.network import digits, invariant_mlp, weights
from normscope import workbench

ID = "SI-1"
TITLE = "A factor on the weights changes nothing but the step"
SOURCES = ("ba2016", "vanlaarhoven2017")
CAPTION = (
    "All hidden weights of a perceptron (784-64-64-64-10, float64) are multiplied by a. (a) With BatchNorm the loss "
    "stays, the gradient falls as 1/a and the curvature as 1/a². (b) The identities hold to rounding, and the "
    "gradient of each row is orthogonal to the row. (c) Without normalization neither loss nor gradient stays."
)
COLUMNS = ("network", "scale", "quantity", "ratio", "expected", "deviation")

_POWERS = {"loss": 0, "gradient norm": -1, "curvature": -2}
_RADIAL = "radial part of gradient"


@dataclass(frozen=True)
class Setting:
    """What is computed: layer sizes, examples of the batch, factors."""

    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    batch: int = 512
    scales: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(784, 16, 16, 10), batch=128) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Compare loss, gradient and curvature at a W with those at W."""
    (images, labels), _ = digits(seed)
    batch = images[: setting.batch], labels[: setting.batch]
    rows = []
    for network in ("BatchNorm", "none"):
        torch.manual_seed(seed)
        model = invariant_mlp(setting.sizes, normalized=network == "BatchNorm")
        start = [weight.detach().clone() for weight in weights(model)]
        base, _ = _measure(model, batch, seed)
        for scale in setting.scales:
            for weight, value in zip(weights(model), start, strict=True):
                weight.data.copy_(scale * value)
            values, radial = _measure(model, batch, seed)
            for quantity, power in _POWERS.items():
                ratio, expected = values[quantity] / base[quantity], scale**power
                rows.append((network, scale, quantity, ratio, expected, abs(ratio / expected - 1)))
            rows.append((network, scale, _RADIAL, radial, 0.0, radial))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _measure(model: nn.Module, batch: tuple[Tensor, Tensor], seed: int) -> tuple[dict[str, float], float]:
    """Return the quantities, the curvature being ‖Hv‖ for one random v, and the largest |cosine| of row and slope."""
    problem = ns.Problem(model, workbench.cross_entropy, [batch])
    direction = torch.randn(problem.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = workbench.cross_entropy(model(batch[0]), batch[1])
    gradients = torch.autograd.grad(loss, weights(model))
    cosines = [
        nn.functional.cosine_similarity(w, g, eps=1e-300).abs().max()
        for w, g in zip(weights(model), gradients, strict=True)
    ]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    values = {"loss": loss, "gradient norm": norm, "curvature": problem.hvp(direction).norm()}
    return {name: float(value.detach()) for name, value in values.items()}, float(torch.stack(cosines).max().detach())


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the identities."""
    normalized = frame[frame["network"] == "BatchNorm"]

    def largest(quantity: str) -> list[float]:
        return by_seed(normalized[normalized["quantity"] == quantity], lambda part: part["deviation"].max())

    plain = frame[(frame["network"] == "none") & (frame["quantity"] == "loss")]
    return (
        at_most(
            "The loss does not depend on the scale of the weights.",
            "ba2016, table 1",
            "max over a of |L(aW)/L(W) - 1|",
            largest("loss"),
            1e-13,
        ),
        at_most(
            "The gradient falls as 1/a.",
            "vanlaarhoven2017, effective learning rate",
            "max over a of |a ‖∇L(aW)‖/‖∇L(W)‖ - 1|",
            largest("gradient norm"),
            1e-12,
        ),
        at_most(
            "The curvature falls as 1/a².",
            "vanlaarhoven2017, effective learning rate",
            "max over a of |a² ‖H(aW)v‖/‖H(W)v‖ - 1|, v random",
            largest("curvature"),
            1e-11,
        ),
        at_most(
            "The gradient of each row is orthogonal to the row.",
            "S116, scale invariance",
            "max over a and rows of |cos(w, ∂L/∂w)|",
            largest(_RADIAL),
            1e-13,
        ),
        at_least(
            "Without normalization the loss depends on the scale.",
            "ba2016, table 1",
            "max over a of |L(aW)/L(W) - 1|",
            by_seed(plain, lambda part: part["deviation"].max()),
            0.1,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw ratios, deviations, and the ratios without normalization."""
    ratios, deviations, plain = style.panels(canvas, columns=3)
    for ax, network in ((ratios, "BatchNorm"), (plain, "none")):
        for index, quantity in enumerate(_POWERS):
            part = frame[(frame["network"] == network) & (frame["quantity"] == quantity)]
            style.curve(ax, part, "scale", "ratio", name=quantity, index=index, points=True)
            if network == "BatchNorm":
                line = part.groupby("scale")["expected"].first()
                style.theory(ax, line.index, line, name="$1,\\ 1/a,\\ 1/a^2$" if index == 0 else "")
        ax.set(xscale="log", yscale="log")
        ax.legend()
    for index, quantity in enumerate((*_POWERS, _RADIAL)):
        part = frame[(frame["network"] == "BatchNorm") & (frame["quantity"] == quantity)]
        shown = part.assign(deviation=part["deviation"].clip(lower=1e-17))
        style.curve(deviations, shown, "scale", "deviation", name=quantity, index=index, points=True)
    deviations.set(xscale="log", yscale="log", ylim=(5e-18, 1e-9))
    deviations.legend(title="0 is drawn at $10^{-17}$", title_fontsize=8)
    style.label(ratios, "BatchNorm", "factor $a$ on the weights", "value at $aW$ over value at $W$")
    style.label(deviations, "BatchNorm: distance from theory", "factor $a$ on the weights", "relative deviation")
    style.label(plain, "no normalization", "factor $a$ on the weights", "value at $aW$ over value at $W$")
