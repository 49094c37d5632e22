"""Finding: a verdict with its evidence, threshold, remedy and source."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum


class Verdict(Enum):
    """How bad a finding is, worst first; the value is the word in every output."""

    FAILURE = "failure"
    WARNING = "warning"
    UNDECIDED = "undecided"
    NOTE = "note"
    OK = "ok"

    @property
    def rank(self) -> int:
        """Position in the order worst first, 0 for a failure."""
        return list(Verdict).index(self)


@dataclass(frozen=True)
class Finding:
    """What a diagnostic concludes about one site of one run.

    Attributes:
        id: "subject.name", as "propagation.dead-units"; the same for every run.
        verdict: failure, warning, undecided, note or ok.
        message: one sentence a colleague understands, with the number that decided.
        run: name of the run.
        site: where, the worst first if there are several; "" for the whole model.
        step: the step at which it shows, None where it concerns the whole run.
        cause: what most likely brings it about.
        evidence: the measured numbers, by name.
        threshold: the number the evidence was compared with, None where there is none.
        threshold_source: where the threshold comes from: a bibliography key, or "identity: ...", "measured: ...".
        remedy: what to do.
        source: bibliography key of the work that explains it.
        sites: every site concerned, the worst first.
        follows: id of the finding of the same run that explains this one, "" where it stands for itself.
    """

    id: str
    verdict: Verdict
    message: str
    run: str = ""
    site: str = ""
    step: int | None = None
    cause: str = ""
    evidence: Mapping[str, float | int | str | list[float]] = field(default_factory=dict)
    threshold: float | None = None
    threshold_source: str = ""
    remedy: str = ""
    source: str = ""
    sites: tuple[str, ...] = ()
    follows: str = ""

    @property
    def subject(self) -> str:
        """The subject, the part of the id before the dot."""
        return self.id.partition(".")[0]

    def as_dict(self) -> dict[str, object]:
        """Return the public JSON form, keys in the documented order; NaN and infinity become strings."""
        plain = {name: _plain(value) for name, value in self.evidence.items()}
        if len(self.sites) > 1:
            plain["sites"] = list(self.sites)
        return {
            "id": self.id,
            "verdict": self.verdict.value,
            "run": self.run,
            "site": self.site,
            "step": self.step,
            "cause": self.cause,
            "evidence": plain,
            "threshold": _plain(self.threshold),
            "threshold_source": self.threshold_source,
            "message": self.message,
            "remedy": self.remedy,
            "source": self.source,
        }


def _plain(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    number = float(value)  # type: ignore[arg-type]  # a numpy scalar or a float
    return number if math.isfinite(number) else str(number)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings: failures, warnings, undecided, notes, ok; earlier steps first within a verdict.

    What follows from a finding comes right after it, and a finding counts as bad as the worst that follows from it.

    Args:
        findings: findings of any runs.

    Returns:
        The same, sorted.
    """
    every = list(findings)
    known = {(f.run, f.id) for f in every}
    worst: dict[tuple[str, str], int] = {}
    for f in every:
        key = _group(f, known)
        worst[key] = min(worst.get(key, f.verdict.rank), f.verdict.rank)
    step = {(f.run, f.id): _when(f) for f in every}
    return sorted(every, key=lambda f: (worst[key := _group(f, known)], step[key], key, _own(f, known), f.site))


def _group(finding: Finding, known: Collection[tuple[str, str]]) -> tuple[str, str]:
    root = (finding.run, finding.follows)
    return root if root in known else (finding.run, finding.id)


def _own(finding: Finding, known: Collection[tuple[str, str]]) -> tuple[bool, int, float, str]:
    return (finding.run, finding.follows) in known, finding.verdict.rank, _when(finding), finding.id


def _when(finding: Finding) -> float:
    return math.inf if finding.step is None else finding.step
