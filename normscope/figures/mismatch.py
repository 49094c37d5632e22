"""Pictures of training against inference statistics."""

from __future__ import annotations

import numpy as np
import pandas as pd

from normscope.core.figure import Figure
from normscope.core.record import Record
from normscope.figures.frames import at_slot, by_step, curve, last_array, tidy
from normscope.metrics import mismatch, tables

_ONCE = "one update a training forward pass"
_EXPECTED = "expected from sampling alone"
_TRAINED, _KEPT = "of the batch, used in training", "running, kept for inference"


def _drift(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    columns, drift = DRIFT.columns, tables.table(record, "drift.q50", slot="running")
    sites = sites or tuple(mismatch.drift(record).sort_values("value", ascending=False)["site"].head(3))
    shown = by_step(drift, at_slot(sites, "running", drift), columns)
    if not len(shown):
        return shown
    expected = mismatch.drift(record).set_index("site")["expected"].get(shown["site"].iloc[0], np.nan)
    if not np.isfinite(expected):
        return shown
    return tidy([shown, curve(columns, [shown["step"].min(), shown["step"].max()], expected, _EXPECTED)], columns)


def _losses(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    del sites  # the loss is the whole model's
    columns, parts = LOSSES.columns, []
    for phase, name in (("batch", "batch statistics"), ("population", "running statistics")):
        losses = by_step(tables.table(record, "loss", phase=phase), ["/output"], columns)
        parts.append(losses.assign(**{columns[2]: name}))
    return tidy(parts, columns)


def _updates(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    columns, counts = UPDATES.columns, tables.table(record, "updates", slot="running")
    counted = by_step(counts, at_slot(sites, "running", counts), columns)
    if not len(counted):
        return counted
    start = counted.groupby("site")["updates"].transform("first")
    ends = np.array([counted["step"].min(), counted["step"].max()])
    calls = by_step(tables.table(record, "calls", slot="running"), counted["site"].iloc[:1], columns)["updates"]
    expected = curve(columns, ends, (ends - ends[0]) * (calls.median() if len(calls) else 1.0), _ONCE)
    return tidy([counted.assign(updates=counted["updates"] - start), expected], columns)


def _lag(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    columns, parts = LAG.columns, []
    for slot, name in (("input", _TRAINED), ("running", _KEPT)):
        values = tables.table(record, "var", slot=slot)
        parts.append(by_step(values, at_slot(sites[:1], slot, values), columns).assign(**{columns[2]: name}))
    return tidy(parts, columns)


def _variances(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    columns = VARIANCES.columns
    known = [item.site for item in record.channels]
    for site in at_slot(sites, "running", known):
        step, kept = last_array(record, site, "var", "running")
        if len(kept):
            order, ranks = np.argsort(kept), np.arange(len(kept))
            parts = [curve(columns, ranks, kept[order], f"running, at step {step}", order)]
            for other in at_slot([site], "input", known):
                _, seen = last_array(record, other, "var", "input")
                if len(seen) == len(kept):
                    parts.append(curve(columns, ranks, seen[order], "of the batch", order))
            eps = pd.to_numeric(tables.layers(record)["eps"], errors="coerce").get(tables.module_of(site), np.nan)
            if np.isfinite(eps):
                parts.append(curve(columns, [0, len(kept) - 1], eps, "eps", ""))
            return tidy(parts, columns)
    return tidy([], columns)


DRIFT = Figure(
    id="mismatch.drift",
    title="Running statistics against those of the batch",
    explains=("mismatch.running-statistics",),
    prepare=_drift,
    columns=("step", "drift", "site"),
    x_label="step",
    y_label="KL divergence in nats, median channel",
    reading="Drift far above its expectation: inference normalizes with numbers the layer was not trained with.",
    log_y=True,
    references=(_EXPECTED,),
)
LOSSES = Figure(
    id="mismatch.losses",
    title="Loss on the held batches, with either statistics",
    explains=("mismatch.train-eval-gap",),
    prepare=_losses,
    columns=("step", "loss", "statistics"),
    x_label="step",
    y_label="loss",
    reading="Same weights, same data: the distance between the curves is what the running statistics cost.",
)
UPDATES = Figure(
    id="mismatch.updates",
    title="Updates of the running statistics",
    explains=("mismatch.never-updated", "mismatch.updated-twice"),
    prepare=_updates,
    columns=("step", "updates", "site"),
    x_label="step",
    y_label="updates since the first sampled step",
    reading="A level curve is never updated; one twice as steep as the dashed line is updated twice for each batch.",
    references=(_ONCE,),
)
LAG = Figure(
    id="mismatch.lag",
    title="Variance of the batch and the running one",
    explains=("mismatch.momentum", "mismatch.evaluation-mode"),
    prepare=_lag,
    columns=("step", "var", "statistics"),
    x_label="step",
    y_label="variance, mean over channels",
    reading="A running variance that trails behind is averaged over too many steps; a level one is not updated at all.",
    log_y=True,
)
VARIANCES = Figure(
    id="mismatch.variances",
    title="Variance of every channel, in order of size",
    explains=("mismatch.tiny-variance",),
    prepare=_variances,
    columns=("rank", "var", "statistics", "channel"),
    x_label="channel, in order of its running variance",
    y_label="variance",
    reading="Inference divides by the root of this variance: what is tiny here is multiplied by a large number there.",
    log_y=True,
    mark="point",
    references=("eps",),
)
