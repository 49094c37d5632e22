"""Folders of runs: one that is free, and one that was meant."""

from __future__ import annotations

from pathlib import Path

from normscope.core.errors import StoreError
from normscope.core.store import FILE_NAME, run_exists
from normscope.core.table import printable

_SHOWN = 20


def free(folder: Path) -> Path:
    """Return a folder that holds no run: the one given, or with -2, -3, ... at its end."""
    candidates = (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in range(1, 10_000))
    return next(candidate for candidate in candidates if not run_exists(candidate))


def listed(**paths: Path) -> str:
    """Write a line for each path, with what lies there; a name that holds control characters shows them as text."""
    width = max(map(len, paths)) + 2
    return "\n".join(f"{name:<{width}}{printable(str(path))}" for name, path in paths.items())


def one_run(path: Path) -> Path:
    """Return the path of one run; a folder of runs is a StoreError that lists them, the newest first."""
    files = sorted(path.glob(f"*/{FILE_NAME}"), key=lambda file: file.stat().st_mtime, reverse=True)
    if not files or (path / FILE_NAME).exists():
        return path
    names = [str(file.parent) for file in files]
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    raise StoreError(
        f"path={str(path)!r} is no run but a folder of {len(names)}; give one of them, newest first: {shown}."
    )
