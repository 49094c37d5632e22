"""The score: which broken runs get the right finding at the right site, how high it stands, and false alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from normscope.core.finding import Finding, Verdict
from tests.pathologies.case import Case

ALARMS = (Verdict.FAILURE, Verdict.WARNING)
FOUND = (*ALARMS, Verdict.NOTE)
MOST_BEFORE = 3  # findings that may stand before the true one


@dataclass(frozen=True)
class Result:
    """What the findings of one case are worth.

    Attributes:
        case: name of the case.
        family: its family.
        expected: ids of which one must be found.
        found: ids of all failures, warnings and notes, in the report's order.
        rank: how many findings that are not ok stand before the right one; None where it is missing.
        site: the site that the right finding names first.
        ok: whether it is found, its site right and its rank at most `MOST_BEFORE`; of a healthy run, no warning.
        alarms: ids of failures and warnings.
        stray: those that neither name the defect nor follow from what names it.
    """

    case: str
    family: str
    expected: tuple[str, ...]
    found: tuple[str, ...]
    rank: int | None
    site: str
    ok: bool
    alarms: tuple[str, ...]
    stray: tuple[str, ...]


def judge(case: Case, findings: Sequence[Finding]) -> Result:
    """Compare the findings of a case with what is expected."""
    shown = [f for f in findings if f.verdict is not Verdict.OK]
    alarms = tuple(f.id for f in shown if f.verdict in ALARMS)
    right = [
        (rank, f) for rank, f in enumerate(shown) if f.verdict in FOUND and f.id in case.expect and _placed(case, f)
    ]
    rank, first = right[0] if right else (None, None)
    ok = not alarms if not case.expect else rank is not None and rank <= MOST_BEFORE
    found = tuple(f.id for f in shown if f.verdict in FOUND)
    named = {*case.expect} | {f.follows for f in shown if f.id in case.expect}
    stray = tuple(f.id for f in shown if f.verdict in ALARMS and f.id not in named and f.follows not in named - {""})
    return Result(case.name, case.family, case.expect, found, rank, first.site if first else "", ok, alarms, stray)


def summary(found: Sequence[Result]) -> dict[str, object]:
    """Return recall, precision and false alarms.

    Recall is over broken runs, right id, right site, high enough; precision over the warnings of broken runs, the share
    that name the defect or are grouped under the same cause; false alarms are warnings of healthy runs.
    """
    broken = [r for r in found if r.expected]
    healthy = [r for r in found if not r.expected]
    alarms, stray = (sum(map(len, part)) for part in ([r.alarms for r in broken], [r.stray for r in broken]))
    return {
        "recall": sum(r.ok for r in broken) / max(len(broken), 1),
        "precision": 1 - stray / max(alarms, 1),
        "false_alarms": sum(len(r.alarms) for r in healthy),
        "cases": [asdict(r) for r in found],
    }


def _placed(case: Case, finding: Finding) -> bool:
    sites = finding.sites or (finding.site,)
    return not case.at or any(fnmatchcase(site, glob) for site in sites for glob in case.at)
