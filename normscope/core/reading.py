"""Reading: a finished, running or killed run from its SQLite file."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from normscope.core.errors import StoreError, brief
from normscope.core.record import Block, Channels, Record
from normscope.core.store import (
    DAMAGE,
    EVENT_COLUMNS,
    FILE_NAME,
    GROUP_COLUMNS,
    STEP_COLUMNS,
    check_file,
    stored_rows,
)

_TABLES = ("versions", "structure")  # of what is known of a run


def load(path: str | Path) -> Record:
    """Read a finished, running or killed run.

    Args:
        path: folder of the run, or its `record.sqlite`.

    Returns:
        The record of every step that was committed.

    Raises:
        StoreError: if there is no run, if its schema version is unknown, or if the file is damaged.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    if not file.is_file():
        raise StoreError(f"path={str(path)!r} holds no run: {file} does not exist. Runs are folders with {FILE_NAME}.")
    try:
        connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
        try:
            check_file(connection, file)
            connection.execute("BEGIN")
            return read(connection)
        finally:
            connection.close()
    except DAMAGE as error:
        raise StoreError(f"{file} is damaged or not a normscope record: {error}. Restore it from a copy.") from error


def read(connection: sqlite3.Connection) -> Record:
    """Return what was committed to an open database."""
    runs = [_provenance(*row) for row in stored_rows(connection, "runs", "rowid")]
    if not runs:
        raise StoreError("the file holds no run: it is damaged. Restore it from a copy.")
    known = [
        {"run": run, "site": site, **_known(text)} for run, site, text in stored_rows(connection, "sites", "rowid")
    ]
    known.sort(key=lambda site: site.get("order", math.inf))  # a site that was written again has moved to the end
    return Record(
        runs=tuple(runs),
        sites=pd.DataFrame(known) if known else pd.DataFrame(columns=["run", "site", "module", "call", "slot"]),
        context=_context(connection),
        events=_table(connection, "events", EVENT_COLUMNS),
        blocks=_blocks(connection),
        channels=_channels(connection),
    )


def _provenance(run: str, text: str) -> dict[str, Any]:
    """Return what is known of a run; what the page relies on is checked."""
    known: dict[str, Any] = json.loads(text)
    segments = known.get("segments", [])
    lists = [value for part in segments for name, value in part.items() if name in _TABLES]
    times = [part[name] for part in (known, *segments) for name in ("created", "closed", "step") if name in part]
    named = known["run"] == run and all(isinstance(known[name], dict) for name in _TABLES if name in known)
    if not (named and all(isinstance(value, dict) for value in lists) and all(map(math.isfinite, times))):
        raise ValueError(f"what is said of run {brief(run)} is not what normscope writes")
    return known


def _known(text: str) -> dict[str, Any]:
    """Return what is known of a site; which it is, another column says."""
    return {name: value for name, value in json.loads(text).items() if name not in ("run", "site")}


def _table(connection: sqlite3.Connection, name: str, columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(list(stored_rows(connection, name, "step")), columns=list(columns))


def _context(connection: sqlite3.Connection) -> pd.DataFrame:
    steps = _table(connection, "steps", STEP_COLUMNS)
    for name in ("sampled", "skipped"):
        steps[name] = steps[name].astype(bool)
    for name in ("batch_size", "loss", "loss_scale", "grad_norm"):
        steps[name] = steps[name].astype(float)
    groups = _table(connection, "groups", GROUP_COLUMNS)
    return steps.merge(groups, how="left", on=["run", "step"])


def _blocks(connection: sqlite3.Connection) -> tuple[Block, ...]:
    layouts = {number: (run, json.loads(keys)) for number, run, keys in stored_rows(connection, "layouts", "id")}
    parts: dict[tuple[str, str, str, str, tuple[str, ...]], list[tuple[np.ndarray, np.ndarray]]] = {}
    for number, group in groupby(stored_rows(connection, "scalars", "layout, step"), key=itemgetter(0)):
        run, keys = layouts[number]
        rows = list(group)
        steps = np.array([row[1] for row in rows], np.int64)
        values = np.frombuffer(b"".join(row[2] for row in rows), "<f4").reshape(len(rows), -1)
        start = 0
        for site, phase, role, stats in keys:
            if not all(isinstance(name, str) for name in (site, phase, role, *stats)) or isinstance(stats, str):
                raise ValueError(f"layout {number} is no list of sites with names of statistics")
            end = start + len(stats)
            parts.setdefault((run, site, phase, role, tuple(stats)), []).append((steps, values[:, start:end]))
            start = end
        if start != values.shape[1]:
            raise ValueError(f"layout {number} names {start} statistics, its rows hold {values.shape[1]}")
    return tuple(Block(*key, *_in_time(found)) for key, found in parts.items())


def _in_time(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Join the steps and values of one series from several layouts; of a step written twice the last holds."""
    if len(parts) == 1:
        return parts[0]
    steps, values = (np.concatenate(items) for items in zip(*parts, strict=True))
    kept, first = np.unique(steps[::-1], return_index=True)
    values = values[::-1][first]
    values.flags.writeable = False
    return kept, values


def _channels(connection: sqlite3.Connection) -> tuple[Channels, ...]:
    parts: dict[tuple[str, str, str, str, str], list[tuple[int, np.ndarray]]] = {}
    for *key, step, data in stored_rows(connection, "arrays", "step"):
        parts.setdefault(tuple(key), []).append((step, np.frombuffer(data, "<f4")))
    return tuple(
        Channels(*key, np.array([step for step, _ in rows], np.int64), tuple(array for _, array in rows))
        for key, rows in parts.items()
    )
