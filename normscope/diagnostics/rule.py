"""Rule: what a diagnostic says whatever it finds, and the ways in which it can conclude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from normscope.core.finding import Finding, Verdict

Evidence = Mapping[str, float | int | str | list[float]]
NOTHING: Evidence = {}


@dataclass(frozen=True)
class Rule:
    """The fixed part of a diagnostic's findings.

    Attributes:
        id: "subject.name".
        threshold: the number that decides, None where there is none.
        threshold_source: a bibliography key, or "identity: ..." or "measured: ...".
        source: bibliography key of the work that explains the finding.
        cause: what most likely brings it about.
        remedy: what to do.
    """

    id: str
    threshold: float | None
    threshold_source: str
    source: str
    cause: str
    remedy: str

    def found(
        self,
        verdict: Verdict,
        message: str,
        *,
        sites: Sequence[str] = (),
        step: int | None = None,
        evidence: Evidence = NOTHING,
        cause: str | None = None,
        remedy: str | None = None,
    ) -> list[Finding]:
        """Return the finding that something is there.

        Args:
            verdict: how bad it is.
            message: one sentence with the number and the threshold.
            sites: sites concerned, the worst first.
            step: the step at which it shows.
            evidence: the measured numbers.
            cause: the cause, where the rule's own does not fit.
            remedy: the remedy, where the rule's own does not fit.

        Returns:
            One finding.
        """
        finding = Finding(
            id=self.id,
            verdict=verdict,
            message=message,
            site=sites[0] if sites else "",
            sites=tuple(sites),
            step=step,
            cause=self.cause if cause is None else cause,
            evidence=dict(evidence),
            threshold=self.threshold,
            threshold_source=self.threshold_source,
            remedy=self.remedy if remedy is None else remedy,
            source=self.source,
        )
        return [finding]

    def ok(self, message: str, evidence: Evidence = NOTHING) -> list[Finding]:
        """Return the finding that nothing is wrong."""
        return self.found(Verdict.OK, message, evidence=evidence, cause="", remedy="")

    def undecided(self, message: str, remedy: str, *, evidence: Evidence = NOTHING, cause: str = "") -> list[Finding]:
        """Return the finding that the record does not decide, with what to pass or do."""
        return self.found(Verdict.UNDECIDED, message, evidence=evidence, cause=cause, remedy=remedy)
