"""Depth: the verdict on a magnitude that runs away from layer to layer, for signal and gradient alike."""

from __future__ import annotations

import math

import pandas as pd

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics.rule import Rule
from normscope.diagnostics.words import count, fold
from normscope.metrics import propagation as metrics

FACTOR = 1e3  # ratio of magnitudes between the ends of the network, or of the run; origin: FACTOR_SOURCE
SEVERE_FACTOR = 2.0**23  # 1 / eps of float32: beside the larger end the smaller one has no digit left
FACTOR_SOURCE = (
    "measured: in 40 runs that train well (residual CNNs, transformers, perceptrons to 16 layers) the ends of the "
    "network differ by less than 25 and outputs grow by less than 60; with a wrong gain the ends differ by more than "
    "7000"
)
_SCAN = 32  # rows looked at to date an onset
_LEVEL = 1.05  # factor below which messages say that nothing changes


def over_depth(
    rule: Rule, record: Record, role: str, measures: tuple[str, ...], sign: int, at_start: Verdict = Verdict.NOTE
) -> list[Finding]:
    """Judge a magnitude over depth.

    A verdict needs a rate per layer whose 95 % interval excludes zero, a total beyond `FACTOR`, and more than its root
    without the largest step: a network whose layers alternate, that grows slowly as residual ones do, or that has one
    layer of another scale, lacks one of them.

    Args:
        rule: the finding's fixed part.
        record: record of one run.
        role: "value" or "gradient".
        measures: what to compare (see `metrics.magnitudes`); the first that is beyond decides.
        sign: sign of the bad rate, in order of execution.
        at_start: the verdict if only the first sampled step is beyond.

    Returns:
        One finding; none where there is no layer to compare.
    """
    sites = metrics.comparable(record)
    if not sites:
        return []
    noun = "gradient" if role == "gradient" else "signal"
    if len(sites) < metrics.MIN_LAYERS:
        return rule.ok(f"With {count(len(sites), 'layer')} of one kind the {noun} cannot run away over depth.")
    tables = {measure: metrics.magnitudes(record, role=role, measure=measure) for measure in measures}
    seen: list[metrics.Depth] = []
    for which, verdict in ((1, None), (0, at_start)):
        for measure, magnitude in tables.items():
            depth = metrics.depth(metrics.windows(magnitude)[which])
            if _beyond(depth, sign):
                return _found(rule, depth, role, measure, _first_beyond(magnitude, sign), verdict)
            seen += [depth] if depth.rate.usable else []
    if not seen and metrics.cut_off(record):
        return []  # exactly zero, which is the matter of propagation.dead-units
    if not seen:
        return rule.undecided(
            f"No {noun} was recorded at half or more of the {len(sites)} layers of one kind.",
            "Attach for at least one training step, forward and backward, with finite values.",
        )
    worst = max(seen, key=lambda depth: depth.total * sign)
    evidence = {"total": math.exp(abs(worst.total)), "rate_per_layer": math.exp(worst.rate.value)}
    return rule.ok(_level(rule, worst, noun, sign), evidence | {"layers": worst.rate.n})


def _level(rule: Rule, depth: metrics.Depth, noun: str, sign: int) -> str:
    """Say what a magnitude does instead of running away."""
    exploding = rule.id.endswith("exploding")
    bad, good = ("grow", "shrink") if exploding else ("shrink", "grow")
    towards = "Towards the input" if noun == "gradient" else "Towards the output"
    over, change = f"over {depth.rate.n} layers of one kind", math.exp(abs(depth.total))
    unsteady = ", but not steadily from layer to layer" if change > FACTOR else ""
    if change < _LEVEL:
        return f"{towards} the {noun} does not {bad} {over} (threshold {FACTOR:g}-fold)."
    if depth.total * sign > 0:
        return f"{towards} the {noun} {bad}s {fold(change)} {over} (threshold {FACTOR:g}){unsteady}."
    other = f"{rule.id.rpartition('-')[0]}-{'vanishing' if exploding else 'exploding'}"
    see = f", see {other}" if _beyond(depth, -sign) else unsteady
    return f"{towards} the {noun} does not {bad} {over}: it {good}s {fold(change)}{see}."


def _beyond(depth: metrics.Depth, sign: int) -> bool:
    rate = depth.rate
    sustained = rate.usable and rate.value * sign > 1.96 * rate.standard_error
    return sustained and depth.total * sign > math.log(FACTOR) and depth.sustained * sign > 0.5 * math.log(FACTOR)


def _first_beyond(magnitude: pd.DataFrame, sign: int) -> int | None:
    rows = magnitude.iloc[:: max(1, len(magnitude) // _SCAN)]
    steps = (step for step in rows.index if _beyond(metrics.depth(rows.loc[[step]]), sign))
    return next((int(step) for step in steps), None)


def _found(
    rule: Rule, depth: metrics.Depth, role: str, measure: str, step: int | None, at_start: Verdict | None
) -> list[Finding]:
    rate, total = depth.rate, math.exp(abs(depth.total))
    backward = role == "gradient"
    per_layer = math.exp(-rate.value if backward else rate.value)
    verdict = at_start or (Verdict.FAILURE if total > SEVERE_FACTOR else Verdict.WARNING)
    what = {"value": {"rms": "signal", "std": "part of the signal that differs between inputs"}.get(measure, "signal")}
    noun = what.get(role, "gradient")
    message = (
        f"The {noun} is multiplied by {per_layer:.3g} per layer {'towards the input ' if backward else ''}over "
        f"{rate.n} layers of one kind, {total:.3g}-fold in all (threshold {FACTOR:g})"
        f"{' at the start of the run; later it is not' if at_start else ''}."
    )
    grown = step is not None and step > 0 and at_start is None  # no matter of initialization
    ends = (depth.first, depth.last) if backward else (depth.last, depth.first)
    spread = 1.96 * rate.standard_error
    evidence: dict[str, float | int | str | list[float]] = {
        "rate_per_layer": per_layer,
        "rate_interval": [math.exp(-spread) * per_layer, math.exp(spread) * per_layer],
        "total": total,
        "layers": rate.n,
        "at_first_layer": depth.at_first,
        "at_last_layer": depth.at_last,
        "measure": measure,
    }
    return rule.found(
        verdict,
        message,
        sites=ends,
        step=step,
        evidence=evidence,
        cause=f"It is so from step {step} on: steps, not the initial weights, have brought it about."
        if grown
        else None,
        remedy="Lower the learning rate or warm it up (torch.optim.lr_scheduler.LinearLR), and clip gradients."
        if grown
        else None,
    )
