"""Earlier: what a run that is to be resumed holds already, read without pandas."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normscope.core.errors import StoreError
from normscope.core.store import DAMAGE, FILE_NAME, Layer, check_file, stored_rows


@dataclass(frozen=True)
class Earlier:
    """What the file of a run holds.

    Attributes:
        run: name of the run.
        provenance: what is known of it.
        step: the first step that is not recorded.
        samples: number of sampled steps.
        sites: attributes by site.
        layouts: numbers by layout.
    """

    run: str
    provenance: Mapping[str, object]
    step: int
    samples: int
    sites: Mapping[str, Mapping[str, object]]
    layouts: Mapping[tuple[Layer, ...], int]

    def continued(self, now: Mapping[str, object]) -> dict[str, object]:
        """Return the provenance of the resumed run: `now`, when it first began, and each segment with its own.

        Args:
            now: provenance of the new segment.

        Returns:
            With `segments`, a list of mappings; the `step` of each is its first.
        """
        known = dict(self.provenance)
        segments: Any = known.pop("segments", None) or [{"step": 0, **known}]
        ended = {"closed": known["closed"]} if "closed" in known else {}
        segments = [*segments[:-1], {**segments[-1], **ended}, {"step": self.step, **now}]
        return {**now, "created": known.get("created"), "segments": segments}


def earlier(folder: Path) -> Earlier:
    """Read what a run holds already.

    Args:
        folder: folder of a run.

    Returns:
        What goes on from there needs.

    Raises:
        StoreError: if the file is damaged or of another version.
    """
    file = folder / FILE_NAME
    try:
        connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
        try:
            check_file(connection, file)
            return _read(connection)
        finally:
            connection.close()
    except DAMAGE as error:
        raise StoreError(f"{file} cannot be resumed, it is damaged: {error}. Restore it from a copy.") from error


def _read(connection: sqlite3.Connection) -> Earlier:
    ((run, provenance),) = stored_rows(connection, "runs", "rowid")
    last, samples = connection.execute("SELECT max(step), total(sampled) FROM steps").fetchone()
    return Earlier(
        run=run,
        provenance=json.loads(provenance),
        step=0 if last is None else int(last) + 1,
        samples=int(samples),
        sites={site: json.loads(text) for _, site, text in stored_rows(connection, "sites", "rowid")},
        layouts={_layout(json.loads(keys)): number for number, _, keys in stored_rows(connection, "layouts", "id")},
    )


def _layout(keys: list[list[object]]) -> tuple[Layer, ...]:
    return tuple((str(s), str(phase), str(role), tuple(stats)) for s, phase, role, stats in keys)  # type: ignore[arg-type]  # JSON
