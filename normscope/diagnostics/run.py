"""Run: what the record itself lacks, so that silence elsewhere is not taken for health."""

from __future__ import annotations

import math

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics.rule import Evidence, Rule
from normscope.diagnostics.words import count, fold
from normscope.metrics import run as metrics
from normscope.metrics import tables

# origin of each threshold: the `threshold_source` of the rule that uses it
MIN_SAMPLED = 2  # sampled steps
MOSTLY_SKIPPED = 0.5  # fraction of the later half of the run
MIN_STEPS = 10  # steps in that half
BROKEN = 2  # last steps that are not finite
GROWN = 10.0  # growth before a break from which it is a slow one; names the cause, not the verdict
_SHOWN = 3  # messages of events

PROBE_FAILED = Rule(
    id="run.probe-failed",
    threshold=0.0,
    threshold_source="identity: a probe that failed once is switched off",
    source="huang2020",
    cause="A layer returned something that the probe does not understand.",
    remedy="Attach without it, as probes=('moments', 'parameters'), or leave the layer out with layers=; please report "
    "it.",
)
DIVERGED = Rule(
    id="run.diverged",
    threshold=BROKEN,
    threshold_source="identity: a step with an infinite gradient makes weights NaN, and each loss after it",
    source="wortsman2023",
    cause="The loss or the gradient is NaN or infinite, and with it the weights.",
    remedy="Restart from a checkpoint before that step with a learning rate a third of this one and gradients clipped "
    "by torch.nn.utils.clip_grad_norm_(parameters, 1.0).",
)
UNMEASURED = Rule(
    id="run.unmeasured",
    threshold=0.0,
    threshold_source="identity: statistics need real numbers",
    source="huang2020",
    cause="The layer returns integers, complex, sparse or empty tensors.",
    remedy="To measure such a layer, return its real parts as a tensor of their own.",
)
COMPILED = Rule(
    id="run.compiled",
    threshold=0.0,
    threshold_source="identity: a compiled model runs no hook",
    source="huang2020",
    cause="torch.compile leaves the hooks of modules out of what it compiles, so that they cost nothing.",
    remedy="To have activations measured too, run sampled steps uncompiled: with torch.compiler.set_stance("
    "'force_eager' if step % every == 0 else 'default') around each step; or compile blocks instead of the whole.",
)
SKIPPED_STEPS = Rule(
    id="run.skipped-steps",
    threshold=MOSTLY_SKIPPED,
    threshold_source="identity: a scaler at its right scale skips one step in 2000, its growth interval",
    source="micikevicius2018",
    cause="The gradient scaler found infinite gradients and left out the step, halving its scale.",
    remedy="If it goes on, values overflow whatever the scale: use bfloat16, or float32 where it begins. A few at the "
    "start are how the scaler finds its scale.",
)
NO_NORMALIZATION = Rule(
    id="run.no-normalization",
    threshold=0.0,
    threshold_source="identity: number of normalization layers",
    source="huang2020",
    cause="The model has no layer that normscope knows as a normalization.",
    remedy="If training is unstable, put a normalization layer after each weighted layer, as torch.nn.GroupNorm in a "
    "convolutional network or torch.nn.LayerNorm in a transformer.",
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
        f"{count(len(events), 'probe')} failed (threshold 0), now switched off; the first: {first['message']}",
        sites=[str(site) for site in dict.fromkeys(events["site"])],
        step=int(first["step"]),
        evidence={"failures": len(events)},
    )


def diverged(record: Record) -> list[Finding]:
    """Judge whether the run ends broken: with gradients or a loss that are NaN or infinite.

    Args:
        record: record of one run.

    Returns:
        One finding, none where neither loss nor gradient norm was recorded.
    """
    seen = metrics.recorded(record)
    if not len(seen):
        return []
    broken = metrics.ending(record)
    if broken is None:
        what = "Loss and gradients are" if seen["loss"].notna().any() else "Gradients are"
        told = "" if seen["loss"].notna().any() else "; no loss was recorded: scope.step(loss=loss) tells it"
        return DIVERGED.ok(f"{what} finite at step {seen.index[-1]}, the last that was not skipped{told}.")
    what = "gradients are" if broken.gradient else "the loss is"
    if broken.steps < BROKEN:
        return DIVERGED.undecided(
            f"{what.capitalize()} NaN or infinite at step {broken.step}, the last one: whether training broke there "
            f"takes {BROKEN} steps to see.",
            "Train one more step.",
        )
    said = f"Training broke at step {broken.step}: {what} NaN or infinite from there to the end "
    cause, remedy = _breaking(broken)
    return DIVERGED.found(
        Verdict.FAILURE,
        f"{said}({broken.steps} of {count(broken.recorded, 'step')}).",
        step=broken.step,
        evidence=_before(broken),
        cause=cause,
        remedy=remedy,
    )


def unmeasured(record: Record) -> list[Finding]:
    """Judge whether outputs were left out, or measured in another way than usual.

    Args:
        record: record of one run.

    Returns:
        One finding, none where the record holds no sites.
    """
    notes = tables.attributes(record)["note"].astype(str)
    left = notes[notes != ""]
    events = record.events[record.events["kind"] == "note"] if "kind" in record.events else record.events.iloc[:0]
    said = [f"{str(message).rstrip('.')}." for message in dict.fromkeys(events.get("message", []))]
    if not len(notes) and not said:
        return []
    if not len(left) and not said:
        return UNMEASURED.ok(f"Measured: {count(len(notes), 'site')}, which is all.", {"of_sites": len(notes)})
    first = (
        f"{len(left)} of {count(len(notes), 'site')} not measured; {left.index[0]}: {left.iloc[0]}."
        if len(left)
        else ""
    )
    more = f"There are {len(said) - _SHOWN} more such notes." if len(said) > _SHOWN else ""
    places = [str(site) for site in (*left.index, *events.get("site", [])) if site]
    return UNMEASURED.found(
        Verdict.NOTE,
        " ".join(part for part in (first, *said[:_SHOWN], more) if part),
        sites=list(dict.fromkeys(places)),
        step=int(events["step"].iloc[0]) if said and not len(left) else None,
        evidence={"unmeasured": len(left), "of_sites": len(notes)},
        cause=None if len(left) else "The model runs in a way that the record sums up.",
        remedy=None if len(left) else "Read the statistics of these layers with this in mind.",
    )


def compiled(record: Record) -> list[Finding]:
    """Judge whether activations are missing because the model runs compiled.

    Args:
        record: record of one run.

    Returns:
        One finding, none where it does not.
    """
    events = record.events[record.events["kind"] == "compiled"] if "kind" in record.events else record.events.iloc[:0]
    if not len(events):
        return []
    message, step = str(events["message"].iloc[0]), int(events["step"].iloc[0])
    return COMPILED.found(Verdict.NOTE, f"{message[0].upper()}{message[1:]}.", step=step)


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
        return NO_NORMALIZATION.ok(f"{count(number, 'normalization layer')}.", {"norms": number})
    return NO_NORMALIZATION.found(Verdict.NOTE, "The model has no normalization layer.", evidence={"norms": number})


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


def _breaking(broken: metrics.Break) -> tuple[str, str | None]:
    """Name the likely cause of a break, and the remedy where it is not the rule's own."""
    known = {"loss": broken.loss_growth, "gradient norm": broken.grad_norm_growth}
    known = {name: growth for name, growth in known.items() if math.isfinite(growth)}
    if not known:
        return "It broke within two steps: the learning rate, the initial weights or the data are at fault.", None
    name, growth = max(known.items(), key=lambda item: item[1])
    if growth > GROWN:
        return (
            f"The {name} grew {fold(growth)} in the steps before (at most {metrics.BEFORE}): the learning rate is "
            "too high, or gradients are not clipped."
        ), None
    seen = " and ".join(f"{name} ({fold(growth)})" for name, growth in known.items())
    return (
        f"It came at once; before, {seen} hardly changed for {metrics.BEFORE} steps: one bad batch, an overflow, or a "
        "division, log or square root of 0.",
        f"Check the inputs and targets of step {broken.step} for NaN and extreme values, add an eps to divisions, logs "
        "and square roots, leave out steps whose gradient norm is not finite, and clip gradients with "
        "torch.nn.utils.clip_grad_norm_(parameters, 1.0).",
    )


def _before(broken: metrics.Break) -> Evidence:
    """Return the numbers of a break that are known."""
    measured = {
        "last_loss": broken.loss,
        "last_grad_norm": broken.grad_norm,
        "loss_growth": broken.loss_growth,
        "grad_norm_growth": broken.grad_norm_growth,
        "lr": broken.lr,
    }
    finite = {name: value for name, value in measured.items() if math.isfinite(value)}
    return {"step": broken.step, "broken_steps": broken.steps, "steps": broken.recorded} | finite
