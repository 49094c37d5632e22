"""Trial: one entry of a comparison, trained once with one learning rate and one seed, as numbers and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normscope.core.errors import StoreError

FILE_NAME = "result.json"


@dataclass(frozen=True)
class Trial:
    """What one training run of a comparison gave.

    Attributes:
        entry: name of the entry.
        rate: learning rate, NaN where `fit` chose it.
        seed: the seed.
        reason: why it failed, "" where it did not.
        metrics: what `fit` returned.
        measured: `digest` of its record, and throughput, memory, failures and warnings; NaN where not measured.
        curve: (step, training loss).
        profile: (site, kappa_50 of the layer's input), in order of execution.
        findings: (id, verdict, message) of its failures and warnings, worst first.
        notes: what could not be measured, and why.
        setting: what it was run with, as text by name; a run with another one is another trial.
    """

    entry: str
    rate: float
    seed: int
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[float, float], ...] = ()
    profile: tuple[tuple[str, float], ...] = ()
    findings: tuple[tuple[str, str, str], ...] = ()
    notes: tuple[str, ...] = ()
    setting: Mapping[str, str] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether it was trained to its end."""
        return not self.reason

    def as_dict(self) -> dict[str, Any]:
        """Return it as strict JSON can hold it: NaN and infinity as strings."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def from_dict(values: Mapping[str, Any]) -> Trial:
    """Return the trial that `Trial.as_dict` wrote.

    Args:
        values: the mapping.

    Returns:
        The trial.

    >>> from_dict(Trial("bn", math.nan, 0, metrics={"loss": math.inf}).as_dict()).metrics
    {'loss': inf}
    """
    return Trial(
        entry=str(values["entry"]),
        rate=float(values["rate"]),
        seed=int(values["seed"]),
        reason=str(values["reason"]),
        metrics={name: float(value) for name, value in values["metrics"].items()},
        measured={name: float(value) for name, value in values["measured"].items()},
        curve=tuple((float(x), float(y)) for x, y in values["curve"]),
        profile=tuple((str(site), float(value)) for site, value in values["profile"]),
        findings=tuple((str(name), str(verdict), str(message)) for name, verdict, message in values["findings"]),
        notes=tuple(map(str, values["notes"])),
        setting={name: str(value) for name, value in values["setting"].items()},
    )


def write(trial: Trial, folder: Path) -> None:
    """Write a trial into its folder, whole or not at all."""
    write_json(folder / FILE_NAME, trial.as_dict())


def read(folder: Path) -> Trial | None:
    """Read the trial of a folder.

    Args:
        folder: its folder.

    Returns:
        The trial, None where none was finished.

    Raises:
        StoreError: the file is damaged.
    """
    file = folder / FILE_NAME
    if not file.exists():
        return None
    try:
        return from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise StoreError(f"{file} is damaged ({error}); delete that folder, and the run is made again.") from error


def write_json(file: Path, value: object) -> None:
    """Write strict JSON, whole or not at all.

    Args:
        file: the file; its folder is created where it is missing.
        value: what to write.

    Raises:
        StoreError: it cannot be written.
    """
    beside = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(value, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        raise StoreError(f"{file} cannot be written ({error}); choose a folder you may write.") from error


def _plain(value: object) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value
