"""Equilibrium: what learning rate, momentum and decay imply for a scale-invariant weight, in closed form."""

from __future__ import annotations

import numpy as np

BAND = (0.8, 1.25)  # balance in equilibrium


def response(
    momentum: float, *, rule: str = "sgd", nesterov: bool = False, dampening: float = 0.0
) -> tuple[float, float]:
    """Return the sum and the sum of squares of the weights by which one gradient enters all later updates.

    SGD: (1 - d) a^k for momentum a and dampening d, with Nesterov 1 + a, then a^(k + 1). Adam: (1 - b) b^k.

    Args:
        momentum: a, or beta_1.
        rule: "sgd" or "adam"; of another rule both are NaN.
        nesterov: whether the momentum is Nesterov's, as torch computes it.
        dampening: d, without effect where there is no momentum.

    Returns:
        Sum and sum of squares.

    >>> response(0.5)
    (2.0, 1.3333333333333333)
    """
    if rule == "adam":
        return 1.0, (1 - momentum) / (1 + momentum)
    if rule != "sgd":
        return np.nan, np.nan
    if nesterov:
        return 1 / (1 - momentum), (1 + momentum) ** 2 + momentum**4 / (1 - momentum**2)
    part = 1 - dampening if momentum else 1.0
    return part / (1 - momentum), part**2 / (1 - momentum**2)


def shrinkage(
    rate: float, decay: float, momentum: float = 0.0, *, rule: str = "sgd", decoupled: bool = False, **options: float
) -> float:
    """Return the fraction of a weight's norm that decay takes away per step.

    eta lambda where decay is decoupled; where it joins the gradient (L2), eta lambda times the sum of `response`, for
    SGD with momentum eta lambda / (1 - a). For Adam with L2, which divides decay by the second moment, there is none.

    Args:
        rate: learning rate eta.
        decay: lambda.
        momentum: a, or beta_1.
        rule: "sgd", "adam" or "muon".
        decoupled: whether decay multiplies the weight.
        options: nesterov and dampening, see `response`.

    Returns:
        The fraction; NaN where the rule does not say.
    """
    if decoupled:
        return rate * decay
    return rate * decay * response(momentum, rule=rule, **options)[0] if rule == "sgd" else np.nan  # type: ignore[arg-type]


def angle(
    rate: float, decay: float, momentum: float = 0.0, *, rule: str = "sgd", decoupled: bool = False, **options: float
) -> float:
    """Return the angle by which a scale-invariant weight turns per step once growth and decay of its norm balance.

    With s1, s2 of `response` and k of `shrinkage`, growth (eta s1)^2 E|g|^2 = 2 k |w|^2 and angle^2 = eta^2 s2 E|g|^2 /
    |w|^2, so angle = sqrt(2 k s2) / s1: sqrt(2 eta lambda / (1 + a)) for SGD with momentum, sqrt(2 eta lambda (1 - b) /
    (1 + b)) for AdamW.

    Args:
        rate: learning rate eta.
        decay: lambda.
        momentum: a, or beta_1.
        rule: "sgd" or "adam"; Muon's updates depend on one another through orthogonalization and have no such form.
        decoupled: whether decay multiplies the weight.
        options: nesterov and dampening, see `response`.

    Returns:
        Radians; NaN where there is no closed form.

    >>> round(angle(0.1, 0.005, 0.9), 5)
    0.02294
    """
    s1, s2 = response(momentum, rule=rule, **options)  # type: ignore[arg-type]
    lost = shrinkage(rate, decay, momentum, rule=rule, decoupled=decoupled, **options)
    return float(np.sqrt(2 * lost * s2) / s1)


def time_constant(shrink: float, rule: str) -> float:
    """Return the steps in which the distance from equilibrium falls by e: of |w|^4 for SGD, of |w|^2 for others.

    A gradient of a scale-invariant loss falls as 1 / |w|, so SGD's growth of |w|^2 does as 1 / |w|^2; normalized
    updates grow it at a constant rate.

    Args:
        shrink: see `shrinkage`.
        rule: "sgd", "adam", "muon".

    Returns:
        1 / (4 shrink) for SGD, else 1 / (2 shrink); infinite without decay.
    """
    return 1 / ((4 if rule == "sgd" else 2) * shrink) if shrink > 0 else np.inf


def steps_to_balance(balance: float, constant: float) -> float:
    """Return the steps until the balance enters its band, at settings that stay.

    Equilibrium over present (|w|^4 or |w|^2) is the balance B, and 1 / B - 1 falls by e per time constant.

    Args:
        balance: B now.
        constant: time constant in steps.

    Returns:
        Steps, 0 inside the band.

    >>> round(steps_to_balance(5.0, 1000.0))
    1386
    """
    low, high = BAND
    if low <= balance <= high:
        return 0.0
    if not balance > 0:
        return np.inf
    edge = high if balance > high else low
    return float(constant * np.log((1 / balance - 1) / (1 / edge - 1)))


def balance(relative: np.ndarray, radial: np.ndarray, shrink: np.ndarray) -> np.ndarray:
    """Return growth of a norm over its decay, (|w'|^2 - (1 - k)^2 |w|^2) / ((1 - (1 - k)^2) |w|^2), for each step.

    Args:
        relative: |dw| / |w|.
        radial: <w, dw> / |w|^2.
        shrink: k, see `shrinkage`.

    Returns:
        1 where the norm stays, 0 where it only decays; NaN without decay.
    """
    lost = 2 * shrink - shrink**2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lost > 0, (2 * radial + relative**2 + lost) / lost, np.nan)
