"""Tables: the record of one run arranged for a metric, whatever is missing in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import pandas as pd

from normscope.core.estimate import Status
from normscope.core.record import Record

_ATTRIBUTES = (
    "module",
    "call",
    "slot",
    "class",
    "shape",
    "channels",
    "order",
    "predecessor",
    "activation",
    "norm",
    "eps",
    "momentum",
    "has_running",
    "note",
)
_CONTEXT = ("step", "sampled", "batch_size", "loss", "loss_scale", "grad_norm", "skipped", "lr")
LATE_FRACTION = 4  # the late window of a run is its last quarter


P = ParamSpec("P")
T = TypeVar("T")


def once(function: Callable[Concatenate[Record, P], T]) -> Callable[Concatenate[Record, P], T]:
    """Compute a function of a record once for each record and each set of arguments.

    Args:
        function: takes a record and hashable arguments.

    Returns:
        The same function; what it returned is kept with the record, and frames, series and dicts are handed out as
        shallow copies: a caller may add columns, but must not write into values.
    """

    @functools.wraps(function)
    def remembered(record: Record, /, *args: P.args, **kwargs: P.kwargs) -> T:
        memory = record.__dict__.setdefault("_remembered", {})
        key = (function.__module__, function.__qualname__, args, tuple(sorted(kwargs.items())))
        if key not in memory:
            memory[key] = function(record, *args, **kwargs)
        found: T = memory[key]
        if isinstance(found, (pd.DataFrame, pd.Series)):
            return found.copy(deep=False)  # type: ignore[return-value]  # of the same type
        return dict(found) if isinstance(found, dict) else found  # type: ignore[return-value]

    return remembered


def split(record: Record) -> list[Record]:
    """Split a record into one record a run; a record without a run stays as it is.

    Args:
        record: any record.

    Returns:
        One record a run, in the order of `record.runs`.
    """
    if len(record.runs) < 2:
        return [record]
    return [
        replace(
            record,
            runs=(run,),
            sites=record.sites[record.sites["run"] == name] if "run" in record.sites else record.sites,
            context=record.context[record.context["run"] == name] if "run" in record.context else record.context,
            events=record.events[record.events["run"] == name] if "run" in record.events else record.events,
            blocks=tuple(block for block in record.blocks if block.run == name),
            channels=tuple(item for item in record.channels if item.run == name),
        )
        for run, name in zip(record.runs, record.names, strict=True)
    ]


def at_rest(record: Record) -> bool:
    """Tell whether a model was looked at as it is, nothing trained.

    Args:
        record: record of one run.

    Returns:
        Whether the run says that it had no optimizer.
    """
    return any(run.get("optimizers") == [] for run in record.runs)


@once
def attributes(record: Record) -> pd.DataFrame:
    """Return what is known of the sites, indexed by site, in order of execution.

    Args:
        record: record of one run.

    Returns:
        The columns module, call, slot, class, shape, channels, order, predecessor, activation, norm, eps, momentum,
        has_running and note; where the record says nothing, "" for class, predecessor, activation and note, else NaN.
    """
    frame = record.sites.reindex(columns=["site", *_ATTRIBUTES])
    frame = frame.drop_duplicates("site", keep="last").set_index("site")
    frame["module"] = [module_of(str(site)) for site in frame.index]
    frame["slot"] = [str(site).rpartition("/")[2] for site in frame.index]
    for name in ("class", "predecessor", "activation", "note"):
        frame[name] = frame[name].astype(object).where(frame[name].notna(), "")
    frame["call"] = pd.to_numeric(frame["call"], errors="coerce").fillna(0)
    frame["order"] = pd.to_numeric(frame["order"], errors="coerce").astype(float)
    return frame.sort_values("order", kind="stable", na_position="last")


@once
def layers(record: Record) -> pd.DataFrame:
    """Return what is known of the modules, indexed by module: the first value that any of its sites has.

    Args:
        record: record of one run.

    Returns:
        The columns class, norm, eps, momentum, has_running, order, channels, and calls, how often the module runs in
        one forward pass.
    """
    known = attributes(record)
    columns = ["class", "norm", "eps", "momentum", "has_running", "order", "channels"]
    grouped = known.groupby("module", sort=False)
    return grouped[columns].first().assign(calls=grouped["call"].max() + 1)


@once
def table(
    record: Record, stat: str, *, slot: str = "output*", role: str = "value", phase: str = "train"
) -> pd.DataFrame:
    """Return one statistic of all sites: a row a sampled step, a column a site, in order of execution.

    Args:
        record: record of one run.
        stat: the statistic, as "rms" or "rms.max".
        slot: glob over slots.
        role: "value", "gradient" or "update".
        phase: "train", "batch", "population" or "noise".

    Returns:
        float64; NaN where a site was not measured at a step. Empty where nothing matches.
    """
    found = [
        block
        for block in record.blocks
        if (block.phase, block.role) == (phase, role)
        and stat in block.stats
        and fnmatchcase(block.site.rpartition("/")[2], slot)
    ]
    steps = np.unique(np.concatenate([block.steps for block in found])) if found else np.empty(0, np.int64)
    sites = _in_order(record, dict.fromkeys(block.site for block in found))
    column = {site: i for i, site in enumerate(sites)}
    values = np.full((len(steps), len(sites)), np.nan)
    for block in found:
        values[np.searchsorted(steps, block.steps), column[block.site]] = block.values[:, block.stats.index(stat)]
    return pd.DataFrame(values, index=pd.Index(steps, name="step"), columns=sites)


@once
def arrays(
    record: Record, stat: str, *, slot: str = "output*", role: str = "value", phase: str = "train"
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the per-channel arrays of one statistic at all sites, in order of execution.

    Args:
        record: record of one run.
        stat: the statistic, as "rms".
        slot: glob over slots.
        role: "value" or "gradient".
        phase: "train", "batch", "population" or "noise".

    Returns:
        site -> steps [n] and values [n, channels]; where the number of channels changed, only those of the last width.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for item in record.channels:
        wanted = (item.phase, item.role, item.stat) == (phase, role, stat)
        if wanted and fnmatchcase(item.site.rpartition("/")[2], slot) and item.values:
            width = len(item.values[-1])
            kept = [i for i, values in enumerate(item.values) if len(values) == width]
            found[item.site] = (item.steps[kept], np.stack([item.values[i] for i in kept]).astype(float))
    return {site: found[site] for site in _in_order(record, found)}


@once
def context(record: Record) -> pd.DataFrame:
    """Return the context of each step, indexed by step, without the parameter groups; missing columns are NaN.

    Args:
        record: record of one run.

    Returns:
        The columns sampled, batch_size, loss, loss_scale, grad_norm, skipped, lr (of the first group).
    """
    frame = record.context.reindex(columns=list(_CONTEXT)).drop_duplicates("step").sort_values("step")
    for name in ("sampled", "skipped"):
        frame[name] = frame[name].eq(True)
    return frame.set_index("step").astype({name: float for name in ("loss", "loss_scale", "grad_norm", "lr")})


def late(series: pd.Series) -> pd.Series:
    """Return the late window: the last quarter of the finite values, but three where there are as many.

    Args:
        series: values by step.

    Returns:
        Its finite values of the late window; empty where there is none.

    >>> late(pd.Series([1.0, 2.0, 3.0, 4.0, float("nan")])).tolist()
    [2.0, 3.0, 4.0]
    """
    finite = series.replace([np.inf, -np.inf], np.nan).dropna()
    return finite.tail(max(3, len(finite) // LATE_FRACTION))


def late_medians(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the median of each site's late window as a frame of estimates.

    Args:
        frame: a row a step, a column a site.

    Returns:
        One row a site; the standard error is that of a median of independent Gaussian values, 1.2533 s / sqrt(n).
    """
    rows = []
    for site, column in zip(frame.columns, frame.to_numpy(float).T, strict=True):
        finite = column[np.isfinite(column)]
        window = finite[-max(3, len(finite) // LATE_FRACTION) :]
        error = 1.2533 * float(window.std(ddof=1)) / len(window) ** 0.5 if len(window) > 1 else np.nan
        rows.append((str(site), float(np.median(window)) if len(window) else np.nan, error, len(window)))
    return estimates(rows)


def estimates(rows: Sequence[tuple[str, float, float, int]]) -> pd.DataFrame:
    """Return a tidy frame with one estimate a row.

    Args:
        rows: (site, value, standard error, n).

    Returns:
        Columns site, value, standard_error, n and status (see `normscope.core.estimate.Status`).
    """
    frame = pd.DataFrame(rows, columns=["site", "value", "standard_error", "n"])
    status = [
        Status.NOT_RECORDED if n == 0 else Status.SAMPLED if np.isfinite(value) else Status.NON_FINITE
        for value, n in zip(frame["value"], frame["n"], strict=True)
    ]
    return frame.assign(status=pd.Series(status, index=frame.index, dtype=object))


def onset(exceeds: pd.Series) -> int | None:
    """Return the first step from which a condition holds to the end.

    Args:
        exceeds: booleans by step, increasing.

    Returns:
        The step; None where the condition does not hold at the end.

    >>> onset(pd.Series([True, False, True, True], index=[0, 10, 20, 30]))
    20
    """
    if not len(exceeds) or not exceeds.iloc[-1]:
        return None
    broken = np.flatnonzero(~exceeds.to_numpy(bool))
    return int(exceeds.index[broken[-1] + 1 if len(broken) else 0])


def module_of(site: str) -> str:
    """Return the module of a site.

    >>> module_of("shared#1/output"), module_of("/output")
    ('shared', '')
    """
    return site.rpartition("/")[0].partition("#")[0]


def _in_order(record: Record, sites: Iterable[str]) -> list[str]:
    rank = _ranks(record)
    return sorted(sites, key=lambda site: rank.get(site, (np.inf, len(rank))))


@once
def _ranks(record: Record) -> dict[str, tuple[float, int]]:
    known = record.sites.reindex(columns=["site", "order"])
    stated = pd.to_numeric(known["order"], errors="coerce").fillna(np.inf)
    return {site: (order, i) for i, (site, order) in enumerate(zip(known["site"], stated, strict=True))}
