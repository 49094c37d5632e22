"""Store: a run as one SQLite file, readable while it grows and after a kill at any moment.

Write-ahead logging with one transaction a sampled step: a step whose `commit` returned survives the death of the
process (not of the machine: the log is not forced to disk at every step). One row holds all scalars of a step, as
little-endian float32; its layout, a row of its own, says of which sites and statistics. Every row ends in a checksum
over its keys and values, and tables are read whole instead of looked up, so that a damaged file is refused instead of
misread.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from importlib import import_module
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from normscope.core.errors import ArgumentError, StoreError

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from normscope.core.earlier import Earlier
    from normscope.core.record import Record

FILE_NAME = "record.sqlite"
SCHEMA_VERSION = 2
APPLICATION_ID = 0x6E73636F
_SCHEMA = """
CREATE TABLE runs (run TEXT PRIMARY KEY, provenance TEXT, checksum INTEGER);
CREATE TABLE sites (run TEXT, site TEXT, attributes TEXT, checksum INTEGER, PRIMARY KEY (run, site));
CREATE TABLE layouts (id INTEGER PRIMARY KEY, run TEXT, keys TEXT, checksum INTEGER);
CREATE TABLE scalars (layout INTEGER, step INTEGER, data BLOB, checksum INTEGER,
    PRIMARY KEY (layout, step)) WITHOUT ROWID;
CREATE TABLE arrays (run TEXT, site TEXT, phase TEXT, role TEXT, stat TEXT, step INTEGER, data BLOB, checksum INTEGER,
    PRIMARY KEY (run, site, phase, role, stat, step));
CREATE TABLE steps (run TEXT, step INTEGER, sampled INTEGER, batch_size INTEGER, loss REAL, loss_scale REAL,
    grad_norm REAL, skipped INTEGER, checksum INTEGER, PRIMARY KEY (run, step));
CREATE TABLE groups (run TEXT, step INTEGER, optimizer TEXT, "group" INTEGER, lr REAL, momentum REAL, decay REAL,
    checksum INTEGER, PRIMARY KEY (run, step, optimizer, "group"));
CREATE TABLE events (run TEXT, step INTEGER, kind TEXT, site TEXT, message TEXT, checksum INTEGER);
"""
STEP_COLUMNS = ("run", "step", "sampled", "batch_size", "loss", "loss_scale", "grad_norm", "skipped")
GROUP_COLUMNS = ("run", "step", "optimizer", "group", "lr", "momentum", "decay")
EVENT_COLUMNS = ("run", "step", "kind", "site", "message")
DAMAGE = (sqlite3.Error, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
_LONGEST = 1 << 27  # bytes of one value; ten thousand layers take a tenth of it
_KINDS = {"TEXT": "'text'", "BLOB": "'blob'", "INTEGER": "'integer'", "REAL": "'real', 'null'"}
_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds


Layer = tuple[str, str, str, tuple[str, ...]]  # site, phase, role, names of the statistics


class Store:
    """Writes one run; rows wait in memory until `commit`, and wait on if a commit fails.

    Args:
        path: folder of the run, created if needed; None keeps the record in memory.
        run: name of the run.
        provenance: what the run is: versions, seed, device, revision.
        earlier: what the file holds already, to go on from there; None begins a new file.

    Raises:
        StoreError: if the folder holds a run already, or one that another process writes, or cannot be written.
    """

    def __init__(
        self, path: str | Path | None, run: str, provenance: Mapping[str, object], earlier: Earlier | None = None
    ) -> None:
        """Create the file and its schema, or open it again; see the class."""
        self.run = run if earlier is None else earlier.run
        self.path = None if path is None else _new_file(Path(path)) if earlier is None else Path(path) / FILE_NAME
        self._pending: list[tuple[str, tuple[object, ...]]] = []
        self._scalars: dict[int, dict[Layer, bytes]] = {}  # by step
        self._rows: list[tuple[int, tuple[Layer, ...], bytes]] = []
        self._forgotten: list[tuple[str, int, int]] = []
        self._layouts: dict[tuple[Layer, ...], int] = {} if earlier is None else dict(earlier.layouts)
        self._written = set(self._layouts.values())  # layouts that the file holds
        self._lock: int | None = None
        try:
            self._connection = sqlite3.connect(self.path or ":memory:", isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA busy_timeout = 5000")
            self._lock = _locked(self.path.parent) if self.path else None
            if earlier is not None:
                _await_others(self._connection)
                _check_unchanged(self._connection, earlier.step)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            if earlier is None:
                marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
                self._connection.executescript(f"BEGIN;{_SCHEMA}{marks}COMMIT;")
            now: dict[str, object] = {"run": self.run, "created": time.time(), **provenance}
            self._provenance = now if earlier is None else earlier.continued(now)
            self._add("runs", self.run, json.dumps(self._provenance))
            self.commit()
        except (sqlite3.Error, UnicodeError, StoreError) as error:
            if earlier is not None:
                self._connection.close()
                self._unlock()
                raise StoreError(
                    f"run={str(path)!r} cannot be resumed ({error}); close the process or the scope that still writes "
                    "or reads it, or choose another folder."
                ) from error
            self._discard()
            raise StoreError(f"run={str(path)!r} cannot be written ({error}); choose another folder.") from error

    def _discard(self) -> None:
        """Take away a file that could not be begun, so that the folder can be used again."""
        self._unlock()
        if self.path is not None:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def site(self, site: str, attributes: Mapping[str, object]) -> None:
        """Add a site, or replace what is known of it."""
        self._add("sites", self.run, site, json.dumps(attributes))

    def scalars(self, step: int, site: str, phase: str, role: str, stats: tuple[str, ...], values: np.ndarray) -> None:
        """Add the scalars of one site at one step: their names and their values."""
        self._scalars.setdefault(step, {})[site, phase, role, stats] = _float32(values)

    def series(self, step: int, layout: tuple[Layer, ...], values: np.ndarray) -> None:
        """Add numbers of many sites at one step, in a row of their own: the layout and, in its order, the values."""
        self._rows.append((step, layout, _float32(values)))

    def forget(self, phase: str, first: int, last: int) -> None:
        """Take away, at the next commit, what `series` has added of a phase from the first step to the last."""
        self._forgotten.append((phase, first, last))

    def array(self, step: int, site: str, phase: str, role: str, stat: str, values: np.ndarray) -> None:
        """Add one per-channel array."""
        self._add("arrays", self.run, site, phase, role, stat, step, _float32(values))

    def step(self, row: Mapping[str, object]) -> None:
        """Add the context of one step: the keys of `STEP_COLUMNS` but the run."""
        self._add("steps", self.run, *(row[name] for name in STEP_COLUMNS[1:]))

    def group(self, row: Mapping[str, object]) -> None:
        """Add one parameter group of one optimizer at one step: the keys of `GROUP_COLUMNS` but the run."""
        self._add("groups", self.run, *(row[name] for name in GROUP_COLUMNS[1:]))

    def event(self, step: int, kind: str, site: str, message: str) -> None:
        """Add something that went wrong or was left out."""
        self._add("events", self.run, step, kind, site, message)

    def end(self) -> None:
        """Note that the run ends here, and when."""
        self._add("runs", self.run, json.dumps({**self._provenance, "closed": time.time()}))

    def commit(self) -> None:
        """Write the waiting rows in one transaction.

        Raises:
            StoreError: if they cannot be written; they go on waiting.
        """
        try:
            if self._connection.in_transaction:  # an interrupt left it open
                self._connection.execute("ROLLBACK")
            self._connection.execute("BEGIN IMMEDIATE")
            for table, group in groupby([*self._pending, *self._packed()], key=itemgetter(0)):
                found = [row for _, row in group]
                places = ", ".join("?" * len(found[0]))
                self._connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({places})", found)
            for phase, first, last in self._forgotten:
                mine = [(n, first, last) for layout, n in self._layouts.items() if layout and layout[0][1] == phase]
                self._connection.executemany("DELETE FROM scalars WHERE layout = ? AND step BETWEEN ? AND ?", mine)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise StoreError(f"{self.path}: {self.waiting} rows wait to be written: {error}") from error
        self._clear()
        self._written.update(self._layouts.values())

    @property
    def waiting(self) -> int:
        """Number of rows not yet written."""
        return len(self._pending) + len(self._rows) + sum(map(len, self._scalars.values()))

    def drop_waiting(self) -> None:
        """Forget the waiting rows, and which layouts they would have begun."""
        self._clear()
        self._layouts = {keys: number for keys, number in self._layouts.items() if number in self._written}

    def record(self) -> Record:
        """Return what was committed so far."""
        reading = import_module("normscope.core.reading")  # it needs pandas, which a training run should not load
        return cast("Record", reading.read(self._connection))

    def close(self) -> None:
        """Fold the log into the file and close it; the file then needs no companion files."""
        try:
            if self.path is not None:
                self._connection.execute("PRAGMA busy_timeout = 200")
                self._connection.execute("PRAGMA journal_mode = DELETE")
        except sqlite3.Error:
            pass  # a reader holds the file: the log stays beside it, nothing is lost
        finally:
            self._connection.close()
            self._unlock()

    def _unlock(self) -> None:
        handle, self._lock = self._lock, None
        if handle is not None:
            os.close(handle)

    def _add(self, table: str, *row: object) -> None:
        self._pending.append(_checked(table, *row))

    def _clear(self) -> None:
        for waiting in (self._pending, self._scalars, self._rows, self._forgotten):
            waiting.clear()

    def _packed(self) -> list[tuple[str, tuple[object, ...]]]:
        """Return the waiting scalars as rows, one a step, after the layouts that they begin."""
        layouts: dict[int, tuple[str, tuple[object, ...]]] = {}
        packed = []
        rows = [(step, tuple(found), b"".join(found.values())) for step, found in self._scalars.items()]
        for step, keys, data in [*rows, *self._rows]:
            number = self._layouts.setdefault(keys, 1 + max(self._layouts.values(), default=-1))
            if number not in self._written and number not in layouts:  # again, where the commit before failed
                layouts[number] = _checked("layouts", number, self.run, json.dumps(keys))
            packed.append(_checked("scalars", number, step, data))
        return [*layouts.values(), *packed]


def _checked(table: str, *row: object) -> tuple[str, tuple[object, ...]]:
    return table, (*row, checksum(row))


def run_exists(path: str | Path) -> bool:
    """Tell whether a folder holds a run."""
    return (Path(path) / FILE_NAME).exists()


def _locked(folder: Path) -> int | None:
    """Lock a folder for the one that writes a run into it, as long as it lives; None where locks are not to be had."""
    # the folder and not the file: closing a second handle of that would take away SQLite's own locks
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise StoreError("another process or scope writes it") from error
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


def _check_unchanged(connection: sqlite3.Connection, step: int) -> None:
    """Refuse to go on from what was read where the file has grown since."""
    (last,) = connection.execute("SELECT MAX(step) FROM steps").fetchone()
    if (-1 if last is None else last) + 1 != step:
        raise StoreError("it has grown since it was read")


def _await_others(connection: sqlite3.Connection) -> None:
    """Wait until no other connection is open: a reader goes after a moment, a second writer would mix its steps in."""
    for pause in (*_PAUSES, None):
        try:
            connection.execute("PRAGMA journal_mode = DELETE")  # fails at once while another is open
            return
        except sqlite3.OperationalError:
            if pause is None:
                raise
            time.sleep(pause)


def _new_file(folder: Path) -> Path:
    """Create the file, empty, and the folder where needed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name that no file system can hold
        raise StoreError(f"run={str(folder)!r} cannot be created ({error}); choose a folder you may write.") from error
    path = folder / FILE_NAME
    try:
        path.open("x").close()  # of several processes that begin at once, one creates it
    except FileExistsError:
        raise StoreError(
            f"run={str(folder)!r} holds a run already; choose another folder, or delete it if it is not needed. To go "
            f"on from a checkpoint: attach(..., resume=True). To read it: normscope.load({str(folder)!r})."
        ) from None
    except OSError as error:
        raise StoreError(f"run={str(folder)!r} cannot be written ({error}); choose another folder.") from error
    return path


def check_file(connection: sqlite3.Connection, file: Path) -> None:
    """Refuse a database that is no record of this schema version, or is damaged.

    Args:
        connection: the open file.
        file: its path, for the message.

    Raises:
        StoreError: if it is refused.
    """
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
    connection.execute("PRAGMA trusted_schema = OFF")
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION_ID:
        raise StoreError(
            f"{file} is a database, but not a normscope record. Of a live or killed run copy {FILE_NAME}-wal as well."
        )
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{file} has schema version {version}; this normscope reads {SCHEMA_VERSION}. "
            "Read it with the version of normscope that wrote it."
        )
    with closing(sqlite3.connect(":memory:")) as empty:
        empty.executescript(_SCHEMA)
        kinds = _columns(empty)
        if _columns(connection) != kinds:
            raise StoreError(
                f"{file} has other tables, columns or views than a record of schema version {version}: it is damaged "
                "or not written by normscope. Restore it from a copy."
            )
    damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        raise StoreError(f"{file} is damaged: {damage}. Restore it from a copy.")
    for (_, table, _), columns in kinds.items():
        wrong = " OR ".join(f'typeof("{name}") NOT IN ({_kinds(name, kind)})' for name, kind in columns)
        if columns and connection.execute(f"SELECT 1 FROM {table} WHERE {wrong} LIMIT 1").fetchone():
            raise StoreError(f"{file} is damaged: {table!r} holds a value of the wrong type. Restore it from a copy.")


def _columns(connection: sqlite3.Connection) -> dict[tuple[str, str, str], list[tuple[str, str]]]:
    """Return what a database is made of, with the columns of each table; nothing in it is evaluated."""
    made = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    return {
        (kind, name, " ".join(sql.split()) if isinstance(sql, str) else ""): [
            (column, declared)
            for _, column, declared, *_ in connection.execute("SELECT * FROM pragma_table_info(?)", (name,))
        ]
        if kind == "table"
        else []
        for kind, name, sql in made
    }


def _kinds(column: str, declared: str) -> str:
    """Return the types that a column may hold; a batch size may be unknown."""
    return "'integer', 'real', 'null'" if column == "batch_size" else _KINDS[declared]


def stored_rows(connection: sqlite3.Connection, table: str, order: str) -> Iterator[tuple[Any, ...]]:
    """Read the rows of a table without their checksums, which are verified.

    Args:
        connection: the open file.
        table: name of the table.
        order: column by which they come.

    Yields:
        One tuple a row.

    Raises:
        StoreError: if a row does not match its checksum.
    """
    for *row, expected in connection.execute(f"SELECT * FROM {table} ORDER BY {order}"):
        if checksum(row) != expected:
            raise StoreError(
                f"a row of {table!r} does not match its checksum: the file is damaged. Restore it from a copy."
            )
        yield tuple(row)


def _float32(values: np.ndarray) -> bytes:
    if values.dtype == np.dtype("<f4"):
        return values.tobytes()
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite
        return np.asarray(values, "<f4").tobytes()


def checksum(row: Sequence[object]) -> int:
    """Return the checksum of a row that is the same before and after SQLite: numbers as float64, NaN as NULL."""
    return zlib.crc32(b"".join(map(_canonical, row)))


def _canonical(value: object) -> bytes:
    if isinstance(value, bytes):
        return b"b%d:" % len(value) + value
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return b"s%d:" % len(text) + text
    if value is None or value != value:
        return b"n"
    return b"f" + struct.pack("<d", value)


def check_run(run: object) -> None:
    """Refuse a run that is not a path.

    Args:
        run: the argument of `attach`.

    Raises:
        ArgumentError: if it is neither None, a string nor a path, or empty.
    """
    if run is not None and (not isinstance(run, (str, Path)) or not str(run) or "\0" in str(run)):
        raise ArgumentError(f"run={run!r} must be a folder for the record, as 'runs/a', or None to keep it in memory.")
