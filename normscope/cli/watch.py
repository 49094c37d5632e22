"""normscope watch: a run in the terminal while it grows, read from its file by a process of its own."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from normscope.cli.folder import one_run
from normscope.core.errors import StoreError
from normscope.core.finding import Finding
from normscope.core.reading import load
from normscope.core.record import Record
from normscope.core.store import FILE_NAME
from normscope.core.table import can_print, printable
from normscope.diagnostics import diagnose
from normscope.report.live import Style, live

_PATIENCE = 3  # times a file that is just being begun, or locked, is tried
_SHARE = 4  # reading, and judging, take at most a fifth of the time each, however large the record has become
_CLEAR, _HOME, _LINE_END, _BELOW = "\x1b[2J", "\x1b[H", "\x1b[K", "\x1b[J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("path", metavar="RUN", type=Path, help="folder of the run; it may not have begun yet")
    parser.add_argument("--once", action="store_true", help="print the run as it is now, and end")
    parser.add_argument(
        "--interval", metavar="SECONDS", type=_seconds, default=2.0, help="time between two looks (default: 2)"
    )
    parser.add_argument(
        "--wait", metavar="SECONDS", type=_seconds, default=math.inf, help="give up if no run begins (default: never)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Show the run until it is closed, or until Ctrl-C."""
    if arguments.once:
        record = _patiently(one_run(arguments.path))
        print(_frame(arguments.path, record, diagnose(record), whole=True))
        return 0
    try:
        _wait(arguments.path, arguments.interval, arguments.wait)
        _follow(arguments.path, arguments.interval)
    except KeyboardInterrupt:
        print()
    return 0


def _wait(path: Path, interval: float, longest: float) -> None:
    """Wait until the run begins; where none can, or none has in the time given, this is a StoreError."""
    if _begun(path):
        return
    if not path.parent.exists():
        raise StoreError(
            f"path={str(path)!r} lies in no folder: {path.parent} does not exist. Give the folder that was passed as "
            "attach(..., run=...), or create that one to wait for a run in it."
        )
    alike = difflib.get_close_matches(path.name, [file.parent.name for file in path.parent.glob(f"*/{FILE_NAME}")])
    hint = f"; did you mean {printable(str(path.with_name(alike[0])))}?" if alike else ""
    print(f"waiting for {printable(str(path))} to begin; Ctrl-C ends{hint}", flush=True)
    end = time.monotonic() + longest
    while not _begun(path):
        if time.monotonic() >= end:
            raise StoreError(f"path={str(path)!r}: no run has begun there in {longest:g} seconds{hint or '.'}")
        time.sleep(min(interval, max(end - time.monotonic(), 0)))


def _begun(path: Path) -> bool:
    """Tell whether a run is there; a folder that holds something else is a StoreError."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    file = one_run(path) / FILE_NAME if path.is_dir() else path
    if not file.exists():
        raise StoreError(
            f"path={str(path)!r} holds no run, but other files: it has no {FILE_NAME}. Give the folder that was passed "
            "as attach(..., run=...); one that does not exist yet is waited for."
        )
    return file.stat().st_size > 0


def _follow(path: Path, interval: float) -> None:
    """Show one frame after another until the run is closed."""
    terminal = sys.stdout.isatty()
    judge, shown = _Judge(), -1
    if terminal:
        print(_CLEAR, end="")
    while True:
        begin = time.monotonic()
        record = _patiently(path)
        cost = time.monotonic() - begin
        closed, steps = "closed" in record.runs[0], len(record.context)
        frame = _frame(path, record, judge(record, closed), whole=False)
        if terminal:
            print(_HOME + frame.replace("\n", _LINE_END + "\n") + _LINE_END + "\n" + _BELOW, end="", flush=True)
        elif closed or steps != shown:  # in a pipe: what is new
            print(frame + "\n", flush=True)
        if closed:
            return
        shown = steps
        time.sleep(max(interval, _SHARE * cost))


class _Judge:
    """Judges a record now and then: it may take seconds, so that frames between show the findings of before."""

    def __init__(self) -> None:
        self._findings: list[Finding] = []
        self._due = 0.0

    def __call__(self, record: Record, last: bool) -> list[Finding]:
        begin = time.monotonic()
        if last or begin >= self._due:
            self._findings = diagnose(record)
            self._due = time.monotonic() + _SHARE * (time.monotonic() - begin)
        return self._findings


def _frame(path: Path, record: Record, findings: Sequence[Finding], whole: bool) -> str:
    size = shutil.get_terminal_size()
    terminal = sys.stdout.isatty()
    style = Style(
        width=size.columns,
        height=None if whole or not terminal else size.lines,
        color=terminal and "NO_COLOR" not in os.environ,
        blocks=can_print("█▁…"),
    )
    return live(record, findings, _written(path), time.time(), style)


def _patiently(path: Path) -> Record:
    """Read a run that may be a moment from having a schema, or be locked for a moment."""
    for _ in range(_PATIENCE - 1):
        try:
            return load(path)
        except StoreError:
            time.sleep(0.2)
    return load(path)


def _written(path: Path) -> float:
    """Return when the file, or the log beside it, was last written."""
    file = path / FILE_NAME if path.is_dir() else path
    files = (file, file.with_name(f"{file.name}-wal"))
    return max((each.stat().st_mtime for each in files if each.exists()), default=time.time())


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.05 <= seconds < 86400:
        raise argparse.ArgumentTypeError(f"{text} is not a time of at least 0.05 seconds")
    return seconds
