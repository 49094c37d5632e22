"""Summary: states of one step to the scalars and per-channel arrays of the record, vectorized over sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


Pooled = Callable[[dict[str, np.ndarray], np.ndarray], dict[str, np.ndarray]]

_POWER = {"mean": 1, "var": 2, "rms": 1, "max": 1}  # power of the loss scale in each statistic of a gradient


def _moments(states: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    stats = moments.compute(states)
    return stats, moments.pooled(stats) | {"count": states[..., 0, 0]}


def _tails(states: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    stats = tails.compute(states)
    return stats, tails.pooled(stats, states)


_PROBES = {"moments": _moments, "tails": _tails}


def summarize(probe: str, sites: Sequence[tuple[str, str]], states: Sequence[np.ndarray], scale: float) -> list[Row]:
    """Summarize the states of one probe at many sites.

    Args:
        probe: "moments" or "tails".
        sites: (site, role) of each state.
        states: state [k, C] of each; C differs between sites.
        scale: loss scale by which gradients are divided.

    Returns:
        One row a site and role, in the order given.
    """
    rows: list[Row | None] = [None] * len(states)
    alike = [(state.shape[1], probe == "tails" and bool(state[-1, 0])) for state in states]
    for width, bounded in dict.fromkeys(alike):
        here = [i for i, kind in enumerate(alike) if kind == (width, bounded)]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            stats, scalars = _PROBES[probe](np.stack([states[i] for i in here]))
            if probe == "tails" and not bounded:
                del stats["saturated"], scalars["saturated"]
            if scale != 1.0:
                divisor = np.array([scale if sites[i][1] == "gradient" else 1.0 for i in here])
                stats = {name: value / divisor[:, None] ** _POWER.get(name, 0) for name, value in stats.items()}
                scalars = {name: value / divisor ** _POWER.get(name, 0) for name, value in scalars.items()}
        ends = extremes(np.concatenate(list(stats.values())))
        for k, name in enumerate(stats):
            for suffix, extreme in zip(EXTREMES, ends, strict=True):
                scalars[f"{name}.{suffix}"] = extreme[k * len(here) : (k + 1) * len(here)]
        table = np.stack(list(scalars.values()), axis=1)
        names = tuple(scalars)
        for k, i in enumerate(here):
            rows[i] = Row(*sites[i], names, table[k], {name: values[k] for name, values in stats.items()})
    return [row for row in rows if row is not None]


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
