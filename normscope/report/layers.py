"""The table of layers: one row an output, with what is known of its module and what was last measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from normscope.core.record import Record
from normscope.metrics import scale, tables, tokens
from normscope.report.text import number


@dataclass(frozen=True)
class Cell:
    """A cell of the table: what it shows, and the number by which it is sorted, None for a text."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Layer:
    """A row of the table: the site and a cell for each of `COLUMNS`."""

    site: str
    cells: tuple[Cell, ...]


COLUMNS: tuple[tuple[str, bool], ...] = (
    ("class", False),
    ("shape", True),
    ("norm", False),
    ("eps", True),
    ("momentum", True),
    ("parameters", True),
    ("last rms", True),
    ("gradient rms", True),
    ("dead", True),
    ("largest gain", True),
)
_PLACED = {"branch": "post, on the branch", "qk": "of queries and keys", "first": "before the blocks"}


def layers(record: Record) -> list[Layer]:
    """Return the rows of the table, in order of execution.

    Args:
        record: any record; sites of several runs are told apart by the name of the run.

    Returns:
        One row an output.
    """
    several = len(record.runs) > 1
    return [
        Layer(f"{part.names[0]}: {layer.site}" if several else layer.site, layer.cells)
        for part in tables.split(record)
        for layer in _layers(part)
    ]


def _layers(record: Record) -> list[Layer]:
    known = tables.attributes(record)
    groups = record.sites.reindex(columns=["site", "groups"]).drop_duplicates("site", keep="last").set_index("site")
    rms, gradient = _last(record, "rms", "value"), _last(record, "rms", "gradient")
    dead, sizes = _last(record, "dead", "value"), _parameters(known)
    placed, gains = tokens.placements(record), scale.gains(record)
    gains.index = [tables.module_of(str(site)) for site in gains.index]
    rows = []
    outputs = [str(slot).startswith("output") for slot in known["slot"]]
    for site, row in known[outputs].iterrows():
        name = str(site)
        if row["module"] == "" and name not in rms:
            continue  # the whole model's output, of which only the loss is known
        cells = (
            Cell(_text(row["class"])),
            _shape(row["shape"]),
            Cell(_norm(row["norm"], groups["groups"].get(site), placed.get(str(row["module"]), ""))),
            _number(row["eps"]),
            _momentum(row),
            _number(sizes.get(str(row["module"]))),
            _number(rms.get(name), measured=name in rms),
            _number(gradient.get(name), measured=name in gradient),
            _number(dead.get(name)),
            _gain(gains, str(row["module"])),
        )
        rows.append(Layer(name, cells))
    return rows


def _last(record: Record, stat: str, role: str) -> dict[str, float]:
    """Return a statistic of each output at the last step at which the output was measured."""
    found: dict[str, tuple[int, float]] = {}
    for block in record.blocks:
        if (block.phase, block.role) == ("train", role) and stat in block.stats and len(block.steps):
            last = (int(block.steps[-1]), float(block.values[-1, block.stats.index(stat)]))
            found[block.site] = max(found.get(block.site, last), last, key=lambda entry: entry[0])
    return {site: value for site, (_, value) in found.items()}


def _parameters(known: pd.DataFrame) -> dict[str, int]:
    """Count the parameters of each module."""
    sizes: dict[str, int] = {}
    for slot, module, shape in zip(known["slot"], known["module"], known["shape"], strict=True):
        if not slot.startswith("output") and slot not in ("input", "running") and isinstance(shape, list):
            sizes[module] = sizes.get(module, 0) + math.prod(shape)
    return sizes


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _norm(kind: object, groups: object, place: str) -> str:
    several = isinstance(groups, (int, float)) and np.isfinite(groups) and groups > 1
    name = f"{_text(kind)} ({groups:.0f} groups)" if several else _text(kind)
    return f"{name}: {_PLACED.get(place, place)}" if place else name


def _gain(gains: pd.DataFrame, module: str) -> Cell:
    """Return how far the largest gain has drifted, sorted by the factor."""
    if module not in gains.index:
        return Cell("", -1)
    first, last = float(gains["first_max"][module]), float(gains["last_max"][module])
    return Cell(f"{number(first)} → {number(last)}", last / first if first > 0 else math.inf)


def _shape(value: object) -> Cell:
    if not isinstance(value, list):
        return Cell("", -1)
    return Cell(" × ".join(map(str, value)), float(math.prod(value)))


def _momentum(row: pd.Series) -> Cell:
    if row["has_running"] is True and pd.isna(row["momentum"]):
        return Cell("cumulative", 0)
    return _number(row["momentum"])


def _number(value: object, measured: bool = False) -> Cell:
    if not isinstance(value, (int, float)) or (math.isnan(value) and not measured):
        return Cell("", -1)
    return Cell(number(value), float(value) if math.isfinite(value) else math.inf)
