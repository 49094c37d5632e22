"""Digest: the record of one run as a few numbers, a curve and a profile, so that many can be laid side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from normscope.core.record import Record
from normscope.metrics import conditioning, curvature, mismatch, noise, scale, tables

POINTS = 40  # of the curve of losses
PERCENT = 50


@dataclass(frozen=True)
class Quantity:
    """A number that is compared between runs.

    Attributes:
        name: its name in frames.
        label: what it is, as the head of a column.
        subject: the subject it belongs to.
        better: "lower" or "higher"; "" where neither is.
        reading: what it is measured on, and what it needs.
        read: from the record of one run; NaN where that does not hold it.
    """

    name: str
    label: str
    subject: str
    better: str
    reading: str
    read: Callable[[Record], float]


def _first_loss(record: Record) -> float:
    losses = _losses(record)
    return float(losses.iloc[0]) if len(losses) else np.nan


def _final_loss(record: Record) -> float:
    """Return the mean over the last tenth of the steps; infinite where the last one is not finite."""
    losses = _losses(record)
    if not len(losses):
        return np.nan
    window = losses.tail(max(1, len(losses) // 10)).to_numpy(float)
    return float(window.mean()) if np.isfinite(window).all() else np.inf


def _losses(record: Record) -> pd.Series:
    """Return the loss of each step; one that is missing behind a recorded one was not finite."""
    losses = tables.context(record)["loss"]
    if losses.isna().all():
        return losses.iloc[:0]
    return losses.loc[losses.first_valid_index() :].fillna(np.inf)


def _kappa(record: Record) -> float:
    return _median([value for site, value in profile(record) if site in set(conditioning.hidden(record))])


def _sharpness(record: Record) -> float:
    return _last(curvature.snapshots(record)["sharpness"])


def _trace(record: Record) -> float:
    return _last(curvature.snapshots(record)["trace"])


def _effective(record: Record) -> float:
    return _median(scale.summary(record)["effective_last"].tolist())


def _disturbance(record: Record) -> float:
    layers = noise.layers(record)
    if len(layers):
        return _median(layers["relative"].tolist())
    held = tables.table(record, "held_loss", slot="output", phase=curvature.PHASE)
    return 0.0 if len(held) and tables.attributes(record)["norm"].notna().any() else np.nan


def _mismatch(record: Record) -> float:
    found = mismatch.gap(record)
    return found.value if found.usable else np.nan


NEEDS_PROBLEM = "needs problem= in attach"
QUANTITIES: tuple[Quantity, ...] = (
    Quantity("initial_loss", "first loss", "training", "", "loss of the first step", _first_loss),
    Quantity("final_loss", "final loss", "training", "lower", "training loss, mean over the last tenth", _final_loss),
    Quantity(
        "kappa",
        "κ₅₀ of inputs",
        "conditioning",
        "lower",
        "largest over median eigenvalue of a hidden layer's input, late in the run, median layer; needs two samples a "
        "feature",
        _kappa,
    ),
    Quantity(
        "sharpness", "sharpness", "curvature", "", f"largest Hessian eigenvalue at the end; {NEEDS_PROBLEM}", _sharpness
    ),
    Quantity("trace", "Hessian trace", "curvature", "", f"at the end; {NEEDS_PROBLEM}", _trace),
    Quantity(
        "effective_rate",
        "effective rate",
        "scale",
        "",
        "learning rate over squared norm (Adam: norm) at the end, median of the scale-invariant weights",
        _effective,
    ),
    Quantity(
        "disturbance",
        "relative SND",
        "noise",
        "",
        f"how far the batch moves a sample's output, over its size, median layer; {NEEDS_PROBLEM}",
        _disturbance,
    ),
    Quantity(
        "mismatch",
        "train-eval gap",
        "mismatch",
        "lower",
        f"relative distance of outputs with batch and with running statistics; {NEEDS_PROBLEM}",
        _mismatch,
    ),
)


def digest(record: Record) -> dict[str, float]:
    """Return every quantity of one run.

    Args:
        record: record of one run.

    Returns:
        Values by the names of `QUANTITIES`; NaN where the record does not hold what one needs.
    """
    with np.errstate(all="ignore"):  # a diverged run holds infinities
        return {quantity.name: float(quantity.read(record)) for quantity in QUANTITIES}


def profile(record: Record) -> list[tuple[str, float]]:
    """Return kappa_50 of each layer's input, late in the run, in order of execution; NaN where undefined."""
    found = conditioning.conditions(record, PERCENT)
    return [(str(site), float(value)) for site, value in zip(found["site"], found["value"], strict=True)]


def curve(record: Record, points: int = POINTS) -> list[tuple[float, float]]:
    """Return the training loss as at most so many means over steps that follow each other.

    Args:
        record: record of one run.
        points: how many at most.

    Returns:
        (middle of the steps, mean loss), infinite where one of them was not finite.
    """
    losses = _losses(record)
    parts = np.array_split(np.arange(len(losses)), min(points, len(losses))) if len(losses) else []
    steps, values = losses.index.to_numpy(float), losses.to_numpy(float)
    return [(float(steps[part].mean()), float(values[part].mean())) for part in parts]


def _last(values: pd.Series) -> float:
    found = values.dropna()
    return float(found.iloc[-1]) if len(found) else np.nan


def _median(values: list[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.median(finite)) if finite else np.nan
