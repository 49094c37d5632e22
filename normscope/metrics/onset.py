"""Onset: which tensors moved before a step, and when each began, from the steps that the flight recorder holds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from normscope.core.record import Record
from normscope.core.robust import MIN_HISTORY, WINDOW
from normscope.core.schedule import FLIGHT
from normscope.metrics import tables

BEFORE, AFTER = 64, 8  # steps before and after a step at which tensors are looked at
ONSET = 6.0  # robust standard deviations of a logarithm, and
GROWN = 1.5  # growth, from which on a tensor has moved
BEYOND = 3.0  # times the largest of the base: it has moved, however much it varied
IQR = 1.349  # interquartile range of a Gaussian, in standard deviations
LEAST = 0.02  # standard deviation of a logarithm that counts at least
_PAUSE = 2  # steps for which what has moved may be back


class Window(NamedTuple):
    """What the flight recorder holds around a step: a row a step, a column a tensor, NaN what was not measured.

    Attributes:
        gradient: norm of the gradient.
        update: norm of what the step changed.
        rms_t: root mean square of the gradient over the root of the second moment.
        weight: norm of the weight after the step.
        rate: learning rate, a column a group.
        base: steps that the others are compared with.
    """

    gradient: pd.DataFrame
    update: pd.DataFrame
    rms_t: pd.DataFrame
    weight: pd.DataFrame
    rate: pd.DataFrame
    base: np.ndarray


def window(record: Record, step: int) -> Window | None:
    """Return what was recorded around a step; None where too few steps before it were.

    Args:
        record: record of one run.
        step: the step.
    """
    keys = ("gradient", "norm"), ("update", "norm"), ("gradient", "rms_t"), ("value", "norm"), ("value", "lr")
    frames = [tables.table(record, stat, slot="*", role=role, phase=FLIGHT) for role, stat in keys]
    steps = frames[0].index
    here = steps[(steps > step - BEFORE - WINDOW) & (steps <= step + AFTER)]
    earlier = here[here < step]
    if step not in steps or len(earlier) < MIN_HISTORY:
        return None
    base = earlier[earlier <= step - BEFORE]
    base = base if len(base) >= MIN_HISTORY else earlier[: max(MIN_HISTORY, len(earlier) // 2)]
    gradient, update, rms_t, weight, rate = (frame.reindex(here) for frame in frames)
    return Window(gradient, update, rms_t, weight, rate, base.to_numpy())


def scores(frame: pd.DataFrame, base: np.ndarray) -> pd.DataFrame:
    """Return how far each value lies above those of the base, in robust standard deviations of their logarithms.

    Args:
        frame: a row a step, a column a tensor.
        base: steps to compare with.

    Returns:
        (log x - median) / (IQR / 1.349), the deviation at least 0.02; infinite where x is, 0 where it has grown by less
        than `GROWN`, at least twice `ONSET` where it is `BEYOND` the largest of the base, NaN where nothing is known.
    """
    logs = pd.DataFrame(np.log(np.maximum(frame, np.finfo(float).tiny)), frame.index, frame.columns)
    known = logs.loc[base].replace(np.inf, np.nan)
    spread = (known.quantile(0.75) - known.quantile(0.25)) / IQR
    above = logs - known.median()
    found: pd.DataFrame = (above / spread.clip(lower=LEAST)).where(above > np.log(GROWN), 0.0)
    beyond = logs > known.max() + np.log(BEYOND)
    return found.mask(beyond, found.clip(lower=2 * ONSET)).where(frame.notna())


def onsets(found: Window, step: int) -> pd.DataFrame:
    """Return when each tensor moved, the first first, and of several those with the larger gradient.

    Args:
        found: what was recorded around the spike.
        step: first step of the spike.

    Returns:
        Indexed by site, those alone that have moved: onset, the step from which on one of its numbers stays `ONSET`
        robust standard deviations and `GROWN` times above its base, until the spike; of, which ("gradient", "update"
        or "rms_t"); share, its part of the squared gradient norm at the onset; growth, the largest growth of the
        gradient until the spike.
    """
    until = found.gradient.index[found.gradient.index <= step]
    square = found.gradient.loc[until] ** 2
    grown = found.gradient.loc[until].tail(BEFORE).max() / found.gradient.loc[found.base].median()
    rows: dict[str, tuple[int, str]] = {}
    for of, frame in (("gradient", found.gradient), ("update", found.update), ("rms_t", found.rms_t)):
        high = scores(frame, found.base).loc[until] > ONSET
        for site in map(str, frame.columns):
            since = _since(high[site])
            if since is not None and (site not in rows or since < rows[site][0]):
                rows[site] = since, of
    share = square.div(square.sum(axis=1), axis=0)
    told = [
        {"onset": since, "of": of, "share": share.at[since, site], "growth": grown[site]}
        for site, (since, of) in rows.items()
    ]
    moved = pd.DataFrame(told, index=list(rows), columns=["onset", "of", "share", "growth"])
    return moved.sort_values(["onset", "share"], ascending=[True, False], kind="stable")


def first(holds: pd.Series) -> int:
    """Return the first step at which a condition holds; it does at one at least."""
    return int(holds.index.to_numpy()[holds.to_numpy(bool)][0])


def _since(high: pd.Series) -> int | None:
    """Return the first step of the last stretch that is high up to the end, but for pauses of `_PAUSE` steps."""
    at = high.index[high.to_numpy(bool)].to_numpy()
    if not len(at) or high.index[-1] - at[-1] > 0:
        return None
    apart = np.flatnonzero(np.diff(at) > _PAUSE + 1)
    return int(at[apart[-1] + 1 if len(apart) else 0])
