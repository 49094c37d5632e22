"""Maps: every statistic worth showing as a matrix of layers by steps, small enough for one page."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from normscope.core.record import Block, Record
from normscope.core.table import printable
from normscope.metrics import tables
from normscope.report.thin import edges, paired

COLUMNS = 600
CELLS = 330_000  # of all maps together: 1.8 MB in the page
BAND_CELLS = 90_000
FEWEST_COLUMNS = 24  # a map of very many layers keeps as many, and no bands where these would get fewer
MOST_BAND_COLUMNS = 200

PHASES: dict[str, str] = {
    "train": "training steps",
    "batch": "held batches, batch statistics",
    "population": "held batches, running statistics",
    "noise": "held samples, in many batches",
}


class Stat(NamedTuple):
    """A statistic worth showing: its name, its words, and whether its colors are "log", "linear" or "signed"."""

    name: str
    words: str
    scale: str


class Quantity(NamedTuple):
    """What a statistic is of: a group of sites in one role."""

    name: str
    slots: tuple[str, ...]
    role: str
    stats: tuple[Stat, ...]


_SIZE = (Stat("rms", "rms", "log"), Stat("max", "largest magnitude", "log"))
_BROKEN = Stat("nonfinite", "channels with NaN or infinity", "linear")
_MEAN, _VAR = Stat("mean", "mean", "signed"), Stat("var", "variance", "log")
_NORM = Stat("norm", "norm", "log")
_NOT_PARAMETERS = ("output*", "input", "running", "attention", "logits")

QUANTITIES: tuple[Quantity, ...] = (
    Quantity(
        "activations",
        ("output*",),
        "value",
        (
            *_SIZE,
            _MEAN,
            _VAR,
            Stat("dead", "fraction of dead channels", "linear"),
            Stat("zeros", "fraction of zeros", "linear"),
            Stat("saturated", "fraction saturated", "linear"),
            Stat("kurtosis", "kurtosis", "log"),
            _BROKEN,
        ),
    ),
    Quantity("gradients of activations", ("output*",), "gradient", (*_SIZE, _BROKEN)),
    Quantity(
        "input of norms",
        ("input",),
        "value",
        (
            _VAR,
            _MEAN,
            Stat("eps_weight", "share of eps", "linear"),
            Stat("peak1", "value of largest magnitude", "signed"),
        ),
    ),
    Quantity(
        "attention",
        ("attention",),
        "value",
        (
            Stat("logit", "largest logit of a head, mean over heads", "log"),
            Stat("entropy", "entropy over its largest value", "linear"),
            Stat("ceiling", "largest logit that queries and keys allow", "log"),
        ),
    ),
    Quantity(
        "running statistics",
        ("running",),
        "value",
        (Stat("drift", "drift from the batch", "log"), _VAR, _MEAN, Stat("change", "relative change", "log")),
    ),
    Quantity(
        "noise of norms",
        ("output*",),
        "value",
        (
            Stat("relative", "movement with the batch", "log"),
            Stat("mean_noise", "noise of the batch mean", "log"),
            Stat("var_noise", "noise of the batch variance", "log"),
        ),
    ),
    Quantity(
        "parameters",
        (),
        "value",
        (_NORM, Stat("value", "gain or bias", "signed"), Stat("trace", "trace of the Hessian", "signed")),
    ),
    Quantity("gradients of parameters", (), "gradient", (_NORM, Stat("cosine", "cosine with the weight", "signed"))),
    Quantity(
        "updates of parameters",
        (),
        "update",
        (
            _NORM,
            Stat("angle", "angle by which the weight turns", "log"),
            Stat("relative", "relative to the weight", "log"),
            Stat("radial", "relative, along the weight", "signed"),
        ),
    ),
)
# of these NaN means that a value was NaN; of the others that there is nothing to compute
_FINITE = frozenset({"mean", "var", "rms", "max", "norm", "value"})
_BANDS = ("min", "q50", "max")


@dataclass(frozen=True)
class Map:
    """One statistic of one quantity in one phase.

    Attributes:
        quantity: name of the quantity.
        stat: the statistic.
        phase: "train", "batch", "population" or "noise".
        sites: names of the rows, in order of execution.
        steps: [n] sampled steps.
        values: [rows, n] float32; NaN where nothing was measured, infinity where a value was NaN or infinite.
        bands: [3, rows, n] minimum, median and maximum over channels, NaN where the value is not finite; None where
            they were not recorded.
    """

    quantity: str
    stat: Stat
    phase: str
    sites: tuple[str, ...]
    steps: np.ndarray
    values: np.ndarray
    bands: np.ndarray | None

    @property
    def constant(self) -> float | None:
        """The value that every cell has, None where they differ."""
        first = self.values.flat[0]
        return float(first) if np.isfinite(first) and (self.values == first).all() else None


def maps(record: Record) -> list[Map]:
    """Collect the maps of a record.

    Args:
        record: any record; sites of several runs are told apart by the name of the run.

    Returns:
        The maps, in the order in which the page offers them.
    """
    several = len(record.runs) > 1
    order: dict[tuple[str, str], str] = {}
    for part in tables.split(record):
        run = part.names[0] if part.names else ""
        for site in tables.attributes(part).index:
            order[run, str(site)] = printable(f"{run}: {site}" if several else str(site))
    found: list[Map] = []
    for quantity in QUANTITIES:
        for phase in PHASES:
            blocks = [
                b for b in record.blocks if b.phase == phase and b.role == quantity.role and _belongs(b, quantity)
            ]
            found += _maps(quantity, phase, blocks, order)
    return found


def _belongs(block: Block, quantity: Quantity) -> bool:
    slot = block.site.rpartition("/")[2]
    if quantity.slots:
        return any(fnmatchcase(slot, pattern) for pattern in quantity.slots)
    return not any(fnmatchcase(slot, pattern) for pattern in _NOT_PARAMETERS)


def _maps(quantity: Quantity, phase: str, blocks: list[Block], order: dict[tuple[str, str], str]) -> Iterable[Map]:
    for stat in quantity.stats:
        holding = [block for block in blocks if stat.name in block.stats]
        present = {(block.run, block.site) for block in holding}
        rows = {key: i for i, key in enumerate(key for key in order if key in present)}
        if not rows:
            continue
        steps = np.unique(np.concatenate([block.steps for block in holding]))
        values = _matrix(holding, stat.name, rows, steps)
        if not (~np.isnan(values)).any():
            continue
        parts = [_matrix(holding, f"{stat.name}.{suffix}", rows, steps) for suffix in _BANDS]
        # where the layer's own value broke, the few channels left would pass for the layer
        bands = None if np.isnan(parts[1]).all() else np.where(np.isfinite(values), np.stack(parts), np.float32(np.nan))
        yield Map(quantity.name, stat, phase, tuple(order[key] for key in rows), steps, values, bands)


def _matrix(blocks: list[Block], stat: str, rows: dict[tuple[str, str], int], steps: np.ndarray) -> np.ndarray:
    values = np.full((len(rows), len(steps)), np.nan, np.float32)
    for block in blocks:
        row = rows.get((block.run, block.site))
        if row is not None and stat in block.stats:
            column = block.values[:, block.stats.index(stat)]
            broken = np.isnan(column) if stat in _FINITE else np.zeros(len(column), bool)
            values[row, np.searchsorted(steps, block.steps)] = np.where(broken, np.float32(np.inf), column)
    return values


@dataclass
class Payload:
    """What the page's script reads of all maps.

    Attributes:
        sites: names of sites; maps refer to them by position.
        axes: lists of steps; maps refer to them by position.
        maps: one mapping a map.
        data: base64 of little-endian float32 by key.
    """

    sites: list[str] = field(default_factory=list)
    axes: list[list[int]] = field(default_factory=list)
    maps: list[dict[str, object]] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)

    def axis(self, steps: np.ndarray) -> int:
        """Return the position of an axis, adding it if it is new."""
        axis = [int(step) for step in steps]
        if axis not in self.axes:
            self.axes.append(axis)
        return self.axes.index(axis)

    def store(self, key: str, values: np.ndarray) -> str:
        """Add an array and return its key."""
        self.data[key] = base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode("ascii")
        return key


def payload(found: Sequence[Map]) -> Payload:
    """Thin maps so that together they stay within `CELLS`, and encode them.

    Args:
        found: the maps.

    Returns:
        What the script reads. A map whose cells are all equal carries that value instead of data.
    """
    result = Payload(sites=list(dict.fromkeys(site for item in found for site in item.sites)))
    position = {site: i for i, site in enumerate(result.sites)}
    varied = [item for item in found if item.constant is None]
    rows = sum(len(item.sites) for item in varied)
    columns = max(FEWEST_COLUMNS, min(COLUMNS, CELLS // max(rows, 1) // 2 * 2))
    banded = sum(3 * len(item.sites) for item in varied if item.bands is not None)
    narrow = min(MOST_BAND_COLUMNS, BAND_CELLS // max(banded, 1))
    for number, item in enumerate(found):
        entry: dict[str, object] = {
            "quantity": item.quantity,
            "stat": item.stat.name,
            "words": item.stat.words,
            "scale": item.stat.scale,
            "phase": item.phase,
            "rows": [position[site] for site in item.sites],
            "samples": len(item.steps),
            "constant": item.constant,
        }
        if item.constant is None:
            entry |= _values(item, columns, number, result)
            entry["bands"] = None
            if item.bands is not None and narrow >= FEWEST_COLUMNS:
                entry["bands"] = _bands(item.bands, item.steps, narrow, number, result)
        else:
            entry |= {"axis": result.axis(item.steps[[0, -1]] if len(item.steps) > 1 else item.steps), "paired": False}
        result.maps.append(entry)
    return result


def _values(item: Map, columns: int, number: int, result: Payload) -> dict[str, object]:
    if len(item.steps) <= columns:
        key = result.store(f"m{number}", item.values)
        return {"axis": result.axis(item.steps), "paired": False, "data": key}
    starts = np.linspace(0, len(item.steps) - 1, columns).astype(int)
    key = result.store(f"m{number}", paired(item.values, columns))
    return {"axis": result.axis(item.steps[starts]), "paired": True, "data": key}


def _bands(bands: np.ndarray, steps: np.ndarray, columns: int, number: int, result: Payload) -> dict[str, object]:
    starts = edges(len(steps), columns)
    middles = (starts + np.append(starts[1:], len(steps))) // 2
    low, high = np.fmin.reduceat(bands[0], starts, axis=1), np.fmax.reduceat(bands[2], starts, axis=1)
    key = result.store(f"b{number}", np.stack([low, bands[1][:, middles], high]))
    return {"axis": result.axis(steps[middles]), "data": key}
