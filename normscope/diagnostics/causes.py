"""Causes: which findings follow from another one, so that what to mend first stands first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from normscope.core.finding import Finding, Verdict

ALARMS = (Verdict.FAILURE, Verdict.WARNING)
TOLD = (*ALARMS, Verdict.NOTE)


@dataclass(frozen=True)
class Cause:
    """A finding and what it brings about.

    Attributes:
        id: id of the finding.
        explains: ids of what follows from it.
        when: whether a finding of this id is such a cause.
    """

    id: str
    explains: tuple[str, ...]
    when: Callable[[Finding], bool] = lambda finding: finding.verdict in ALARMS


def _over_depth(finding: Finding) -> bool:
    """Tell whether a magnitude runs away from layer to layer, not from step to step."""
    return finding.verdict in ALARMS and "total" in finding.evidence


def _told(finding: Finding) -> bool:
    return finding.verdict in TOLD


STATISTICS = (
    "mismatch.running-statistics",
    "mismatch.train-eval-gap",
    "mismatch.momentum",
    "mismatch.tiny-variance",
)
CONDITIONING = (
    "conditioning.ill-conditioned-inputs",
    "conditioning.ill-conditioned-gradients",
    "conditioning.curvature-dominated",
    "conditioning.rank-collapse",
)
BROKEN = ("run.diverged", "propagation.non-finite", "run.skipped-steps")
SILENT = (
    "propagation.dead-units",
    "propagation.eps-dominates",
    "propagation.gradient-vanishing",
    "training.untrained",
    "scale.invariance",
    *STATISTICS,
)
INFLATED = (
    "propagation.signal-exploding",
    "propagation.gradient-exploding",
    "propagation.saturated-units",
    "scale.effective-rate",
    "curvature.edge-of-stability",
    "curvature.negative",
    "curvature.outliers",
    "propagation.outlier-channels",
    "propagation.massive-activations",
    "attention.logits-grow",
    "attention.entropy-collapse",
    "attention.output-logits",
)
SPIKES = tuple(
    f"spikes.{kind}"
    for kind in ("overflow", "outside", "schedule", "attention", "second-moment", "data", "instability", "undecided")
)
LONG_STEPS = (
    "training.learning-rate",
    *INFLATED,
    *SPIKES,
    *BROKEN,
    *SILENT,
    *CONDITIONING,
    "curvature.trace-dominated",
)

# the first that applies is the cause, so what comes earlier in the network or in time stands higher
CAUSES: tuple[Cause, ...] = (
    Cause("training.uncleared-gradients", LONG_STEPS),
    Cause("training.input-scale", ("training.initial-loss", *LONG_STEPS)),
    Cause("structure.eps", ("propagation.eps-dominates", "conditioning.curvature-dominated", *STATISTICS)),
    Cause("optimizer.parameter-twice", LONG_STEPS),
    Cause("propagation.non-finite", ("precision.loss-scale",)),
    Cause("training.clipping", ("training.learning-rate",), _told),
    Cause("training.stuck-weights", ("optimizer.decay-lost", "optimizer.gains-stuck", "training.learning-rate")),
    Cause("structure.few-values", (*SILENT, *CONDITIONING, "training.learning-rate")),
    Cause("noise.batches-not-random", ("noise.small-batch", *LONG_STEPS)),
    Cause("noise.whitening-batch", ("noise.small-batch", *STATISTICS, *LONG_STEPS)),
    Cause("noise.small-batch", (*STATISTICS, *LONG_STEPS)),
    Cause("propagation.signal-exploding", ("training.initial-loss", *LONG_STEPS), _over_depth),
    Cause("propagation.gradient-exploding", ("training.initial-loss", *LONG_STEPS), _over_depth),
    Cause("propagation.signal-vanishing", ("training.learning-rate", *SILENT, *CONDITIONING), _over_depth),
    Cause("propagation.gradient-vanishing", ("training.learning-rate", *CONDITIONING), _over_depth),
    Cause("propagation.saturated-units", ("training.initial-loss", "propagation.gradient-vanishing", *CONDITIONING)),
    Cause("mismatch.evaluation-mode", STATISTICS),
    Cause("mismatch.never-updated", STATISTICS),
    Cause("structure.shared-norm", STATISTICS, _told),
    Cause("structure.dropout-before-norm", STATISTICS, _told),
    Cause("mismatch.updated-twice", STATISTICS),
    Cause("mismatch.momentum", STATISTICS),
    Cause("training.learning-rate", (*LONG_STEPS, "scale.gain-collapse")),
    Cause("attention.logits-grow", ("attention.entropy-collapse", *BROKEN)),
    Cause("training.decay", ("scale.effective-rate", "scale.gain-collapse", *SILENT, *CONDITIONING)),
    Cause("scale.gain-collapse", (*SILENT, *CONDITIONING)),
    Cause("propagation.dead-units", (*SILENT, *CONDITIONING)),
    Cause("propagation.signal-exploding", ("propagation.gradient-exploding", *BROKEN, *CONDITIONING)),
    Cause("propagation.gradient-exploding", BROKEN),
    Cause("propagation.non-finite", (*BROKEN, "spikes.overflow", "spikes.undecided")),
    Cause("propagation.outlier-channels", CONDITIONING, _told),
    *(Cause(spike, (*BROKEN, "scale.effective-rate", "propagation.outlier-channels")) for spike in SPIKES),
)
_EXACT = BROKEN  # findings whose step is that of the event: what shows later is no cause of it


def grouped(findings: Sequence[Finding]) -> list[Finding]:
    """Say of each finding which other one it follows from.

    Args:
        findings: findings of one run.

    Returns:
        The same findings; those that follow name what they follow from in `follows`, their cause and their remedy.
    """
    root: dict[str, Finding] = {}
    for cause in CAUSES:
        first = next((f for f in findings if f.id == cause.id and cause.when(f)), None)
        if first is None or (first.id in root and root[first.id].id == first.id):
            continue
        top = root.get(first.id, first)  # a cause may follow from another
        for finding in findings:
            if finding.id in cause.explains and finding.id not in root and _can_follow(finding, first):
                root[finding.id] = top
        if any(kept is top for kept in root.values()):
            root.setdefault(first.id, top)
    return [_following(f, root[f.id]) if f.id in root and root[f.id].id != f.id else f for f in findings]


def _can_follow(finding: Finding, cause: Finding) -> bool:
    unclear = finding.verdict is Verdict.UNDECIDED and finding.id in (*BROKEN, *STATISTICS)
    if not (finding.verdict in TOLD or unclear) or finding.id == cause.id:
        return False
    known = finding.step is not None and cause.step is not None
    return not (known and finding.id in _EXACT and cause.step > finding.step)  # type: ignore[operator]  # both known


def _following(finding: Finding, root: Finding) -> Finding:
    where = f" at {root.site}" if root.site else ""
    own = f" By itself: {finding.cause}" if finding.cause else ""
    return replace(
        finding,
        follows=root.id,
        cause=f"Most likely follows from {root.id}{where}.{own}",
        remedy=_joined(f"Mend {root.id} first.", finding.remedy, root.id),
    )


def _joined(first: str, own: str, root: str) -> str:
    """Join what to mend first with what else to do, unless that says the same, or that nothing is to be done."""
    if root in own:
        return own
    return first if own.startswith(("Nothing", "Train on")) else f"{first} {own}".rstrip()
