"""SI-11: weight decay before normalization is a learning rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.scale.network import digits, invariant_mlp, squared_norm, weights
from normscope import workbench

ID = "SI-11"
TITLE = "Weight decay replaced by a correction of the learning rate"
SOURCES = ("S116",)
CAPTION = (
    "Three runs of SGD with BatchNorm (784-64-64-64-10, float64, equal batches): weight decay; no decay; no decay with "
    "the learning rate η/(1 - ηλ) · ‖w‖²/‖w of the run with decay‖², weight by weight. (a) The corrected run "
    "repeats the losses of the run with decay, though (b) its norm grows as without decay."
)
COLUMNS = ("step", "run", "loss", "norm", "difference")

DECAY, CORRECTED, PLAIN = "weight decay", "corrected learning rate", "no decay"


@dataclass(frozen=True)
class Setting:
    """What is trained: layer sizes, batch size, learning rate η, decay λ, steps, and how many of them are kept."""

    sizes: tuple[int, ...] = (784, 64, 64, 64, 10)
    batch: int = 128
    lr: float = 0.1
    decay: float = 1e-2
    steps: int = 500
    kept: int = 100


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(sizes=(784, 32, 32, 10), steps=120, kept=60) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train the three runs side by side; `difference` is the largest distance of a loss so far from that with decay."""
    train, _ = digits(seed)
    models, optimizers = {}, {}
    for name in (DECAY, CORRECTED, PLAIN):
        torch.manual_seed(seed)
        models[name] = invariant_mlp(setting.sizes)
        groups = [{"params": [weight]} for weight in weights(models[name])]
        decay = setting.decay if name == DECAY else 0.0
        optimizers[name] = torch.optim.SGD(groups, lr=setting.lr, weight_decay=decay)
    rows, largest = [], dict.fromkeys(models, 0.0)
    batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
    for step, (inputs, targets) in zip(range(setting.steps), batches, strict=False):
        pairs = zip(weights(models[CORRECTED]), weights(models[DECAY]), strict=True)
        for group, (own, decayed) in zip(optimizers[CORRECTED].param_groups, pairs, strict=True):
            ratio = float(own.detach().square().sum() / decayed.detach().square().sum())
            group["lr"] = setting.lr / (1 - setting.lr * setting.decay) * ratio
        losses = {}
        for name, model in models.items():
            norm = squared_norm(model) ** 0.5
            (losses[name],) = workbench.fit(
                model, optimizers[name], [(inputs, targets)], workbench.cross_entropy, steps=1, progress=False
            )
            largest[name] = max(largest[name], abs(losses[name] - losses[DECAY]))
            if step % (setting.steps // setting.kept) == 0 or step == setting.steps - 1:
                rows.append((step, name, losses[name], norm, largest[name]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that the corrected run repeats the one with decay, and that the plain one does not."""

    def last(run: str, column: str) -> list[float]:
        return by_seed(frame[frame["run"] == run], lambda part: part[column].iloc[-1])

    growth = [own / decayed for own, decayed in zip(last(CORRECTED, "norm"), last(DECAY, "norm"), strict=True)]
    return (
        at_most(
            "A correction of the learning rate has the effect of weight decay.",
            "S116, correction of the learning rate",
            "largest |loss corrected - loss with decay|",
            last(CORRECTED, "difference"),
            1e-12,
        ),
        at_least(
            "Without the correction the run without decay is another.",
            "S116, correction of the learning rate",
            "largest |loss without decay - loss with decay|",
            last(PLAIN, "difference"),
            1e-3,
        ),
        at_least(
            "The effect is not that of a smaller norm: the corrected run's norm grows.",
            "S116, effective step size",
            "last norm corrected / last norm with decay",
            growth,
            1.05,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw losses, norms and differences of losses."""
    losses, norms, differences = style.panels(canvas, columns=3)
    for index, name in enumerate((PLAIN, CORRECTED, DECAY)):
        part = frame[frame["run"] == name]
        style.curve(losses, part, "step", "loss", name=name, index=index)
        style.curve(norms, part, "step", "norm", name=name, index=index)
        if name != DECAY:
            shown = part.assign(difference=part["difference"].clip(lower=1e-17))
            style.curve(differences, shown, "step", "difference", name=name, index=index)
    differences.set_yscale("log")
    for ax in (losses, norms, differences):
        ax.legend()
    style.label(losses, "loss", "step $t$", "training loss (nats)")
    style.label(norms, "norm", "step $t$", r"$\|w_t\|$ of all hidden weights")
    style.label(differences, "distance from weight decay", "step $t$", "largest loss difference so far (nats)")
