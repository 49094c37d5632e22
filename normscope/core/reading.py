"""Reading: a finished, running or killed run from its SQLite file."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd

from normscope.core.errors import StoreError
from normscope.core.record import Block, Channels, Record
from normscope.core.store import EVENT_COLUMNS, FILE_NAME, GROUP_COLUMNS, STEP_COLUMNS, check_file, stored_rows


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
    except (sqlite3.Error, ValueError, TypeError, LookupError, OverflowError) as error:  # whatever damage brings about
        raise StoreError(f"{file} is damaged or not a normscope record: {error}. Restore it from a copy.") from error


def read(connection: sqlite3.Connection) -> Record:
    """Return what was committed to an open database."""
    runs = [json.loads(provenance) for _, provenance in stored_rows(connection, "runs", "rowid")]
    if not runs:
        raise StoreError("the file holds no run: it is damaged. Restore it from a copy.")
    known = [
        {"run": run, "site": site, **json.loads(text)} for run, site, text in stored_rows(connection, "sites", "rowid")
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
            end = start + len(stats)
            parts.setdefault((run, site, phase, role, tuple(stats)), []).append((steps, values[:, start:end]))
            start = end
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
