"""Run: whether training ends broken, and what loss and gradient did before."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from normscope.core.record import Record
from normscope.metrics import tables

BEFORE = 10  # steps before a break over which growth is taken


class Break(NamedTuple):
    """The last unbroken stretch of steps that are not finite, up to the end of the run.

    Attributes:
        step: its first step.
        steps: its length, in recorded steps that were not skipped.
        recorded: all such steps of the run.
        gradient: whether gradients were not finite, else the loss alone was.
        loss: last finite loss before it, NaN where there is none.
        grad_norm: last finite gradient norm before it, NaN where there is none.
        loss_growth: loss / loss `BEFORE` steps earlier (or at the first step), NaN below two steps.
        grad_norm_growth: the same of the gradient norm.
        lr: learning rate of the first group at the last sampled step up to it, NaN where unknown.
    """

    step: int
    steps: int
    recorded: int
    gradient: bool
    loss: float
    grad_norm: float
    loss_growth: float
    grad_norm_growth: float
    lr: float


def recorded(record: Record) -> pd.DataFrame:
    """Return the context of the steps that were not skipped and that have a loss or a gradient norm.

    Args:
        record: record of one run.

    Returns:
        Rows of `tables.context`; a loss or norm that was not finite is infinite, one that was not recorded NaN.
    """
    frame = tables.context(record)
    return frame[~frame["skipped"] & frame[["loss", "grad_norm"]].notna().any(axis=1)]


def ending(record: Record) -> Break | None:
    """Return the stretch of steps with a loss or gradient norm that is not finite in which the run ends.

    Args:
        record: record of one run.

    Returns:
        The stretch; None where the last recorded step is finite.
    """
    frame = recorded(record)
    infinite = frame[["loss", "grad_norm"]].abs() == np.inf
    start = tables.onset(infinite.any(axis=1))
    if start is None:
        return None
    before, stretch = frame[frame.index < start], infinite[infinite.index >= start]
    (loss, loss_growth), (norm, norm_growth) = _last(before["loss"]), _last(before["grad_norm"])
    rates = frame.loc[frame.index <= start, "lr"].dropna()
    return Break(
        step=start,
        steps=len(stretch),
        recorded=len(frame),
        gradient=bool(stretch["grad_norm"].any()),
        loss=loss,
        grad_norm=norm,
        loss_growth=loss_growth,
        grad_norm_growth=norm_growth,
        lr=float(rates.iloc[-1]) if len(rates) else np.nan,
    )


def _last(values: pd.Series) -> tuple[float, float]:
    """Return the last finite value and its ratio, in size, to that `BEFORE` steps earlier."""
    window = values[np.isfinite(values)].tail(BEFORE + 1)
    if not len(window):
        return np.nan, np.nan
    first, last = float(window.iloc[0]), float(window.iloc[-1])
    return last, abs(last / first) if len(window) > 1 and first else np.nan
