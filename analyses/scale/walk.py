"""A random walk of scale-invariant weights: the theory of the equilibrium without a network."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

# from weights, gradient and step to the new weights
Rule = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def walk(rule: Rule, features: int, steps: int, seed: int, *, norm: float = 1.0) -> pd.DataFrame:
    """Walk: the gradient is random, orthogonal to the weights, of norm 1/‖w‖, as that of a scale-invariant loss is.

    Args:
        rule: the optimizer.
        features: d, the number of weights.
        steps: number of steps.
        seed: of the gradients.
        norm: norm of the first weights.

    Returns:
        Columns step, norm (before the step), angle (of the step, radians).
    """
    generator = np.random.default_rng(seed)
    w = generator.standard_normal(features)
    w *= norm / np.linalg.norm(w)
    rows = []
    for step in range(steps):
        noise = generator.standard_normal(features)
        length = float(np.linalg.norm(w))
        tangent = noise - w * (w @ noise) / length**2
        new = rule(w, tangent / (np.linalg.norm(tangent) * length), step)
        chord = float(np.linalg.norm(new / np.linalg.norm(new) - w / length))
        rows.append((step, length, 2 * math.asin(min(1.0, chord / 2))))
        w = new
    return pd.DataFrame(rows, columns=["step", "norm", "angle"])


def momentum(lr: float, decay: float, alpha: float) -> Rule:
    """Return SGD as torch has it: v <- alpha v + g + decay w, w <- w - lr v."""
    velocity: list[np.ndarray] = []

    def rule(w: np.ndarray, gradient: np.ndarray, step: int) -> np.ndarray:
        raw = gradient + decay * w
        velocity[:] = [alpha * velocity[0] + raw if velocity else raw]
        moved: np.ndarray = w - lr * velocity[0]
        return moved

    return rule


def adamw(lr: float, decay: float, betas: tuple[float, float] = (0.9, 0.999)) -> Rule:
    """Return AdamW with decoupled decay: w <- (1 - lr decay) w - lr m^ / sqrt(v^)."""
    moments: list[np.ndarray] = []

    def rule(w: np.ndarray, gradient: np.ndarray, step: int) -> np.ndarray:
        first, second = moments or (np.zeros_like(w), np.zeros_like(w))
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        moments[:] = [first, second]
        ratio = first / (1 - betas[0] ** (step + 1)) / np.sqrt(second / (1 - betas[1] ** (step + 1)))
        moved: np.ndarray = (1 - lr * decay) * w - lr * ratio
        return moved

    return rule


def turning(lr: float, decay: float, alpha: float) -> float:
    """Return the angle of a step in equilibrium, sqrt(2 lr decay / (1 + alpha)) radians (spherical motion dynamics)."""
    return math.sqrt(2 * lr * decay / (1 + alpha))


def settled(lr: float, decay: float, alpha: float, energy: float = 1.0) -> float:
    """Return the norm in equilibrium, (lr L / (decay (1 - alpha) (2 - decay lr / (1 + alpha))))^(1/4).

    Args:
        lr: learning rate.
        decay: weight decay.
        alpha: momentum.
        energy: L, the mean of ‖w‖²‖g‖², which the scale of the weights does not change.

    Returns:
        The norm.
    """
    return float((lr * energy / (decay * (1 - alpha) * (2 - decay * lr / (1 + alpha)))) ** 0.25)
