"""Optimizer: what is wrong with parameters, groups and settings as they stand, whatever is trained."""

from __future__ import annotations

import pandas as pd

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics.rule import Rule
from normscope.diagnostics.words import count
from normscope.metrics import structure as metrics

# origin of each threshold: the `threshold_source` of the rule that uses it
HALF_EPS = 2.0**-25  # and below, a number is 0 in float16
SMALLEST_STEP = 2.0**-9  # relative change of a bfloat16 number that is certainly rounded away below

_MASTERS = (
    "Keep the weights in float32 and run the model under torch.autocast(dtype=torch.bfloat16), or use an optimizer "
    "that keeps float32 copies or rounds stochastically."
)

MISSING_PARAMETERS = Rule(
    id="optimizer.missing-parameters",
    threshold=0.0,
    threshold_source="identity: parameters that require a gradient and that no optimizer holds",
    source="huang2020",
    cause="The optimizer was made from a part of the model, or before a layer was added or replaced.",
    remedy="Make the optimizer from model.parameters() once the model is complete, pass all optimizers that step "
    "together, or set requires_grad=False on what is meant to stay.",
)
PARAMETER_TWICE = Rule(
    id="optimizer.parameter-twice",
    threshold=1.0,
    threshold_source="identity: groups that hold the parameter",
    source="huang2020",
    cause="Two optimizers, or one list twice, were given the same parameter: it takes two steps for one gradient.",
    remedy="Give each parameter to one group of one optimizer; tied weights once.",
)
EPS = Rule(
    id="optimizer.eps",
    threshold=HALF_EPS,
    threshold_source="identity: float16 has no positive number below 2^-24 and rounds up to 2^-25 to 0; a weight whose "
    "gradient is 0 then moves by 0 / 0, NaN",
    source="kingma2015",
    cause="Weights and the optimizer's moments are in float16, where the usual eps of 1e-8 is 0.",
    remedy="Keep the weights in float32 and run the model under torch.autocast with a torch.amp.GradScaler; eps=1e-6 "
    "helps for want of that.",
)
DECAY_LOST = Rule(
    id="optimizer.decay-lost",
    threshold=SMALLEST_STEP,
    threshold_source="identity: a bfloat16 number has 8 binary digits, so that multiplying it by 1 - lr * decay gives "
    "the number itself below 2^-9, for every weight",
    source="kalamkar2019",
    cause="Weights are stored in bfloat16 without a float32 copy: weight decay is rounded away at each step.",
    remedy=_MASTERS,
)
GAINS_STUCK = Rule(
    id="optimizer.gains-stuck",
    threshold=SMALLEST_STEP,
    threshold_source="identity: bfloat16 numbers just below 1 lie 2^-8 apart and above 2^-7, so a step below 2^-9 of "
    "the gain is rounded away; a step of Adam is at most the learning rate where gradients are steady",
    source="kalamkar2019",
    cause="Gains of normalization layers start at 1, are stored in bfloat16, and each step is smaller than half the "
    "distance to the next number.",
    remedy=_MASTERS,
)


def missing_parameters(record: Record) -> list[Finding]:
    """Judge whether parameters that should train are in no optimizer.

    Args:
        record: record of one run.

    Returns:
        One finding, none without an optimizer.
    """
    frame = metrics.parameters(record)
    frame = frame[frame["trainable"].eq(True)]
    if not len(metrics.groups(record)) or not len(frame):
        return []
    held = frame["holders"].map(bool).astype(bool)
    left, evidence = frame.index[~held].tolist(), {"missing": int((~held).sum()), "parameters": len(frame)}
    copies = metrics.fact(record, "foreign")
    if not left:
        return MISSING_PARAMETERS.ok(f"All {count(len(frame), 'trainable parameter')} are in an optimizer.", evidence)
    norms = frame["module"][~held].isin(metrics.norms(record).index).sum()
    of_norms = f", {norms} of normalization layers among them" if norms else ""
    said = f"{left[0]} and {len(left) - 1} others" if len(left) > 1 else left[0]
    said += f" of {count(len(frame), 'trainable parameter')}{of_norms}: in no optimizer (threshold 0)"
    if isinstance(copies, int) and copies >= len(left) and not held.any():  # else a layer that was replaced
        return MISSING_PARAMETERS.undecided(
            f"{said}; the optimizer holds {copies} tensors that are not the model's, perhaps copies of them.",
            "Nothing to do where the optimizer keeps float32 copies; else make it from model.parameters().",
            evidence=evidence,
        )
    few = 2 * len(left) <= len(frame)
    return MISSING_PARAMETERS.found(
        Verdict.WARNING if few else Verdict.NOTE,
        f"{said}.",
        sites=left,
        evidence=evidence,
        cause=None if few else "The optimizer trains a part of the model, as a new head.",
        remedy=None if few else "Set requires_grad=False on the rest: no gradient is computed for it then.",
    )


def parameter_twice(record: Record) -> list[Finding]:
    """Judge whether a parameter is in several groups or optimizers.

    Args:
        record: record of one run.

    Returns:
        One finding, none without an optimizer.
    """
    frame = metrics.parameters(record)
    if not len(metrics.groups(record)) or not len(frame):
        return []
    number = frame["holders"].map(len)
    twice = frame[number > 1]
    if not len(twice):
        return PARAMETER_TWICE.ok(f"Each of {count((number > 0).sum(), 'parameter')} is in one group (threshold 1).")
    where = " and ".join(f"group {group} of {optimizer}" for optimizer, group in twice["holders"].iloc[0])
    return PARAMETER_TWICE.found(
        Verdict.WARNING,
        f"{twice.index[0]} is in {where} (threshold 1 group); so are {count(len(twice), 'parameter')}.",
        sites=[str(site) for site in twice.index],
        evidence={"parameters": len(twice), "groups": int(number.max())},
    )


def eps(record: Record) -> list[Finding]:
    """Judge whether the eps of Adam exists in the type of the weights.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no optimizer of torch has an eps.
    """
    frame = _ours(record)
    frame = frame[frame["eps"].notna()]
    if not len(frame):
        return []
    lost = frame[frame["dtype"].eq("float16") & (frame["eps"] <= HALF_EPS)]
    if not len(lost):
        return EPS.ok(f"eps of {frame['eps'].min():g} or more exists in the type of all weights.")
    value = float(lost["eps"].iloc[0])
    return EPS.found(
        Verdict.FAILURE,
        f"{lost.index[0]} is float16, in which the optimizer's eps of {value:g} is 0 (threshold {HALF_EPS:.2g}): where "
        f"a gradient is 0 the weight becomes NaN; so {count(len(lost), 'parameter')}.",
        sites=[str(site) for site in lost.index],
        evidence={"eps": value, "parameters": len(lost)},
    )


def decay_lost(record: Record) -> list[Finding]:
    """Judge whether decoupled weight decay is too small to change bfloat16 weights.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no such weight has decay.
    """
    frame = _ours(record)
    frame = frame[frame["dtype"].eq("bfloat16") & (frame["decay"] > 0) & frame["decoupled"].eq(True)]
    rate = frame["peak"] * frame["decay"]
    frame, rate = frame[rate > 0], rate[rate > 0]
    if not len(frame):
        return []
    lost = frame[rate < SMALLEST_STEP]
    if not len(lost):
        return DECAY_LOST.ok(f"lr * decay is {rate.min():.2g} at least (threshold 2^-9 = {SMALLEST_STEP:.2g}).")
    first = float(rate[lost.index[0]])
    return DECAY_LOST.found(
        Verdict.WARNING,
        f"{lost.index[0]} is bfloat16 and lr * decay is {first:.2g} (threshold 2^-9 = {SMALLEST_STEP:.2g}): decay "
        f"changes no weight; so {count(len(lost), 'parameter')}.",
        sites=[str(site) for site in lost.index],
        evidence={"rate": first, "parameters": len(lost)},
    )


def gains_stuck(record: Record) -> list[Finding]:
    """Judge whether gains of normalization layers in bfloat16 are too large to be moved by steps of Adam.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no such gain is trained by Adam.
    """
    frame = _ours(record)
    frame = frame[
        frame["dtype"].eq("bfloat16") & frame["least"].notna() & frame["rule"].eq("adam") & (frame["peak"] > 0)
    ]
    if not len(frame):
        return []
    step = frame["peak"] / frame["least"]
    stuck = frame[step < SMALLEST_STEP]
    if not len(stuck):
        return GAINS_STUCK.ok(f"Steps of {step.min():.2g} of a gain move it (threshold 2^-9 = {SMALLEST_STEP:.2g}).")
    top = stuck.iloc[0]
    return GAINS_STUCK.found(
        Verdict.WARNING,
        f"{top.name} is bfloat16 with gains of {top['least']:.3g} or more, and a learning rate of {top['peak']:.2g} is "
        f"below 2^-9 of them (threshold {SMALLEST_STEP:.2g}): they do not move; so {count(len(stuck), 'gain')}.",
        sites=[str(site) for site in stuck.index],
        evidence={"lr": float(top["peak"]), "gain": float(top["least"]), "gains": len(stuck)},
    )


def _ours(record: Record) -> pd.DataFrame:
    """Return the trainable parameters that an optimizer of torch holds, whose step is known, with its settings."""
    frame = metrics.settings(record)
    return frame[frame["trainable"].eq(True) & frame["rule"].fillna("").ne("")]
