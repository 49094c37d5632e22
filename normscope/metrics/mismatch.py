"""Mismatch: whether the running statistics that inference uses are those that training normalizes with."""

from __future__ import annotations

import numpy as np
import pandas as pd

from normscope.core.estimate import Estimate, Status
from normscope.core.record import Record
from normscope.metrics import tables

_DEFAULT_MOMENTUM = 0.1  # torch's own, assumed where a record does not say


def expected_drift(samples: float, momentum: float) -> float:
    """Return the drift that sampling alone brings about: E[KL] of a batch from statistics of the same population.

    To second order KL = (d_mean^2 / var + d_var^2 / (2 var^2)) / 2 with d the difference of batch and running
    statistics. For n independent Gaussian samples both terms together have expectation 1 / n from the batch and m / (2
    - m) / n from the running average of weights m (1 - m)^k.

    Args:
        samples: independent samples n in a batch; the number of images where pixels are correlated.
        momentum: weight m of the newest batch.

    Returns:
        (1 + m / (2 - m)) / n, in nats.

    >>> round(expected_drift(64, 0.1), 4)
    0.0164
    """
    return (1 + momentum / (2 - momentum)) / samples


@tables.once
def running_layers(record: Record) -> pd.DataFrame:
    """Return the layers with running statistics: how they are set, and how far batches are from them.

    Args:
        record: record of one run.

    Returns:
        Indexed by site "<module>/running", in order of execution, with columns momentum (NaN for a cumulative average),
        eps, shared (whether it runs more than once in a forward pass), batch (samples in its batch), training (1 or 0,
        in the late window), updates (batches that its statistics have seen so far), steps (of the record), initial, the
        weight (1 - m)^updates that their initial values still have, and from `drift` its value and `expected`.
    """
    updates = tables.table(record, "updates", slot="running")
    training = tables.late_medians(tables.table(record, "training", slot="running")).set_index("site")["value"]
    batch = tables.late_medians(tables.table(record, "batch", slot="input")).set_index("site")["value"]
    divergence = tables.table(record, "drift.q50", slot="running")
    sites = list(dict.fromkeys([*map(str, divergence), *map(str, updates), *training.index]))
    modules = [tables.module_of(site) for site in sites]
    parts = tables.layers(record).reindex(modules).set_axis(sites)
    momentum = pd.to_numeric(parts["momentum"], errors="coerce")
    momentum = momentum if "momentum" in record.sites else momentum.fillna(_DEFAULT_MOMENTUM)
    steps = float(record.steps[-1] - record.steps[0] + 1) if len(record.steps) else 0.0
    images = float(tables.context(record)["batch_size"].astype(float).median())
    last = updates.ffill().tail(1).sum(min_count=1).reindex(sites).fillna(steps)
    samples = batch.reindex([f"{module}/input" for module in modules]).set_axis(sites).fillna(images).clip(lower=1)
    late = tables.late_medians(divergence.iloc[len(divergence) // 2 :]).set_index("site")["value"].reindex(sites)
    weight = momentum.fillna(1 / last.clip(lower=1)).clip(0, 1)
    return pd.DataFrame(
        {
            "momentum": momentum,
            "eps": pd.to_numeric(parts["eps"], errors="coerce"),
            "shared": parts["calls"] > 1,
            "batch": samples,
            "training": training.reindex(sites),
            "updates": last,
            "steps": steps,
            "initial": ((1 - momentum.clip(0, 1)) ** last).fillna(0.0),
            "drift": late,
            "expected": [expected_drift(n, m) for n, m in zip(samples, weight, strict=True)],
        },
        index=pd.Index(sites, name="site"),
    )


def drift(record: Record) -> pd.DataFrame:
    """Return the divergence of the batch from the running statistics: of the median channel, in the late window.

    KL(batch || running) = 1/2 [ln(var_r / var_b) + (var_b + (mean_b - mean_r)^2) / var_r - 1], in nats. The first half
    of the run, in which running statistics still hold their initial values, is left out.

    Args:
        record: record of one run.

    Returns:
        Estimates by site, with a column `expected`: what sampling alone brings about (see `expected_drift`), NaN where
        the batch size is unknown.
    """
    divergence = tables.table(record, "drift.q50", slot="running")
    frame = tables.late_medians(divergence.iloc[len(divergence) // 2 :])
    return frame.assign(expected=running_layers(record)["expected"].reindex(frame["site"]).to_numpy(float))


def stillness(record: Record) -> pd.DataFrame:
    """Return for how long the running statistics have not moved although the layer was in training mode.

    Args:
        record: record of one run.

    Returns:
        Estimates by site: the fraction of the intervals between sampled steps, counted from the end; n is the number of
        intervals. Column `since` is the first step of that time.
    """
    tracked = {name: tables.table(record, name, slot="running") for name in ("updates", "change", "training")}
    rows, since = [], []
    for site in dict.fromkeys([*tracked["updates"], *tracked["change"]]):
        updates, change, training = (tracked[name].get(site, pd.Series(dtype=float)) for name in tracked)
        mode = training.iloc[1:]
        counted, moved = updates.dropna().diff().reindex(mode.index), change.reindex(mode.index)
        still = ((counted.eq(0) | moved.eq(0)) & mode.eq(1))[counted.notna() | moved.notna()]
        start = tables.onset(still)
        length = 0 if start is None else int((still.index >= start).sum())
        rows.append((str(site), length / max(len(still), 1), 0.0, len(still)))
        since.append(-1 if start is None else start)
    return tables.estimates(rows).assign(since=since)


def extra_updates(record: Record) -> pd.DataFrame:
    """Return by what factor running statistics were updated more often than the layer ran in training.

    factor = batches tracked between the first and the last sampled step / (steps between them * training forwards a
    step)

    Args:
        record: record of one run.

    Returns:
        Estimates by site, 1 where each training forward updated them once, NaN where batches are not tracked or the
        number of forwards varies; columns `recomputed` and `silent`, such forwards a sampled step in the mean, and
        `silent_steps`, the number of sampled steps with silent ones; silent forwards count only at layers that train as
        well, which those of a teacher network do not.
    """
    names = ("calls", "recomputed", "silent", "updates")
    tracks = (tables.table(record, name, slot="running") for name in names)
    calls, recomputed, silent, updates = (table.where(np.isfinite(table)) for table in tracks)
    rows, means = [], []
    for site in dict.fromkeys([*calls, *recomputed, *silent]):
        tracked = updates[site].dropna() if site in updates else pd.Series(dtype=float)
        made = calls[site].dropna() if site in calls else pd.Series(dtype=float)
        steps = tracked.index[-1] - tracked.index[0] if len(tracked) > 1 else 0
        regular = len(made) > 0 and made.min() == made.max() > 0
        value = (tracked.iloc[-1] - tracked.iloc[0]) / (steps * made.iloc[0]) if steps and regular else np.nan
        rows.append((str(site), float(value), 0.0, int(steps)))
        again, quiet = (f[site].fillna(0.0) if site in f else pd.Series([0.0]) for f in (recomputed, silent))
        quiet = quiet if len(made) and made.max() > 0 else 0 * quiet
        means.append((float(again.mean()), float(quiet.mean()), int((quiet > 0).sum())))
    table = pd.DataFrame(means, columns=["recomputed", "silent", "silent_steps"])
    return pd.concat([tables.estimates(rows), table], axis=1)


def small_variance(record: Record) -> pd.DataFrame:
    """Return the fraction of channels whose running variance is below the layer's eps, at the last step that kept it.

    Args:
        record: record of one run.

    Returns:
        Estimates by site; n is the number of channels; column `gain` is the largest 1 / sqrt(var + eps), by which
        inference multiplies a channel.
    """
    eps = running_layers(record)["eps"]
    rows, gains = [], []
    for site, (_, variances) in tables.arrays(record, "var", slot="running").items():
        last = variances[-1][np.isfinite(variances[-1])]
        floor = float(eps.get(site, np.nan))
        floor = 0.0 if np.isnan(floor) else floor
        rows.append((site, float((last <= floor).mean()) if len(last) else np.nan, 0.0, len(last)))
        with np.errstate(divide="ignore"):
            gains.append(float(np.max(1 / np.sqrt(last + floor), initial=0.0)))
    return tables.estimates(rows).assign(gain=gains)


def gap(record: Record) -> Estimate:
    """Return how far the model's output with running statistics lies from that with batch statistics, on held batches.

    gap = |y_batch - y_population|_2 / |y_batch|_2, at the last step at which it was measured.

    Args:
        record: record of one run, attached with a problem.

    Returns:
        The gap, with n the number of samples.
    """
    values = tables.table(record, "gap", phase="population")
    samples = tables.table(record, "n", phase="population")
    if not len(values) or not values.shape[1]:
        return Estimate.missing(Status.NOT_RECORDED, "ioffe2017")
    value = _cell(values)
    n = _cell(samples) if len(samples) else np.nan
    status = Status.SAMPLED if np.isfinite(value) else Status.NON_FINITE
    return Estimate(value, n=int(n) if np.isfinite(n) else 0, status=status, source="ioffe2017")


def losses(record: Record) -> tuple[float, float]:
    """Return the loss on held batches with batch and with running statistics, at the last step that has both.

    Args:
        record: record of one run, attached with a problem.

    Returns:
        Both losses; NaN where they were not measured.
    """
    pair = [tables.table(record, "loss", phase=phase) for phase in ("batch", "population")]
    if any(not len(frame) or not frame.shape[1] for frame in pair):
        return np.nan, np.nan
    both = pd.concat([frame.iloc[:, 0] for frame in pair], axis=1).dropna()
    return (_cell(both), _cell(both.iloc[:, 1:])) if len(both) else (np.nan, np.nan)


def _cell(frame: pd.DataFrame) -> float:
    """Return the last value of the first column."""
    return float(frame.to_numpy(float)[-1, 0])
