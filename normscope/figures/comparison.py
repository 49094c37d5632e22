"""Pictures of a comparison: entries over each other, each with a band over its seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from normscope.metrics.trial import Trial

COLUMNS = ("x", "y", "low", "high", "entry")


@dataclass(frozen=True)
class Overlay:
    """A picture of several entries: what `prepare` yields and how it is drawn.

    Attributes:
        id: its name.
        title: what it shows, a phrase.
        prepare: from trials to a tidy frame with `COLUMNS`, a curve an entry: the mean over seeds (of logarithms where
            y is logarithmic) and the least and the largest seed.
        x_label: label of the x axis, with unit.
        y_label: label of the y axis, with unit.
        reading: how to read it, a sentence.
        every_rate: whether it takes the trials of all learning rates, else those of each entry's best one.
        log_x: whether x is logarithmic.
        log_y: whether y is logarithmic.
        dots: whether points are marked, as they are few.
    """

    id: str
    title: str
    prepare: Callable[[Sequence[Trial]], pd.DataFrame]
    x_label: str
    y_label: str
    reading: str
    every_rate: bool = False
    log_x: bool = False
    log_y: bool = False
    dots: bool = False


def _training(trials: Sequence[Trial]) -> pd.DataFrame:
    rows = [(trial.entry, i, x, y) for trial in trials for i, (x, y) in enumerate(trial.curve)]
    return _banded(rows, logarithmic=False)


def _depth(trials: Sequence[Trial]) -> pd.DataFrame:
    rows = [(trial.entry, i, float(i), y) for trial in trials for i, (_, y) in enumerate(trial.profile)]
    return _banded([row for row in rows if row[3] > 0], logarithmic=True)


def _rates(trials: Sequence[Trial]) -> pd.DataFrame:
    """Final losses, no more than the first loss: what diverged counts as not trained."""
    starts = {t.entry: s for t in trials if t.done and np.isfinite(s := t.measured.get("initial_loss", np.nan))}
    rows = []
    for trial in trials:
        start = trial.measured.get("initial_loss", starts.get(trial.entry, np.nan))
        final = trial.measured.get("final_loss", np.nan) if trial.done else np.inf
        if np.isfinite(start) and not np.isnan(final) and np.isfinite(trial.rate):
            rows.append((trial.entry, trial.rate, trial.rate, min(final, start)))
    return _banded(rows, logarithmic=False)


def _banded(rows: Sequence[tuple[str, float, float, float]], logarithmic: bool) -> pd.DataFrame:
    """Return mean, least and largest over seeds of rows (entry, key, x, y); gaps where a seed is not finite."""
    frame = pd.DataFrame(list(rows), columns=["entry", "key", "x", "y"])
    if not len(frame):
        return pd.DataFrame(columns=list(COLUMNS))
    frame["y"] = frame["y"].where(np.isfinite(frame["y"]))
    frame["mean"] = np.log(frame["y"]) if logarithmic else frame["y"]
    groups = frame.groupby(["entry", "key"], sort=False)
    found = groups.agg(
        x=("x", "first"),
        y=("mean", lambda values: values.mean(skipna=False)),
        low=("y", lambda values: values.min(skipna=False)),
        high=("y", lambda values: values.max(skipna=False)),
    )
    found["y"] = np.exp(found["y"]) if logarithmic else found["y"]
    ordered = found.reset_index().sort_values("x", kind="stable")
    return ordered[list(COLUMNS)].reset_index(drop=True)


TRAINING = Overlay(
    id="training",
    title="Training loss, each entry at its best learning rate",
    prepare=_training,
    x_label="step",
    y_label="training loss",
    reading="Line: mean over seeds; band: least to largest seed. A curve ends where a seed is not finite.",
)
DEPTH = Overlay(
    id="conditioning",
    title="How unequal the directions of a layer's input are",
    prepare=_depth,
    x_label="layer, in order of execution",
    y_label="largest over median eigenvalue, κ₅₀",
    reading="Lower and flatter is easier to train. Late in the run; line: geometric mean over seeds; band: least to "
    "largest seed; left out: layers with less than two samples a feature.",
    log_y=True,
    dots=True,
)
RATES = Overlay(
    id="learning-rates",
    title="Final training loss over the learning rate",
    prepare=_rates,
    x_label="learning rate",
    y_label="final training loss, at most the first loss",
    reading="A wide flat valley needs no tuning: the table's sensitivity is the mean height above the lowest point.",
    every_rate=True,
    log_x=True,
    dots=True,
)
OVERLAYS: tuple[Overlay, ...] = (TRAINING, DEPTH, RATES)
