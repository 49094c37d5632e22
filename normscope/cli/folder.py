"""Folders of new runs."""

from __future__ import annotations

from pathlib import Path

from normscope.core.store import run_exists


def free(folder: Path) -> Path:
    """Return a folder that holds no run: the one given, or with -2, -3, ... at its end."""
    candidates = (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in range(1, 10_000))
    return next(candidate for candidate in candidates if not run_exists(candidate))
