"""CO-11: batch normalization followed by noise that brings distribution shift back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn

from analyses import style
from analyses.claim import Claim, at_least, by_seed
from analyses.conditioning.network import digits
from normscope import workbench

ID = "CO-11"
TITLE = "Batch normalization with unstable distributions trains as well"
SOURCES = ("santurkar2018",)
CAPTION = (
    "A ReLU perceptron with 6 hidden layers of 64 (torch's initialization), MNIST, SGD, η = 0.1, batches of 128. Noisy "
    "BatchNorm scales and shifts each normalized activation at random, anew at each step and by sample. (a) Training "
    "loss; (b) test accuracy; (c) how far the mean of an activation of layer 3 moves from step to step, over its "
    "deviation within the batch: more than without normalization, and training does not mind."
)
COLUMNS = ("network", "step", "loss", "accuracy", "drift")


class NoisyBatchNorm(nn.Module):
    """BatchNorm, then noise of a mean and deviation that are drawn anew for each step, unit and sample.

    For each unit m ~ U(-0.5, 0.5) and s ~ U(1, 1.25); for each sample m_i ~ U(m - 0.1, m + 0.1), s_i ~ N(s, 0.1).
    """

    def __init__(self, features: int) -> None:
        """Hold the normalization."""
        super().__init__()
        self.norm = nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, and add noise while training."""
        z: Tensor = self.norm(x)
        if not self.training:
            return z
        shift = torch.empty(z.shape[1]).uniform_(-0.5, 0.5) + torch.empty(z.shape).uniform_(-0.1, 0.1)
        scale = torch.empty(z.shape[1]).uniform_(1, 1.25) + 0.1 * torch.randn(z.shape)
        return scale * z + shift


NETWORKS: Final[dict[str, Callable[[int], nn.Module] | None]] = {
    "none": None,
    "BatchNorm": nn.BatchNorm1d,
    "noisy BatchNorm": NoisyBatchNorm,
}


@dataclass(frozen=True)
class Setting:
    """Network, training, how often accuracy is taken."""

    width: int = 64
    depth: int = 6
    lr: float = 0.1
    batch: int = 128
    steps: int = 400
    every: int = 20


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(width=32, depth=4, steps=80, every=20) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train the three networks; the drift is of the input of layer 3's ReLU."""
    train, test = digits(seed)
    rows = []
    for network, norm in NETWORKS.items():
        torch.manual_seed(seed)
        model = workbench.mlp((784, *[setting.width] * setting.depth, 10), norm)
        seen: list[Tensor] = []
        before = model.get_submodule("layer3.relu").register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0].detach().clone()) if module.training else None
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr)
        batches = workbench.batches(*train, setting.batch, torch.Generator().manual_seed(seed))
        for step in range(0, setting.steps, setting.every):
            losses = workbench.fit(
                model, optimizer, batches, workbench.cross_entropy, steps=setting.every, progress=False
            )
            means = torch.stack([x.mean(0) for x in seen])
            deviation = torch.stack([x.std(0) for x in seen]).mean(0)
            drift = float((means.diff(dim=0).abs().mean(0) / deviation.clamp_min(1e-6)).median())
            seen.clear()
            accuracy = workbench.evaluate(model, [test])
            rows.append((network, step + setting.every, sum(losses) / len(losses), accuracy, drift))
        before.remove()
    return pd.DataFrame(rows, columns=list(COLUMNS))


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge that noise does not harm, and that distributions do move more."""

    def last(network: str) -> list[float]:
        return by_seed(frame[frame["network"] == network], lambda part: part["accuracy"].iloc[-1])

    def drift(part: pd.DataFrame) -> float:
        medians = part.groupby("network")["drift"].median()
        return float(medians["noisy BatchNorm"] / medians["none"])

    plain, batch, noisy = (last(network) for network in NETWORKS)
    return (
        at_least(
            "With noisy BatchNorm the network trains as well as with BatchNorm.",
            "santurkar2018, section 2.1",
            "test accuracy, noisy BatchNorm less BatchNorm",
            [a - b for a, b in zip(noisy, batch, strict=True)],
            -0.03,
        ),
        at_least(
            "With noisy BatchNorm it trains far better than without normalization.",
            "santurkar2018, section 2.1",
            "test accuracy, noisy BatchNorm less none",
            [a - b for a, b in zip(noisy, plain, strict=True)],
            0.05,
        ),
        at_least(
            "Distributions under noisy BatchNorm are less stable than without normalization.",
            "santurkar2018, section 2.1",
            "drift of the mean of an activation from step to step, noisy BatchNorm over none",
            by_seed(frame, drift),
            1.5,
        ),
    )


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw loss, accuracy and drift by step."""
    loss, accuracy, drift = style.panels(canvas, columns=3)
    for index, network in enumerate(NETWORKS):
        part = frame[frame["network"] == network]
        for ax, column in ((loss, "loss"), (accuracy, "accuracy"), (drift, "drift")):
            style.curve(ax, part, "step", column, name=network, index=index)
    loss.set_yscale("log")
    drift.set_yscale("log")
    for ax in (loss, accuracy, drift):
        ax.legend()
    style.label(loss, "training", "step $t$", "training loss (nats)")
    style.label(accuracy, "test", "step $t$", "test accuracy")
    style.label(drift, "drift of layer 3", "step $t$", "change of mean a step over deviation")
