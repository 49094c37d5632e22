"""CO-25: a wide two-layer network with weight normalization converges linearly, at the rate of its kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from analyses import style
from analyses.claim import Claim, at_least, at_most, by_seed
from analyses.conditioning.network import digits

ID = "CO-25"
TITLE = "Wide networks with weight normalization converge linearly, and faster"
SOURCES = ("S143",)
CAPTION = (
    "Two-layer ReLU network of width 2048 on 50 MNIST digits (20 random projections, unit length, labels ±1), weights "
    "w = g v/‖v‖ with v of deviation α and g = ‖v‖/α at the start, so that all networks begin as the same function; "
    "gradient descent on v and g, or on w. Its kernel is Λ = V/α² + G. (a) Loss by time (steps × rate), dashed what "
    "the kernel at the start predicts: the smaller α, the faster. (b) Distance of the kernel from that at the start."
)
COLUMNS = ("network", "time", "loss", "predicted", "moved")

PLAIN = "no normalization"


@dataclass(frozen=True)
class Setting:
    """Data, width, values of α, rate, steps."""

    samples: int = 50
    features: int = 20
    width: int = 2048
    alphas: tuple[float, ...] = (0.5, 1.0, 2.0)
    rate: float = 0.1
    steps: int = 800
    looks: int = 16


def setting(fast: bool) -> Setting:
    """Return the setting."""
    return Setting(samples=20, width=512, steps=160) if fast else Setting()


def run(setting: Setting, seed: int) -> pd.DataFrame:
    """Train each network; loss, the kernel's prediction of it, and how far the kernel has moved."""
    (images, labels), _ = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    x = images[: setting.samples].double() @ torch.randn(784, setting.features, generator=generator).double()
    x = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    y = (labels[: setting.samples] < 5).double() * 2 - 1
    direction = torch.randn(setting.width, setting.features, generator=generator, dtype=torch.float64)
    signs = torch.randint(2, (setting.width,), generator=generator).double() * 2 - 1
    parts = [_plain(setting, x, y, direction, signs)]
    parts += [_normalized(setting, x, y, direction, signs, alpha) for alpha in setting.alphas]
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _plain(setting: Setting, x: Tensor, y: Tensor, w: Tensor, signs: Tensor) -> pd.DataFrame:
    """Descend on w; the kernel is H = x xᵀ * (1[wx > 0] 1[wx > 0]ᵀ)/width."""
    w, walk = w.clone(), _Walk(setting, y)
    for step in range(setting.steps + 1):
        z = x @ w.T
        active = (z > 0).double()
        residual = (z.relu() @ signs) / setting.width**0.5 - y
        if walk.due(step):
            walk.look(step, residual, (x @ x.T) * (active @ active.T) / setting.width)
        w -= setting.rate * (active * residual[:, None] * signs).T @ x / setting.width**0.5
    return walk.frame(PLAIN)


def _normalized(setting: Setting, x: Tensor, y: Tensor, w: Tensor, signs: Tensor, alpha: float) -> pd.DataFrame:
    """Descend on v and g of w = g v/‖v‖; the kernel is what both contribute."""
    v, walk = alpha * w, _Walk(setting, y)
    g = v.norm(dim=1) / alpha
    for step in range(setting.steps + 1):
        length = v.norm(dim=1)
        unit = v / length[:, None]
        along = x @ unit.T
        active = (along > 0).double()
        residual = ((g * along).relu() @ signs) / setting.width**0.5 - y
        if walk.due(step):
            walk.look(step, residual, _kernel(x, along, (g / length).square()) / setting.width)
        slope = (active * residual[:, None] * signs).T @ x / setting.width**0.5  # with respect to g u
        radial = (slope * unit).sum(1)
        v = v - setting.rate * (g / length)[:, None] * (slope - radial[:, None] * unit)
        g = g - setting.rate * radial
    return walk.frame(f"weight normalization, α = {alpha:g}")


def _kernel(x: Tensor, along: Tensor, scale: Tensor) -> Tensor:
    """Add up over units what v gives, (g/‖v‖)² ⟨x - (x·u)u, x' - (x'·u)u⟩, and what g gives, (x·u)(x'·u)."""
    active = (along > 0).double()
    rectified = along.relu()
    return (x @ x.T) * ((active * scale) @ active.T) - (rectified * scale) @ rectified.T + rectified @ rectified.T


class _Walk:
    """Keeps losses and kernels at a few steps."""

    def __init__(self, setting: Setting, y: Tensor) -> None:
        self.setting, self.y = setting, y
        self.rows: list[tuple[float, float, float, float]] = []
        self.start: tuple[Tensor, Tensor] | None = None

    def due(self, step: int) -> bool:
        return step % (self.setting.steps // self.setting.looks) == 0

    def look(self, step: int, residual: Tensor, matrix: Tensor) -> None:
        if self.start is None:
            self.start = residual, matrix
        first, before = self.start
        values, vectors = torch.linalg.eigh(before)
        decayed = (vectors.T @ first) * (1 - self.setting.rate * values) ** step
        moved = float(torch.linalg.matrix_norm(matrix - before) / torch.linalg.matrix_norm(before))
        loss, predicted = float(residual.square().sum()), float(decayed.square().sum())
        self.rows.append((step * self.setting.rate, loss, predicted, moved))

    def frame(self, network: str) -> pd.DataFrame:
        found = pd.DataFrame(self.rows, columns=["time", "loss", "predicted", "moved"])
        scale = found["loss"].iloc[0]
        return found.assign(network=network, loss=found["loss"] / scale, predicted=found["predicted"] / scale)


def claims(frame: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge convergence, the kernel's prediction, and speed."""
    last = frame[frame["time"] == frame["time"].max()]
    normalized = frame[frame["network"] != PLAIN]
    fastest = str(frame["network"].unique()[1])

    def rate(part: pd.DataFrame, network: str) -> float:
        return float(-np.log(part.loc[part["network"] == network, "loss"].iloc[0]))

    return (
        at_most(
            "A wide two-layer network with weight normalization converges to zero training loss.",
            "S143, convergence of two-layer networks",
            "largest loss over α at the end, over that at the start",
            by_seed(last[last["network"] != PLAIN], lambda part: part["loss"].max()),
            0.05,
        ),
        at_most(
            "Such a network converges as its kernel at the start predicts.",
            "S143, convergence of two-layer networks",
            "largest |log loss / log predicted - 1| over α and times, losses over 1e-12",
            by_seed(normalized, _error),
            0.15,
        ),
        at_most(
            "The kernel hardly moves in training.",
            "S143, convergence of two-layer networks",
            "largest ‖Λ(t) - Λ(0)‖/‖Λ(0)‖ over α and times",
            by_seed(normalized, lambda part: part["moved"].max()),
            0.2,
        ),
        at_least(
            "With a small α such a network converges faster than without normalization.",
            "S143, speed by the initial scale",
            f"-log loss at the end, {fastest}, over {PLAIN}",
            by_seed(last, lambda part: rate(part, fastest) / rate(part, PLAIN)),
            1.5,
        ),
    )


def _error(part: pd.DataFrame) -> float:
    early = part[(part["time"] > 0) & (part["loss"] > 1e-12)]
    return float(np.abs(np.log(early["loss"]) / np.log(early["predicted"]) - 1).max())


def draw(frame: pd.DataFrame, canvas: Canvas) -> None:
    """Draw loss with prediction, and how far the kernel moves."""
    loss, moved = style.panels(canvas, columns=2)
    for index, network in enumerate(frame["network"].unique()):
        part = frame[frame["network"] == network]
        name = str(network).replace("α", r"$\alpha$")
        style.curve(loss, part, "time", "loss", name=name, index=index)
        style.curve(moved, part, "time", "moved", name=name, index=index)
        line = part.groupby("time")["predicted"].median()
        style.theory(loss, line.index, line, name="kernel at the start" if index == 0 else "")
    loss.set(yscale="log", ylim=(1e-12, 1e6))
    loss.legend(fontsize=7, loc="upper right")
    style.label(loss, "loss", "time (steps × rate)", "loss over that at the start")
    style.label(moved, "kernel", "time (steps × rate)", r"$\|\Lambda(t) - \Lambda(0)\|\,/\,\|\Lambda(0)\|$")
