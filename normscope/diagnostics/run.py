"""Run: what the record itself lacks, so that silence elsewhere is not taken for health."""

from __future__ import annotations

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics.rule import Rule
from normscope.metrics import tables

# origin of each threshold: the `threshold_source` of the rule that uses it
MIN_SAMPLED = 2  # sampled steps
MOSTLY_SKIPPED = 0.5  # fraction of the later half of the run
MIN_STEPS = 10  # steps in that half

PROBE_FAILED = Rule(
    id="run.probe-failed",
    threshold=0.0,
    threshold_source="identity: a probe that failed once is switched off",
    source="huang2020",
    cause="A layer returned something that the probe does not understand.",
    remedy="Attach without it, as probes=('moments', 'parameters'), or leave the layer out with layers=; please report "
    "it.",
)
UNMEASURED = Rule(
    id="run.unmeasured",
    threshold=0.0,
    threshold_source="identity: statistics need real numbers",
    source="huang2020",
    cause="The layer returns integers, complex, sparse or empty tensors.",
    remedy="Nothing, unless this layer matters: then return its real parts as a tensor of their own.",
)
SKIPPED_STEPS = Rule(
    id="run.skipped-steps",
    threshold=MOSTLY_SKIPPED,
    threshold_source="identity: a scaler at its right scale skips one step in 2000, its growth interval",
    source="micikevicius2018",
    cause="The gradient scaler found infinite gradients and left out the step, halving its scale.",
    remedy="Nothing while it is rare. If it goes on, values overflow whatever the scale: use bfloat16, or float32 "
    "where it begins.",
)
NO_NORMALIZATION = Rule(
    id="run.no-normalization",
    threshold=0.0,
    threshold_source="identity: number of normalization layers",
    source="huang2020",
    cause="The model has no layer that normscope knows as a normalization.",
    remedy="Nothing if so intended; normscope.norms.convert adds or swaps normalization layers.",
)
NO_DATA = Rule(
    id="run.no-data",
    threshold=MIN_SAMPLED,
    threshold_source="identity: change over time needs two points",
    source="huang2020",
    cause="",
    remedy="",
)


def probe_failed(record: Record) -> list[Finding]:
    """Judge whether all probes ran to the end.

    Args:
        record: record of one run.

    Returns:
        One finding.
    """
    events = (
        record.events[record.events["kind"] == "probe-failed"] if "kind" in record.events else record.events.iloc[:0]
    )
    if not len(events):
        return PROBE_FAILED.ok("No probe failed (threshold 0).")
    first = events.iloc[0]
    return PROBE_FAILED.found(
        Verdict.WARNING,
        f"{len(events)} probes failed (threshold 0) and were switched off; the first: {first['message']}",
        sites=[str(site) for site in dict.fromkeys(events["site"])],
        step=int(first["step"]),
        evidence={"failures": len(events)},
    )


def unmeasured(record: Record) -> list[Finding]:
    """Judge whether outputs were left out.

    Args:
        record: record of one run.

    Returns:
        One finding, none where the record holds no sites.
    """
    notes = tables.attributes(record)["note"].astype(str)
    if not len(notes):
        return []
    left = notes[notes != ""]
    if not len(left):
        return UNMEASURED.ok(f"All {len(notes)} sites are measured.", {"sites": len(notes)})
    return UNMEASURED.found(
        Verdict.NOTE,
        f"{len(left)} of {len(notes)} sites are not measured (threshold 0); {left.index[0]}: {left.iloc[0]}.",
        sites=[str(site) for site in left.index],
        evidence={"unmeasured": len(left), "sites": len(notes)},
    )


def skipped_steps(record: Record) -> list[Finding]:
    """Judge whether a gradient scaler skips more than now and then.

    Args:
        record: record of one run.

    Returns:
        One finding, none where there is no scaler.
    """
    frame = tables.context(record)
    skipped = frame["skipped"]
    if not skipped.any() and not frame["loss_scale"].notna().any():
        return []
    half = skipped.iloc[len(skipped) // 2 :]
    evidence = {"skipped": int(skipped.sum()), "steps": len(skipped), "late_fraction": float(half.mean())}
    said = f"{skipped.sum()} of {len(skipped)} steps were skipped, {half.mean():.0%} of the later half"
    said += f" (threshold {MOSTLY_SKIPPED:.0%})."
    if not skipped.any():
        return SKIPPED_STEPS.ok(said, evidence)
    most = half.mean() > MOSTLY_SKIPPED and len(half) >= MIN_STEPS
    step = int(skipped[skipped].index[0])
    return SKIPPED_STEPS.found(Verdict.WARNING if most else Verdict.NOTE, said, step=step, evidence=evidence)


def no_normalization(record: Record) -> list[Finding]:
    """Judge whether the model normalizes at all.

    Args:
        record: record of one run.

    Returns:
        One finding, none where the record does not say.
    """
    stated = [run["norms"] for run in record.runs if isinstance(run.get("norms"), int)]
    layers = tables.layers(record)
    if not stated and not len(layers):
        return []
    number = int(stated[0]) if stated else int(layers["norm"].notna().sum())  # type: ignore[call-overload]
    if number:
        return NO_NORMALIZATION.ok(f"{number} normalization layers.", {"norms": number})
    return NO_NORMALIZATION.found(
        Verdict.NOTE, "The model has 0 normalization layers (threshold 0).", evidence={"norms": number}
    )


def no_data(record: Record) -> list[Finding]:
    """Judge whether there is enough to judge.

    Args:
        record: record of one run.

    Returns:
        One finding.
    """
    steps = len(record.steps)
    evidence = {"sampled_steps": steps}
    if steps >= MIN_SAMPLED:
        return NO_DATA.ok(f"{steps} sampled steps (threshold {MIN_SAMPLED}).", evidence)
    said = "Nothing was sampled" if not steps else "One step was sampled: nothing that changes over time is judged"
    return NO_DATA.undecided(
        f"{said} (threshold {MIN_SAMPLED} sampled steps).",
        "Call attach before the first optimizer step and train past a second sampled step, or pass a smaller every=.",
        evidence=evidence,
    )
