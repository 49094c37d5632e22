"""SI-9: scale-invariant weights tune their own learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.scale.network import digits, invariant_mlp, weights
from normscope import workbench

ID = "SI-9"
TITLE = "Five decades of learning rate end alike with BatchNorm"
SOURCES = ("S121",)
CAPTION = (
    "Full-batch gradient descent on 500 digits (784-64-64-64-10), the head with η = 0.1, hidden weights with the rate "
    "on the axis. (a) Loss after 300 steps: with BatchNorm every rate works, without it large rates diverge. "
    "(b) The norm of the first layer (cut at 10¹²) grows until (c) the effective rate η/‖w‖² is one that fits."
)
COLUMNS = ("network", "lr", "loss", "norm", "effective", "first")

_DIVERGED = 10.0


@dataclass(frozen=True)
class Setting:
    """What is trained: layer sizes, examples, rate of the head, rates of the hidden weights, steps."""

    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    examples: int = 500
    head: float = 0.1
    rates: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
    steps: int = 300


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(784, 32, 32, 10), examples=200, rates=(0.1, 10.0, 1000.0), steps=100) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train with each rate, with and without BatchNorm."""
    (images, labels), _ = digits(seed)
    batch = images[: setting.examples], labels[: setting.examples]
    rows = []
    for network in ("BatchNorm", "none"):
        for lr in setting.rates:
            torch.manual_seed(seed)
            model = invariant_mlp(setting.sizes, normalized=network == "BatchNorm")
            hidden, head = weights(model), list(model[-1].parameters())
            for parameter in head:
                parameter.requires_grad_(True)
            optimizer = torch.optim.SGD(hidden, lr=lr)
            optimizer.add_param_group({"params": head, "lr": setting.head})
            norms = [float(hidden[0].detach().norm())]
            losses = workbench.fit(
                model,
                optimizer,
                iter(lambda: batch, None),
                workbench.cross_entropy,
                steps=setting.steps,
                on_step=lambda *_, w=hidden[0], kept=norms: kept.append(float(w.detach().norm())),
                progress=False,
            )
            rows.append((network, lr, losses[-1], norms[-1], lr / norms[-1] ** 2, lr / norms[0] ** 2))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that every rate works with BatchNorm, that few do without, and how far effective rates come together."""
    normalized, plain = (frame[frame["network"] == network] for network in ("BatchNorm", "none"))
    return (
        at_most(
            "With BatchNorm every learning rate trains.",
            "S121, main theorem",
            "largest loss after 300 steps over rates 10⁻² to 10³ (nats)",
            by_seed(normalized, lambda rows: _loss(rows).max()),
            0.1,
        ),
        at_least(
            "Without normalization large rates diverge.",
            "S121, motivation",
            "smallest loss after 300 steps over rates from 10 (nats)",
            by_seed(plain[plain["lr"] >= 10], lambda rows: _loss(rows).min()),
            1.0,
        ),
        at_most(
            "The norm grows until the effective rate is no larger than what the loss allows.",
            "S121, growth of the norm",
            "range over rates of log η/‖w‖² at the end, over that at the start, layer 1",
            by_seed(normalized, lambda rows: np.log(rows["effective"]).std() / np.log(rows["first"]).std()),
            0.75,
            reason="small rates stay as they are: nothing makes a norm shrink",
        ),
    )


def _loss(rows: pd.DataFrame) -> pd.Series:
    """Put a diverged run at a loss that a plot can show."""
    return rows["loss"].where(np.isfinite(rows["loss"]), _DIVERGED).clip(upper=_DIVERGED)


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw loss, norm and effective rate over the rate."""
    losses, norms, rates = style.panels(canvas, columns=3)
    for index, network in enumerate(("BatchNorm", "none")):
        rows = frame[frame["network"] == network]
        style.curve(losses, rows.assign(loss=_loss(rows)), "lr", "loss", name=network, index=index, points=True)
        kept = rows[np.isfinite(rows["norm"])]
        style.curve(norms, kept, "lr", "norm", name=network, index=index, points=True)
        if network == "BatchNorm":
            style.curve(rates, rows, "lr", "effective", name="after training", index=index, points=True)
            style.curve(rates, rows, "lr", "first", name="at the start", index=2)
    for ax in (losses, norms, rates):
        ax.set(xscale="log", yscale="log")
        ax.legend()
    norms.set_ylim(1, 1e12)
    style.label(losses, "loss after training", r"learning rate $\eta$ of hidden weights", "training loss (nats)")
    style.label(norms, "norm of layer 1 after training", r"learning rate $\eta$ of hidden weights", r"$\|w\|$")
    style.label(
        rates, "BatchNorm: effective rate", r"learning rate $\eta$ of hidden weights", r"$\eta/\|w\|^2$, layer 1"
    )
