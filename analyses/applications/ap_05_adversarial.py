"""AP-5: BatchNorm and small perturbations of the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

from analyses import style
from analyses.claim import Claim, at_least
from normscope import workbench

ID = "AP-5"
TITLE = "BatchNorm and small perturbations of the input"
SOURCES = ("S239",)
CAPTION = (
    "Perceptrons (784-100-100-10) with BatchNorm, without, and with LayerNorm, trained alike on clean digits, in "
    "evaluation mode. (a) Accuracy under one step of size ε along the sign of the gradient (pixels of deviation "
    "1): the loss from it. (b) Accuracy under Gaussian noise. BatchNorm is compared at equal clean accuracy "
    "within a point."
)
COLUMNS = ("network", "perturbation", "size", "accuracy")

BN, NONE, LN = "BatchNorm", "none", "LayerNorm"
ATTACK, NOISE = "gradient sign", "noise"
_NORMS: dict[str, Callable[[int], nn.Module] | None] = {NONE: None, BN: nn.BatchNorm1d, LN: nn.LayerNorm}


@dataclass(frozen=True)
class Setting:
    """What is trained and how it is perturbed: examples, steps, sizes of the attack, deviations of the noise."""

    examples: int = 4000
    steps: int = 500
    attacks: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
    noises: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0)


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(examples=1000, steps=120, attacks=(0.0, 0.1, 0.3), noises=(0.0, 1.0)) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train each network and perturb the test digits."""
    train, (images, labels) = workbench.digits(seed, setting.examples)
    rows = []
    for name, norm in _NORMS.items():
        torch.manual_seed(seed)
        model = workbench.mlp((784, 100, 100, 10), norm=norm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        batches = workbench.batches(*train, 64, torch.Generator().manual_seed(seed))
        workbench.fit(model, optimizer, batches, workbench.cross_entropy, steps=setting.steps, progress=False)
        model.eval()
        sign = _slope(model, images, labels).sign()
        perturbed = [(ATTACK, size, images + size * sign) for size in setting.attacks]
        perturbed += [(NOISE, size, workbench.corrupt(images, "noise", size, seed=seed)) for size in setting.noises]
        rows += [(name, kind, size, workbench.evaluate(model, [(moved, labels)])) for kind, size, moved in perturbed]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _slope(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the loss with respect to the images."""
    inputs = images.clone().requires_grad_()
    return torch.autograd.grad(workbench.cross_entropy(model(inputs), labels), inputs)[0]


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge whether BatchNorm loses more than its absence."""

    def loss(perturbation: str) -> list[float]:
        mean = frame[(frame["perturbation"] == perturbation) & (frame["size"] > 0)].groupby(["seed", "network"])
        table = mean["accuracy"].mean().unstack("network")
        return [float(value) for value in table[NONE] - table[BN]]

    reason = "a perceptron of two hidden layers on digits; the work's networks are deep and its images natural"
    return tuple(
        at_least(
            f"BatchNorm makes a network more vulnerable to {words}.",
            "S239, section 3",
            "mean accuracy without normalization less that with BatchNorm, over the sizes above 0",
            loss(perturbation),
            0.01,
            reason=reason,
        )
        for perturbation, words in ((ATTACK, "steps along the gradient's sign"), (NOISE, "noise"))
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw accuracy by size of both perturbations."""
    for ax, kind in zip(style.panels(canvas, columns=2), (ATTACK, NOISE), strict=True):
        for index, name in enumerate(_NORMS):
            part = frame[(frame["network"] == name) & (frame["perturbation"] == kind)]
            style.curve(ax, part, "size", "accuracy", name=name, index=index, points=True)
        ax.set_ylim(0, 1.02)
        ax.legend(loc="lower left")
        style.label(
            ax, kind, "step $\\epsilon$" if kind == ATTACK else "standard deviation of the noise", "test accuracy"
        )
