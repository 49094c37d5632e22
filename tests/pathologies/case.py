"""A case: a run with a defect and the finding that must name it, or a healthy run that must stay without warning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from normscope.core.record import Record
from tests.pathologies.setup import Setup, train


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: name of the case, and of its record.
        family: "cnn", "mlp" or "transformer".
        build: makes the healthy setup; torch's seed is set before.
        change: puts the defect in; None for a healthy run.
        expect: ids of findings, any of which names the defect; () for a healthy run.
        at: globs over sites, one of which the finding must name; () where the defect has no place.
        run: runs the setup; trains it by default.
    """

    name: str
    family: str
    build: Callable[[], Setup]
    change: Callable[[Setup], None] | None = None
    expect: tuple[str, ...] = ()
    at: tuple[str, ...] = ()
    run: Callable[[Setup], Record] = train
