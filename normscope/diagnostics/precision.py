"""Precision: what low precision and small gradients take from a step: Adam's eps, the loss scale."""

from __future__ import annotations

import math

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics.rule import Rule
from normscope.diagnostics.words import count
from normscope.metrics import run, training

# origin of each threshold: the `threshold_source` of the rule that uses it
DAMPED = 0.5  # of the entries of all weights
FLOOR = 1.0  # loss scale
SUNK = 2.0**-10  # last scale over the largest: ten halvings that were not made up for
OFTEN = 0.05  # of the later half's steps at which the scale is lowered
MIN_STEPS = 20  # steps of a history

ADAM_EPS = Rule(
    id="precision.adam-eps",
    threshold=DAMPED,
    threshold_source="identity: Adam divides by sqrt(v) + eps; where sqrt(v) is below 9 eps the step is shorter than "
    "0.9 of what it is meant to be, in proportion to the gradient as that of SGD",
    source="wortsman2023",
    cause="Gradients are so small, as in wide or deep models or with a loss divided twice, that the optimizer's eps "
    "outweighs their root mean square.",
    remedy="Lower eps, as torch.optim.AdamW(..., eps=1e-15) with moments in float32, or undo what makes the loss "
    "small.",
)
LOSS_SCALE = Rule(
    id="precision.loss-scale",
    threshold=FLOOR,
    threshold_source="identity: a scale below 1 makes gradients smaller than they are, and what float16 loses below "
    "2^-24 is what the scale is for; at its right scale a scaler halves it once in 2000 steps, its growth interval",
    source="micikevicius2018",
    cause="Gradients overflow at whatever scale: they hold NaN or infinity of their own, or values overflow in the "
    "forward pass; torch.amp.GradScaler halves its scale at each of these steps, without a floor.",
    remedy="Find where the first NaN or infinity arises (propagation.non-finite names it; attach(every=1)), use "
    "bfloat16, or keep that layer in float32.",
)


def adam_eps(record: Record) -> list[Finding]:
    """Judge whether the eps of Adam shortens the steps of most entries.

    Args:
        record: record of one run.

    Returns:
        One finding, none where Adam moves no weight matrix.
    """
    frame = training.damped(record)
    frame = frame[frame["matrix"]]
    if not len(frame):
        return []
    share = float((frame["share"] * frame["size"]).sum() / frame["size"].sum())
    beyond = frame[frame["share"] > DAMPED]
    top = frame.iloc[0]
    evidence = {"share": share, "largest": float(top["share"]), "weights_beyond": len(beyond), "weights": len(frame)}
    said = f"The eps of Adam shortens the steps of {share:.0%} of the entries of weight matrices by a tenth or more "
    said += f"(threshold {DAMPED:.0%}), most at {top.name} ({top['share']:.0%})"
    if not len(beyond):
        return ADAM_EPS.ok(f"{said}.", evidence)
    solved = training.learned(record)
    return ADAM_EPS.found(
        Verdict.WARNING if share > DAMPED and not solved else Verdict.NOTE,
        f"{said}; so of most entries at {len(beyond)} of {count(len(frame), 'weight')}.",
        sites=[str(site) for site in beyond.index],
        evidence=evidence,
        cause="The task is learned, and hardly any gradient is left." if solved else None,
        remedy="Nothing: steps that fade with the gradient end a run well." if solved else None,
    )


def loss_scale(record: Record) -> list[Finding]:
    """Judge whether the loss scale finds its level, or sinks without end.

    Args:
        record: record of one run.

    Returns:
        One finding, none where there is no gradient scaler, or with fewer than `MIN_STEPS` steps.
    """
    found = training.scales(record)
    if found is None or found.steps < MIN_STEPS:
        return []
    evidence = {name: value for name, value in found._asdict().items() if value is not None}
    said = f"The loss scale went from {found.first:.6g} to {found.last:.6g} (threshold {FLOOR:g}): lowered "
    said += f"{count(found.halved, 'time')}, {found.late:.0%} of the later half's steps, and raised {found.raised}"
    if found.since is not None or found.last <= SUNK * found.largest:
        spiral = found.late > OFTEN and run.ending(record) is None
        return LOSS_SCALE.found(
            Verdict.WARNING,
            f"{said}; {'it is still sinking' if spiral else 'it has not come back'}.",
            step=found.since,
            evidence=evidence,
        )
    if found.late > OFTEN:
        return LOSS_SCALE.found(
            Verdict.NOTE,
            f"{said}: more often than one step in {1 / OFTEN:.0f}.",
            evidence=evidence,
            cause="The scale is raised too soon, or some batches have gradients far larger than others.",
            remedy="Raise growth_interval of torch.amp.GradScaler, clip gradients after scaler.unscale_, or use "
            "bfloat16.",
        )
    return LOSS_SCALE.ok(
        f"{said}.", {k: v for k, v in evidence.items() if not isinstance(v, float) or math.isfinite(v)}
    )
