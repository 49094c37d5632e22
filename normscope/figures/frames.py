"""Building blocks of figures: tidy frames of curves over steps and over depth."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import pandas as pd

from normscope.core.figure import Figure
from normscope.core.record import Record
from normscope.metrics import tables

MOST_CURVES = 4
_OPEN = "loss"  # what is drawn logarithmically only where its range asks for it
_WIDE = 1e3


def tidy(parts: Iterable[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """Put curves together.

    Args:
        parts: frames with `columns`, empty ones included.
        columns: names of the columns, in order.

    Returns:
        One frame with exactly `columns`; without rows where every part is empty.
    """
    filled = [part[list(columns)] for part in parts if len(part)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(columns))


def curve(columns: Sequence[str], x: object, y: object, name: str, *details: object) -> pd.DataFrame:
    """Return one curve: a row a point, the name and the details repeated.

    Args:
        columns: names of the columns: x, y, curve, details.
        x: positions.
        y: values, or one value for all positions.
        name: name of the curve.
        details: one value or array for each further column.

    Returns:
        The frame.
    """
    return pd.DataFrame(dict(zip(columns, (x, y, name, *details), strict=True)))


def rules(columns: Sequence[str], x: object, name: str) -> pd.DataFrame:
    """Return places on the x axis: rows without y.

    Args:
        columns: names of the columns: x, y, curve, details.
        x: the places.
        name: what they are.

    Returns:
        The frame; details are empty.
    """
    places = np.atleast_1d(np.asarray(x))
    return curve(columns, places, np.nan, name, *[""] * (len(columns) - 3))


def at_slot(sites: Iterable[str], slot: str, known: Iterable[Hashable]) -> list[str]:
    """Return what the same modules have at another slot, each once, in the order given.

    Args:
        sites: sites or modules, as "layer1.bn/output".
        slot: the slot wanted, as "running".
        known: the sites to choose from; one of a module called several times may be kept for all its calls.

    Returns:
        The sites found.

    >>> at_slot(["bn#1/output", "fc"], "running", ["bn/running"])
    ['bn/running']
    """
    choice = set(known)
    modules = [site.rpartition("/")[0] if "/" in site else site for site in sites]
    wanted = [[f"{module}/{slot}", f"{module.partition('#')[0]}/{slot}"] for module in modules]
    found = [next((site for site in options if site in choice), "") for options in wanted]
    return [site for site in dict.fromkeys(found) if site]


def outputs(sites: Iterable[str], known: Iterable[Hashable]) -> list[str]:
    """Return the outputs of the modules that the sites belong to, each once; an output stands for itself.

    Args:
        sites: any sites, the most important first.
        known: the sites to choose from.

    Returns:
        Outputs among them, in the order given.

    >>> outputs(["bn/running", "fc/output.1"], ["bn/output", "fc/output", "fc/output.1"])
    ['bn/output', 'fc/output.1']
    """
    choice = [site for site in map(str, known) if site.rpartition("/")[2].startswith("output")]
    found = [[site] if site in choice else at_slot([site], "output", choice) for site in sites]
    return list(dict.fromkeys(site for options in found for site in options))


def logarithmic(figure: Figure, frame: pd.DataFrame) -> bool:
    """Say whether y is drawn logarithmically: where the figure says so, and for a loss that spans more than 1e3.

    Args:
        figure: the figure.
        frame: its prepared frame.

    Returns:
        True or False; a loss that is negative somewhere stays linear.
    """
    if figure.log_y or figure.columns[1] != _OPEN:
        return figure.log_y
    values = frame[_OPEN].to_numpy(float)
    positive = values[np.isfinite(values) & (values > 0)]
    return len(positive) > 0 and not (values < 0).any() and bool(positive.max() / positive.min() > _WIDE)


def by_step(values: pd.DataFrame, sites: Iterable[str], columns: Sequence[str]) -> pd.DataFrame:
    """Return values by step, a curve a site, at most `MOST_CURVES` of them.

    Args:
        values: a row a step, a column a site, as `metrics.tables.table` returns it.
        sites: the sites, the most important first; those without a value are passed over.
        columns: names of the columns: step, value, site.

    Returns:
        The frame.
    """
    shown = [site for site in dict.fromkeys(sites) if site in values and values[site].notna().any()][:MOST_CURVES]
    series = {site: values[site].dropna() if values[site].isna().mean() > 0.5 else values[site] for site in shown}
    return tidy((curve(columns, part.index, part.to_numpy(float), site) for site, part in series.items()), columns)


def over_depth(values: pd.DataFrame, sites: Sequence[str], columns: Sequence[str], rule: str) -> pd.DataFrame:
    """Return values over depth, a curve a step: the first, the middle and the last one.

    The last is the last step at which half of the layers are finite, so that a run that ended in NaN still shows how
    it got there.

    Args:
        values: a row a step, a column a site, in order of execution.
        sites: sites to point at, the worst first; the first that has a value gets a rule.
        columns: names of the columns: layer (position in the order of execution), value, step, site.
        rule: name of the rule.

    Returns:
        The frame.
    """
    measured = values.dropna(axis=1, how="all")
    finite = measured[np.isfinite(measured).mean(axis=1) >= 0.5]
    if finite.empty:
        return tidy([], columns)
    names, layers = list(finite.columns), np.arange(finite.shape[1])
    chosen = dict.fromkeys((0, (len(finite) - 1) // 2, len(finite) - 1))
    parts = [curve(columns, layers, finite.iloc[i].to_numpy(float), f"step {finite.index[i]}", names) for i in chosen]
    pointed = [names.index(site) for site in outputs(sites, names)[:1]]
    return tidy([*parts, rules(columns, pointed, rule)], columns)


def last_array(record: Record, site: str, stat: str, slot: str) -> tuple[int, np.ndarray]:
    """Return the last per-channel array that holds a finite value.

    Args:
        record: the record of one run.
        site: the site.
        stat: the statistic.
        slot: glob over slots that the site's one matches.

    Returns:
        The step and the values [channels]; (-1, an empty array) where there is none.
    """
    steps, values = tables.arrays(record, stat, slot=slot).get(site, (np.empty(0), np.empty((0, 0))))
    kept = np.flatnonzero(np.isfinite(values).any(axis=1))
    return (int(steps[kept[-1]]), values[kept[-1]]) if len(kept) else (-1, np.empty(0))
