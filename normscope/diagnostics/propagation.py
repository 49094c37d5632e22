"""Propagation: does signal reach the output and gradient the input, and do all units take part."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics import units
from normscope.diagnostics.depth import FACTOR, FACTOR_SOURCE, SEVERE_FACTOR, over_depth
from normscope.diagnostics.rule import Rule
from normscope.diagnostics.words import count
from normscope.metrics import propagation as metrics
from normscope.metrics import run, tables, tokens, training

# origin of each threshold: the `threshold_source` of the rule that uses it
DEAD = 0.5  # fraction of channels that never fire
MIN_VALUES = 250  # values of a channel that must be seen before it is called dead: then it fires below 3 / 250
SATURATED = 0.5  # fraction of values at the ends of the range, in most hidden activations
FULLY_SATURATED = 0.9  # the same in one
OUTLIER = 100.0  # rms of a channel over that of the median channel
PEAK = 1000.0  # largest value over the median channel's rms
MASSIVE = 100.0  # magnitude of a value
MASSIVE_RATIO = 1000.0  # the same over the median magnitude
EPS_WEIGHT = 0.5  # fraction of the denominator that is eps
EPS_NOTICEABLE = 0.1
STREAK = 25  # skipped steps in a row: halved as often, a scale of 2^16 is 2^-9

SIGNAL_EXPLODING = Rule(
    id="propagation.signal-exploding",
    threshold=FACTOR,
    threshold_source=FACTOR_SOURCE,
    source="he2015delving",
    cause="Each layer multiplies the signal by more than 1: the weights are too large for their fan-in, or residual "
    "branches add up without a scale.",
    remedy="Initialize with torch.nn.init.kaiming_normal_ (ReLU) or xavier_normal_ (tanh), put a normalization layer "
    "after each weighted layer, or scale residual branches by 1 / sqrt(number of blocks).",
)
SIGNAL_VANISHING = Rule(
    id="propagation.signal-vanishing",
    threshold=FACTOR,
    threshold_source=FACTOR_SOURCE,
    source="schoenholz2017",
    cause="Each layer multiplies what differs between inputs by less than 1: the weights are too small for their "
    "fan-in (torch's default gain is 1 / sqrt(3), a ReLU needs sqrt(2)).",
    remedy="Initialize with torch.nn.init.kaiming_normal_ (ReLU) or xavier_normal_ (tanh), put a normalization layer "
    "after each weighted layer, or add shortcuts.",
)
GRADIENT_EXPLODING = Rule(
    id="propagation.gradient-exploding",
    threshold=FACTOR,
    threshold_source=FACTOR_SOURCE,
    source="hanin2018",
    cause="On its way back each layer multiplies the gradient by more than 1: the weights are too large for their "
    "fan-out.",
    remedy="Initialize with torch.nn.init.kaiming_normal_, add shortcuts; clipping the gradient hides it but does not "
    "cure it.",
)
GRADIENT_VANISHING = Rule(
    id="propagation.gradient-vanishing",
    threshold=FACTOR,
    threshold_source=FACTOR_SOURCE,
    source="glorot2010",
    cause="On its way back each layer multiplies the gradient by less than 1: small weights, or activations that "
    "saturate.",
    remedy="Add shortcuts and normalization layers, replace sigmoid or tanh by ReLU or GELU, initialize with "
    "torch.nn.init.kaiming_normal_ (ReLU) or xavier_normal_ (tanh).",
)
DEAD_UNITS = Rule(
    id="propagation.dead-units",
    threshold=DEAD,
    threshold_source="measured: in healthy networks at most 0.25 are dead (0.5 in a bottleneck of 4 units), above 0.9 "
    "where a bias or a large step killed them",
    source="lu2019",
    cause="Units whose input is negative for every sample output zero and get no gradient, so they never come back; a "
    "large step or a large negative bias brings them there.",
    remedy="Lower the learning rate or warm it up, put a normalization layer before the ReLU, or use LeakyReLU or "
    "GELU; re-initialize the layer if most of it is gone.",
)
SATURATED_UNITS = Rule(
    id="propagation.saturated-units",
    threshold=SATURATED,
    threshold_source="identity: more than half of the values lie where the slope is below 4 % of the largest; "
    "measured: healthy tanh networks reach 0.6 in their first layer, but not in the others",
    source="glorot2010",
    cause="The input of a bounded activation is too large, so its slope, and with it the gradient, is near zero.",
    remedy="Put a normalization layer before the activation, initialize with torch.nn.init.xavier_normal_, lower the "
    "learning rate, or use an unbounded activation.",
)
NON_FINITE = Rule(
    id="propagation.non-finite",
    threshold=0.0,
    threshold_source="identity: one NaN or infinity in a gradient makes every weight NaN at the next step",
    source="micikevicius2018",
    cause="An overflow, a division by zero, or the log or square root of a number that is not positive.",
    remedy="Look at this layer's input at this step; lower the learning rate or clip gradients if they grew before, "
    "add an eps to divisions and logs, and keep normalization and softmax in float32.",
)
_FROM_BATCH = {
    "cause": "It is the first layer: the batch of this step held it already, or the layer's weights do.",
    "remedy": "Look for NaN and infinity in the inputs of this step and in what makes them, as missing values or a "
    "standard deviation of zero, and leave such samples out.",
}
OUTLIER_CHANNELS = Rule(
    id="propagation.outlier-channels",
    threshold=OUTLIER,
    threshold_source="sun2024",
    source="sun2024",
    cause="A few channels, or single values, are far larger than the rest: large weights lead there, or inputs of "
    "another scale.",
    remedy="Check the scale of the inputs and of the weights of these channels; for 8-bit inference keep these "
    "channels in higher precision.",
)
MASSIVE_ACTIVATIONS = Rule(
    id="propagation.massive-activations",
    threshold=MASSIVE,
    threshold_source="sun2024",
    source="sun2024",
    cause="A few tokens, often the first, carry huge values in fixed channels of the residual stream, which attention "
    "uses as a bias; usual in trained language models.",
    remedy="Nothing for training; for inference in 8 bits keep these channels in higher precision, and do not round "
    "the stream to float16, which ends at 65504.",
)
EPS_DOMINATES = Rule(
    id="propagation.eps-dominates",
    threshold=EPS_WEIGHT,
    threshold_source="identity: at 0.5 eps equals the variance, and the output has 0.7 of unit variance",
    source="ioffe2015",
    cause="The input of the layer is so small, or its eps so large, that it divides by sqrt(eps) instead of "
    "normalizing.",
    remedy="Use a smaller eps (1e-5 is usual, in float32), or give the layer a larger input: check the scale of the "
    "layer before it and of the data.",
)


def signal_exploding(record: Record) -> list[Finding]:
    """Judge whether activations grow from layer to layer, or one layer's without end through the run.

    Args:
        record: record of one run.

    Returns:
        One finding, none where there is no layer to compare.
    """
    found = over_depth(SIGNAL_EXPLODING, record, "value", ("rms",), sign=1)
    if any(f.verdict in (Verdict.FAILURE, Verdict.WARNING) for f in found):
        return found
    ratios = metrics.growth(record).sort_values("value", ascending=False, na_position="last")
    grown = ratios[ratios["value"] > FACTOR]
    if not len(grown):
        return found
    site, ratio = str(grown["site"].iloc[0]), float(grown["value"].iloc[0])
    start, end = float(grown["start"].iloc[0]), float(grown["end"].iloc[0])
    large = tables.table(record, "rms")[site].dropna() > (start * end) ** 0.5
    return SIGNAL_EXPLODING.found(
        Verdict.FAILURE if ratio > SEVERE_FACTOR else Verdict.WARNING,
        f"The output of {site} has grown {ratio:.3g}-fold since the start of the run (threshold {FACTOR:g}), "
        f"from an rms of {start:.2g} to {end:.2g}; {len(grown)} of {count(len(ratios), 'site')} beyond it.",
        sites=[str(name) for name in grown["site"]],
        step=tables.onset(large),
        evidence={"growth": ratio, "sites_beyond": len(grown), "rms_first": start, "rms_last": end},
        cause="The run diverges: steps are larger than the loss's curvature allows, or nothing holds the weights.",
        remedy="Lower the learning rate or warm it up, clip gradients; for logits add weight decay or a z-loss.",
    )


def signal_vanishing(record: Record) -> list[Finding]:
    """Judge whether activations, or what differs in them between inputs, shrink from layer to layer.

    Args:
        record: record of one run.

    Returns:
        One finding, none where there is no layer to compare.
    """
    return over_depth(SIGNAL_VANISHING, record, "value", ("rms", "std"), sign=-1)


def gradient_exploding(record: Record) -> list[Finding]:
    """Judge whether gradients grow from layer to layer on their way to the input, or through the run.

    Args:
        record: record of one run.

    Returns:
        One finding, none where there is no layer to compare.
    """
    kinds = set(tables.layers(record)["norm"].dropna())
    rule = GRADIENT_EXPLODING
    if "batch" in kinds:
        cause = "Without shortcuts batch normalization multiplies the gradient at each layer, most of all at the start."
        remedy = "Add shortcuts around the blocks, warm up the learning rate, or use fewer layers between shortcuts."
        rule = replace(rule, source="yang2019", cause=cause, remedy=remedy)
    found = over_depth(rule, record, "gradient", ("norm",), sign=-1, at_start=Verdict.WARNING)
    if any(f.verdict in (Verdict.FAILURE, Verdict.WARNING) for f in found):
        return found
    norm = tables.context(record)["grad_norm"]
    norm = norm[np.isfinite(norm) & (norm > 0)]
    start = float(norm.iloc[:10].median()) if len(norm) >= 20 else math.nan
    ratio = float(norm.iloc[-5:].median()) / start if len(norm) >= 20 else math.nan
    if not ratio > FACTOR:
        return found
    return rule.found(
        Verdict.FAILURE if ratio > SEVERE_FACTOR else Verdict.WARNING,
        f"The gradient norm has grown {ratio:.3g}-fold since the start of the run (threshold {FACTOR:g}).",
        step=tables.onset(norm > ratio**0.5 * start),
        evidence={"growth": ratio, "first": start, "last": float(norm.iloc[-5:].median())},
        cause="The run diverges: steps are larger than the loss's curvature allows.",
        remedy="Lower the learning rate or warm it up, and clip gradients with torch.nn.utils.clip_grad_norm_.",
    )


def gradient_vanishing(record: Record) -> list[Finding]:
    """Judge whether gradients shrink from layer to layer on their way to the input.

    Args:
        record: record of one run.

    Returns:
        One finding, none where there is no layer to compare.
    """
    return over_depth(GRADIENT_VANISHING, record, "gradient", ("norm",), sign=1)


@tables.once
def dead_units(record: Record) -> list[Finding]:
    """Judge whether units are zero for every input, by their values or, behind a functional ReLU, by their gradients.

    Args:
        record: record of one run.

    Returns:
        One finding, none where there is nothing that could die.
    """
    cut = metrics.cut_off(record)
    if cut:
        return units.cut(DEAD_UNITS, record, cut)
    by_value = metrics.dead_fraction(record, MIN_VALUES).assign(role="value")
    by_gradient = metrics.unused_fraction(record).assign(role="gradient")
    frame = pd.concat([f for f in (by_value, by_gradient) if len(f)] or [by_value])
    frame = frame[frame["value"].notna()].sort_values("value", ascending=False, kind="stable")
    if not len(frame):
        return []
    known = (frame["role"] == "gradient") | (frame["n"] >= MIN_VALUES)
    dead = frame[known & (frame["value"] > DEAD)]
    unsure = frame[~known & (frame["value"] > DEAD)]
    top = frame.iloc[0]
    if len(dead):
        return units.dead(DEAD_UNITS, record, dead)
    if len(unsure):
        return DEAD_UNITS.undecided(
            f"{top['site']}: {top['value']:.0%} of the channels were zero on all {top['n']} values seen; fewer than "
            f"{MIN_VALUES} do not tell rare units from dead ones.",
            "Train for more steps, or pass a smaller every= to attach.",
            evidence={"dead_fraction": float(top["value"]), "values": int(top["n"])},
        )
    message = f"At most {top['value']:.1%} of a layer's units are dead ({top['site']}; threshold {DEAD:.0%})."
    return DEAD_UNITS.ok(message, {"dead_fraction": float(top["value"]), "layers": len(frame)})


def saturated_units(record: Record) -> list[Finding]:
    """Judge whether hidden bounded activations sit at the ends of their range.

    Args:
        record: record of one run.

    Returns:
        One finding, none where there is no hidden bounded activation.
    """
    frame = metrics.saturation(record).dropna(subset="value").sort_values("value", ascending=False, kind="stable")
    if not len(frame):
        return []
    site, value = str(frame["site"].iloc[0]), float(frame["value"].iloc[0])
    beyond = frame[frame["value"] > SATURATED]
    evidence = {"saturated_fraction": value, "sites_beyond": len(beyond), "layers": len(frame)}
    if value <= FULLY_SATURATED and 2 * len(beyond) <= len(frame):
        return SATURATED_UNITS.ok(
            f"At most {value:.0%} of the values saturate ({site}), and more than {SATURATED:.0%} (threshold) in "
            f"{len(beyond)} of {len(frame)} hidden bounded activations.",
            evidence,
        )
    since = tables.onset(tables.table(record, "saturated")[site].dropna() > SATURATED)
    grown = bool(since) and training.learned(record)  # weights of a solved problem grow until its units saturate
    return SATURATED_UNITS.found(
        Verdict.NOTE if grown else Verdict.FAILURE if value > units.NEARLY_ALL else Verdict.WARNING,
        f"{site}: {value:.0%} of the values are within 1 % of the ends of the range (threshold {SATURATED:.0%}); "
        f"{len(beyond)} of {len(frame)} hidden bounded activations are beyond it.",
        sites=beyond["site"].tolist(),
        step=since,
        evidence=evidence,
    )


def non_finite(record: Record) -> list[Finding]:
    """Judge whether NaN or infinity appeared: at which step, and at a sampled step at which site.

    A step that a GradScaler skipped is part of its work, unless 25 in a row are, or values overflow in the forward
    pass.

    Args:
        record: record of one run.

    Returns:
        A failure where step and site are known, undecided with the sampled steps around it where the site is not.
    """
    steps, places = metrics.nonfinite_steps(record), metrics.nonfinite_sites(record)
    norms = int(np.isfinite(tables.context(record)["grad_norm"]).sum())
    lasting = steps[~steps["skipped"] | (steps["streak"] >= STREAK)]
    if len(lasting):
        begun = int(lasting["streak"].iloc[0]) - 1 if lasting["skipped"].iloc[0] else 0
        first = int(lasting.index[0]) - begun
        return _broken(record, first, places[places["step"] == first], len(steps))
    overflowed = places[(places["role"] == "value") & places["step"].isin(steps.index)]
    if len(overflowed):
        return _overflowed(overflowed)
    others = places[~places["step"].isin(steps.index)]
    if len(others) and norms:
        return _unused(others)
    if len(others):
        first = int(others["step"].iloc[0])
        earlier = record.steps[record.steps < first]
        exact = not len(earlier) or int(earlier[-1]) == first - 1
        return _broken(record, first, others.iloc[: int(exact)], len(others))
    if not norms and not len(record.steps):
        return []
    evidence = {"steps": norms, "sampled": len(record.steps)}
    return NON_FINITE.ok(
        f"Finite: {count(norms, 'gradient norm')} and the values of {count(len(record.steps), 'sampled step')}.",
        evidence,
    )


def outlier_channels(record: Record) -> list[Finding]:
    """Judge whether single channels, or single values, are far larger than the rest: a note, for it is often normal.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no channels were recorded or where the run ends broken, which explains any size.
    """
    if run.ending(record) is not None:
        return []
    frame = metrics.outliers(record).dropna(subset="value").sort_values("value", ascending=False, kind="stable")
    if not len(frame):
        return []
    beyond = frame[(frame["value"] > OUTLIER) | (frame["peak"] > PEAK)]
    top = (beyond if len(beyond) else frame).iloc[0]
    evidence = {name: float(top[key]) for name, key in (("ratio", "value"), ("kurtosis", "kurtosis"), ("peak", "peak"))}
    said = f"the largest channel has {top['value']:.3g} times the rms of the median one (threshold {OUTLIER:g})"
    if not len(beyond):
        return OUTLIER_CHANNELS.ok(f"{top['site']}: {said}.", evidence)
    finite = not len(metrics.nonfinite_sites(record)) and not len(metrics.nonfinite_steps(record))
    attends = finite and metrics.is_transformer(record)
    return OUTLIER_CHANNELS.found(
        Verdict.NOTE,
        f"{top['site']}: {said}, the largest value {top['peak']:.3g} times (threshold {PEAK:g}); "
        f"{count(len(beyond), 'site')} beyond it.",
        sites=beyond["site"].tolist(),
        evidence=evidence | {"sites_beyond": len(beyond)},
        cause="A few channels carry nearly constant huge values, which attention uses as a bias; usual in trained "
        "language models."
        if attends
        else None,
        remedy="For 8-bit inference keep these channels in higher precision; training can go on." if attends else None,
    )


def massive_activations(record: Record) -> list[Finding]:
    """Judge whether single tokens carry values far beyond all others at the inputs of norms: a note.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no tokens enter a layer or RMS norm, or where the run ends broken.
    """
    frame = tokens.peaks(record)
    if not len(frame) or run.ending(record) is not None:
        return []
    beyond = frame[(frame["value"].abs() > MASSIVE) & (frame["ratio"] > MASSIVE_RATIO)]
    top = (beyond if len(beyond) else frame).iloc[0]
    evidence = {name: float(top[name]) for name in ("value", "ratio")} | {n: int(top[n]) for n in ("token", "channel")}
    said = (
        f"{top['site']}: the largest value is {top['value']:.4g} (threshold {MASSIVE:g}), {top['ratio']:.3g} times the "
    )
    said += f"median (threshold {MASSIVE_RATIO:g}), at token {top['token']} in channel {top['channel']}"
    if not len(beyond):
        return MASSIVE_ACTIVATIONS.ok(f"{said}.", evidence)
    places = ", ".join(f"({t}, {c})" for t, c in dict.fromkeys(zip(beyond["token"], beyond["channel"], strict=True)))
    sites = list(dict.fromkeys(map(str, beyond["site"])))
    return MASSIVE_ACTIVATIONS.found(
        Verdict.NOTE,
        f"{said}; beyond both at {count(len(sites), 'norm')}, (token, channel) {places}.",
        sites=sites,
        step=int(top["step"]),
        evidence=evidence | {"sites_beyond": len(sites), "places": places},
    )


def eps_dominates(record: Record) -> list[Finding]:
    """Judge whether eps outweighs the variance that a normalization layer divides by.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no normalization layer with an eps was recorded.
    """
    frame = metrics.eps_weight(record).dropna(subset="value").sort_values("value", ascending=False, kind="stable")
    if not len(frame):
        return []
    site, value = str(frame["site"].iloc[0]), float(frame["value"].iloc[0])
    weights = tables.table(record, "eps_weight.q50", slot="input")[site].dropna()
    evidence = {"eps_weight": value, "sites_beyond": int((frame["value"] > EPS_WEIGHT).sum()), "layers": len(frame)}
    if value <= EPS_NOTICEABLE:
        return EPS_DOMINATES.ok(
            f"eps is at most {value:.2g} of a denominator ({site}; threshold {EPS_WEIGHT}).", evidence
        )
    dead = units.origin(record, dead_units(record), site)
    follows = f" This is probably a consequence of {units.DEAD_UNITS} at {dead}." if dead else ""
    floor, verdict = (EPS_WEIGHT, Verdict.WARNING) if value > EPS_WEIGHT else (EPS_NOTICEABLE, Verdict.NOTE)
    return replace(EPS_DOMINATES, threshold=floor).found(
        verdict,
        f"{site}: eps makes up {value:.0%} of variance + eps in the median channel or token (threshold {floor:.0%})."
        f"{follows}",
        sites=frame.loc[frame["value"] > floor, "site"].tolist(),
        step=tables.onset(weights > floor),
        evidence=evidence,
        cause=f"The units before it are zero, probably since {dead}." if dead else None,
        remedy=f"Mend {units.DEAD_UNITS} at {dead} first." if dead else None,
    )


def _broken(record: Record, first: int, places: pd.DataFrame, steps: int) -> list[Finding]:
    """Conclude that values are not finite from a step on, with the site if that step was sampled."""
    if len(places):
        where = places.iloc[0]
        what = {"value": "output", "gradient": "gradient"}.get(str(where["role"]), "weight gradient")
        return NON_FINITE.found(
            Verdict.FAILURE,
            f"Step {first}: the {what} of {where['site']} is the first to hold NaN or infinity, in "
            f"{count(where['channels'], 'channel')} (threshold 0); at this step {count(where['sites'], 'site')} "
            f"{'does' if where['sites'] == 1 else 'do'}.",
            sites=[str(where["site"])],
            step=first,
            evidence={
                "channels": int(where["channels"]),
                "sites_hit": int(where["sites"]),
                "steps": steps,
                "role": what,
            },
            **(_FROM_BATCH if what == "output" and str(where["site"]) == _entry(record) else {}),
        )
    sampled, broke = record.steps, run.ending(record) is not None
    before, after = sampled[sampled < first], sampled[sampled > first]
    ends = [f"step {side[0]}" if len(side) else "none" for side in (before[::-1], after)]
    return NON_FINITE.found(
        Verdict.UNDECIDED,
        f"{'Training broke' if broke else 'Values are NaN or infinite'} at step {first} (threshold 0); only the layer "
        f"where it began is unknown, for it was not sampled then: sampled before was {ends[0]}, after it {ends[1]}.",
        step=first,
        evidence={"sampled_before": int(before[-1]) if len(before) else -1, "steps": steps}
        | ({"sampled_after": int(after[0])} if len(after) else {}),
        remedy=f"Restart from a checkpoint before step {first} with attach(every=1) to see the layer where it begins.",
    )


def _entry(record: Record) -> str:
    """Return the output of the layer that runs first, whose input no other layer has made."""
    outputs = record.sites[record.sites["slot"].astype(str).str.startswith("output")]
    return str(outputs.sort_values("order")["site"].iloc[0]) if len(outputs) else ""


def _overflowed(places: pd.DataFrame) -> list[Finding]:
    """Conclude that values overflow in the forward pass of steps that a GradScaler then skips."""
    where = places.iloc[0]
    return NON_FINITE.found(
        Verdict.WARNING,
        f"{where['site']} overflowed in the forward pass of step {where['step']}, which the scaler skipped; in all "
        f"{count(len(places), 'sampled step')} overflowed (threshold 0).",
        sites=[str(where["site"])],
        step=int(where["step"]),
        evidence={"steps": len(places), "channels": int(where["channels"])},
        cause="Half precision ends at 65504; lowering the loss scale cannot help in the forward pass.",
        remedy="Run this layer in float32 (torch.autocast(enabled=False) around it), or use bfloat16.",
    )


def _unused(places: pd.DataFrame) -> list[Finding]:
    """Conclude that values are not finite while the gradient is."""
    where = places.iloc[0]
    return NON_FINITE.found(
        Verdict.NOTE,
        f"{where['site']} holds NaN or infinity in {count(where['channels'], 'channel')} at step {where['step']} "
        "while the gradient norm is finite.",
        sites=[str(where["site"])],
        step=int(where["step"]),
        evidence={"channels": int(where["channels"]), "steps": len(places)},
        cause="A mask written as -inf, or values that the loss does not use.",
        remedy="Follow where this output goes, unless it is a mask.",
    )
