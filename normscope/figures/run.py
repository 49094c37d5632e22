"""Pictures of the run itself: loss, gradient norm, learning rate."""

from __future__ import annotations

import numpy as np
import pandas as pd

from normscope.core.figure import Figure
from normscope.core.record import Record
from normscope.figures.frames import MOST_CURVES, curve, rules, tidy

_SKIPPED, _NON_FINITE = "skipped step", "NaN or infinity from here"


def _loss(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    del sites  # one loss for the whole model
    return _by_step(record, "loss", LOSS.columns)


def _norm(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    del sites  # one norm for the whole model
    columns = GRADIENT_NORM.columns
    steps = record.context.drop_duplicates("step")
    skipped = steps.loc[steps["skipped"].astype(bool), "step"]
    return tidy([_by_step(record, "grad_norm", columns), rules(columns, skipped, _SKIPPED)], columns)


def _divergence(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    """Loss and gradient norm on one axis, and the first step at which either is lost for good."""
    del sites  # one loss for the whole model
    columns = DIVERGENCE.columns
    parts = [_by_step(record, column, columns) for column in ("loss", "grad_norm")]
    names = ("loss", "gradient norm")
    shown = [part[part["curve"] == columns[1]].assign(curve=name) for part, name in zip(parts, names, strict=True)]
    lost = [
        part.loc[part["curve"] == _NON_FINITE, "step"].max()
        for part, values in zip(parts, shown, strict=True)
        if len(values) and np.isnan(values[columns[1]].iloc[-1])
    ]
    return tidy([*shown, rules(columns, min(lost) if lost else [], _NON_FINITE)], columns)


def _rates(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    """Learning rates by step; groups with the same one share a curve."""
    del sites  # the schedule is the whole run's
    rows, columns = record.context.dropna(subset=["lr"]), LEARNING_RATE.columns
    curves: dict[bytes, pd.DataFrame] = {}
    for (optimizer, group), part in rows.groupby(["optimizer", "group"], sort=False):
        values = part["lr"].to_numpy(float)
        label = f"{optimizer}, group {group:.0f}"
        curves.setdefault(values.tobytes(), curve(columns, part["step"].to_numpy(), values, label))
    return tidy(list(curves.values())[:MOST_CURVES], columns)


def _by_step(record: Record, column: str, columns: tuple[str, ...]) -> pd.DataFrame:
    steps = record.context.drop_duplicates("step").sort_values("step")
    values, at = steps[column].to_numpy(float), steps["step"].to_numpy()
    finite = np.isfinite(values)
    if not finite.any():
        return tidy([], columns)
    # NaN is stored like "not given": where the first steps have a value every step has, and NaN means NaN
    broken = ~finite if finite[:2].all() else np.isinf(values)
    begins = broken & ~np.append(False, broken[:-1]) & ~steps["skipped"].to_numpy(bool)
    shown = curve(columns, at, np.where(finite, values, np.nan), columns[1])
    return tidy([shown, rules(columns, at[begins], _NON_FINITE)], columns)


LOSS = Figure(
    id="run.loss",
    title="Loss",
    explains=(),
    prepare=_loss,
    columns=("step", "loss", "curve"),
    x_label="step",
    y_label="loss",
    rules=(_NON_FINITE,),
)
DIVERGENCE = Figure(
    id="run.divergence",
    title="Loss and gradient norm, up to where they break",
    explains=("run.diverged",),
    prepare=_divergence,
    columns=("step", "loss", "curve"),
    x_label="step",
    y_label="loss, L2 norm of the gradient",
    reading="Where both climb together the steps are too large; where the gradient jumps alone, look at that batch.",
    rules=(_NON_FINITE,),
)
GRADIENT_NORM = Figure(
    id="run.gradient-norm",
    title="Gradient norm",
    explains=("run.skipped-steps",),
    prepare=_norm,
    columns=("step", "norm", "curve"),
    x_label="step",
    y_label="L2 norm over all parameters",
    reading="A skipped step had a gradient that was not finite; a few, while the loss scale settles, are normal.",
    log_y=True,
    rules=(_SKIPPED, _NON_FINITE),
)
LEARNING_RATE = Figure(
    id="run.learning-rate",
    title="Learning rate",
    explains=(),
    prepare=_rates,
    columns=("step", "rate", "group"),
    x_label="step",
    y_label="learning rate",
)
