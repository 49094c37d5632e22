"""Summary: states of one step to the scalars and per-channel arrays of the record, vectorized over sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from types import ModuleType
from typing import NamedTuple

import numpy as np

from normscope.probes import moments, tails

EXTREMES = ("min", "q50", "max")


class Row(NamedTuple):
    """What one probe has found at one site in a step.

    Attributes:
        site: the site.
        role: "value" or "gradient".
        stats: names of the scalars.
        values: [len(stats)] the scalars.
        arrays: per-channel arrays by statistic.
    """

    site: str
    role: str
    stats: tuple[str, ...]
    values: np.ndarray
    arrays: Mapping[str, np.ndarray]


_POWER = {"mean": 1, "var": 2, "rms": 1, "max": 1}  # power of the loss scale in each statistic of a gradient
_PROBES: Mapping[str, ModuleType] = {"moments": moments, "tails": tails}
_BOUNDED = "saturated"  # only bounded activations have it


def summarize(probe: str, sites: Sequence[tuple[str, str]], states: Sequence[np.ndarray], scale: float) -> list[Row]:
    """Summarize the states of one probe at many sites, all channels side by side.

    Args:
        probe: "moments" or "tails".
        sites: (site, role) of each state.
        states: state [k, C] of each; C differs between sites.
        scale: loss scale by which gradients are divided.

    Returns:
        One row a site and role, in the order given.
    """
    if not states:
        return []
    order = sorted(range(len(states)), key=lambda i: states[i].shape[1])  # equal widths beside each other
    widths = [states[i].shape[1] for i in order]
    ends = np.cumsum(widths)
    joined = np.concatenate([states[i] for i in order], axis=1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        stats = _PROBES[probe].compute(joined)
        scalars = _PROBES[probe].pooled(stats, joined, ends - widths)
        if scale != 1.0:
            divisor = np.array([scale if sites[i][1] == "gradient" else 1.0 for i in order])
            scalars = _divided(scalars, divisor)
            stats = _divided(stats, np.repeat(divisor, widths))
        table = np.stack(list(stats.values())).astype(np.float32)  # what the record keeps, and sorts twice as fast
        pool = np.stack(list(scalars.values())).astype(np.float32)
    values = np.concatenate((pool, *_segment_extremes(table, widths, ends - widths))).T
    names = (*scalars, *(f"{name}.{suffix}" for suffix in EXTREMES for name in stats))
    free = [k for k, name in enumerate(names) if not name.startswith(_BOUNDED)]
    free_names, free_values = tuple(names[k] for k in free), values[:, free]
    rows: dict[int, Row] = {}
    for k, (i, end, width) in enumerate(zip(order, ends, widths, strict=True)):
        bounded = probe == "tails" and states[i][-1, 0] > 0
        arrays = {n: v[end - width : end] for n, v in zip(stats, table, strict=True) if bounded or n != _BOUNDED}
        rows[i] = Row(*sites[i], names if bounded else free_names, values[k] if bounded else free_values[k], arrays)
    return [rows[i] for i in range(len(states))]


def joined(rows: Sequence[Row]) -> list[Row]:
    """Join the rows of one site and role that several probes have found, so that the store writes one.

    Args:
        rows: rows in any order.

    Returns:
        One row a site and role, in the order of their first.
    """
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        known = found.get((row.site, row.role))
        if known is not None:
            values = np.concatenate((known.values, row.values))
            row = Row(row.site, row.role, known.stats + row.stats, values, {**known.arrays, **row.arrays})
        found[row.site, row.role] = row
    return list(found.values())


def _divided(stats: Mapping[str, np.ndarray], divisor: np.ndarray) -> dict[str, np.ndarray]:
    return {name: value / divisor ** _POWER.get(name, 0) for name, value in stats.items()}


def _segment_extremes(
    table: np.ndarray, widths: Sequence[int], starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return minimum, median and maximum of each segment of each row, of the values that are not NaN.

    Args:
        table: [k, channels].
        widths: [n] widths of the segments, increasing.
        starts: [n] where they begin.

    Returns:
        Three arrays [k, n].
    """
    medians = np.empty((len(table), len(widths)), table.dtype)
    at = 0
    for width, same in groupby(widths):
        n = len(list(same))
        block = table[:, starts[at] : starts[at] + n * width].reshape(-1, width)
        medians[:, at : at + n] = extremes(block)[1].reshape(len(table), n)
        at += n
    return np.fmin.reduceat(table, starts, axis=1), medians, np.fmax.reduceat(table, starts, axis=1)


def extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return minimum, median and maximum over the last axis, of the values that are not NaN.

    Args:
        values: [n, C].

    Returns:
        Three arrays [n]; NaN where all values are.
    """
    ordered = np.sort(values.astype(np.float32), axis=-1)  # what the record keeps, and twice as fast; NaN sorts last
    if not np.isnan(ordered[:, -1]).any():
        width = ordered.shape[1]
        return ordered[:, 0], 0.5 * (ordered[:, (width - 1) // 2] + ordered[:, width // 2]), ordered[:, -1]
    last = np.maximum((~np.isnan(ordered)).sum(-1) - 1, 0)
    rows = np.arange(len(ordered))
    median = 0.5 * (ordered[rows, last // 2] + ordered[rows, (last + 1) // 2])
    return ordered[:, 0], median, ordered[rows, last]


@np.errstate(all="ignore")  # a diverged run holds infinities
def channel_row(site: str, role: str, stats: Mapping[str, np.ndarray], scalars: Mapping[str, float]) -> Row:
    """Summarize per-channel statistics of one site: mean and extremes of each, then further scalars.

    Args:
        site: the site.
        role: "value", "gradient" or "update".
        stats: per-channel arrays by name.
        scalars: further scalars by name.

    Returns:
        The row; the mean of a statistic is under its bare name.
    """
    values: dict[str, float] = {}
    if stats:
        table = np.stack(list(stats.values()))
        for name, *numbers in zip(stats, table.mean(1), *extremes(table), strict=True):
            values |= zip((name, *(f"{name}.{suffix}" for suffix in EXTREMES)), map(float, numbers), strict=True)
    values |= scalars
    return Row(site, role, tuple(values), np.fromiter(values.values(), float, len(values)), dict(stats))
