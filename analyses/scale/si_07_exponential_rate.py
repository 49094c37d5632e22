"""SI-7: weight decay before normalization is an exponentially growing learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.scale.network import digits, invariant_mlp, squared_norm, weights
from normscope import workbench

ID = "SI-7"
TITLE = "An exponentially growing learning rate in place of weight decay"
SOURCES = ("S128",)
CAPTION = (
    "SGD with weight decay (η = 0.1, λ = 5·10⁻³, momentum γ) beside a run without decay whose learning rate is "
    "η α^(-2t-1) and whose momentum is γ/α², α the larger root of x² - (1 + γ - ηλ)x + γ (784-64-64-64-10, "
    "BatchNorm, float64, equal batches). (a) The losses coincide, (b) though the learning rate grows without bound and "
    "the norm with it; (c) they differ by rounding only."
)
COLUMNS = ("momentum", "run", "step", "loss", "lr", "norm", "expected", "difference")

DECAY, GROWING = "weight decay", "growing rate"


@dataclass(frozen=True)
class Setting:
    """What is trained: layer sizes, batch size, learning rate η, decay λ, momenta γ, steps, and how many are kept."""

    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    batch: int = 128
    lr: float = 0.1
    decay: float = 5e-3
    momenta: tuple[float, ...] = (0.0, 0.9)
    steps: int = 600
    kept: int = 60


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(784, 16, 16, 10), steps=120) if fast else Setting()


def growth(lr: float, decay: float, gamma: float) -> float:
    """Return α, the larger root of x² - (1 + γ - ηλ)x + γ, by which the weights shrink a step."""
    middle = 1 + gamma - lr * decay
    return (middle + math.sqrt(middle**2 - 4 * gamma)) / 2


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train both runs side by side for each momentum."""
    return pd.concat([_pair(setting, gamma, seed) for gamma in setting.momenta], ignore_index=True)


def _pair(setting: Setting, gamma: float, seed: int) -> pd.DataFrame:
    train, _ = digits(seed)
    models = {}
    for name in (DECAY, GROWING):
        torch.manual_seed(seed)
        models[name] = invariant_mlp(setting.sizes)
    decayed, grown = models[DECAY], models[GROWING]
    optimizer = torch.optim.SGD(weights(decayed), lr=setting.lr, momentum=gamma, weight_decay=setting.decay)
    alpha = growth(setting.lr, setting.decay, gamma)
    # the run without decay starts as if it had come from α times its weights
    before = [alpha * weight.detach() for weight in weights(grown)]
    batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
    rows, largest = [], 0.0
    for step, (inputs, targets) in zip(range(setting.steps), batches, strict=False):
        lr = setting.lr * alpha ** (-2 * step - 1)
        norms = {name: squared_norm(model) ** 0.5 for name, model in models.items()}
        (loss,) = workbench.fit(
            decayed, optimizer, [(inputs, targets)], workbench.cross_entropy, steps=1, progress=False
        )
        other = _step(grown, before, (inputs, targets), lr, gamma / alpha**2)
        largest = max(largest, abs(loss - other))
        if step % (setting.steps // setting.kept) == 0 or step == setting.steps - 1:
            expected = norms[DECAY] * alpha**-step
            rows.append((gamma, DECAY, step, loss, setting.lr, norms[DECAY], norms[DECAY], largest))
            rows.append((gamma, GROWING, step, other, lr, norms[GROWING], expected, largest))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _step(model: nn.Module, before: list[Tensor], batch: tuple[Tensor, Tensor], lr: float, momentum: float) -> float:
    """Take w <- w + momentum (w - w before) - lr g, keeping w in `before`; return the loss."""
    loss = workbench.cross_entropy(model(batch[0]), batch[1])
    gradients = torch.autograd.grad(loss, weights(model))
    with torch.no_grad():
        for place, (weight, gradient) in enumerate(zip(weights(model), gradients, strict=True)):
            old = weight.clone()
            weight.add_(momentum * (old - before[place]) - lr * gradient)
            before[place] = old
    return float(loss.detach())


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the equivalence for each momentum."""
    found: list[Claim] = []
    for gamma, part in frame.groupby("momentum"):
        grown = part[part["run"] == GROWING]
        found += [
            at_most(
                f"The run with growing rate has the losses of the run with decay, γ = {gamma}.",
                "S128, equivalence with momentum" if gamma else "S128, equivalence",
                "largest |difference of the losses| (nats)",
                by_seed(grown, lambda rows: rows["difference"].max()),
                1e-10,
            ),
            at_most(
                f"The weights of the two runs differ by the factor α^(-t) alone, γ = {gamma}.",
                "S128, equivalence",
                "largest |norm with growing rate / (α^(-t) norm with decay) - 1|",
                by_seed(grown, lambda rows: (rows["norm"] / rows["expected"] - 1).abs().max()),
                1e-10,
            ),
        ]
    moved = frame[frame["run"] == GROWING]
    return (
        *found,
        at_least(
            "The learning rate grows without bound while the loss falls.",
            "S128, experiments",
            "last learning rate over the first, the larger γ",
            by_seed(moved, lambda rows: rows["lr"].max() / rows["lr"].min()),
            10.0,
            reason="the fast setting is too short",
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw losses, learning rates with norms, and differences."""
    losses, rates, gaps = style.panels(canvas, columns=3)
    for index, (gamma, part) in enumerate(frame.groupby("momentum")):
        for place, name in enumerate((GROWING, DECAY)):
            rows, number = part[part["run"] == name], 2 * index + place
            style.curve(losses, rows, "step", "loss", name=f"{name}, γ = {gamma:g}", index=number)
            style.curve(rates, rows, "step", "lr", name=f"{name}, γ = {gamma:g}", index=number)
        style.curve(gaps, part, "step", "difference", name=f"γ = {gamma:g}", index=index)
    rates.set(yscale="log", ylim=(0.05, 3e3))
    gaps.set(yscale="log", ylim=(1e-16, 1e-10))
    for ax in (losses, rates, gaps):
        ax.legend()
    style.label(losses, "loss", "step $t$", "training loss (nats)")
    style.label(rates, "learning rate", "step $t$", r"$\eta_t$")
    style.label(gaps, "growing rate against decay", "step $t$", "largest loss difference so far (nats)")
