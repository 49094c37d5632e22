"""Curvature: is the learning rate too large for the sharpness, and what shape does the loss have around the weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics.rule import Evidence, Rule
from normscope.diagnostics.words import count
from normscope.metrics import curvature as metrics
from normscope.metrics import run, tables

# origin of each threshold: the `threshold_source` of the rule that uses it
EDGE = 1.0  # sharpness over its value at the edge of stability
NEAR = 0.8
GROWN = 0.1  # growth of the held loss, of its size
OUTLYING = 6.0  # largest eigenvalue over the K-th
SHARE = 0.9  # of the trace in one layer
FEWEST_LAYERS = 4
NEGATIVE = 0.5  # of the absolute mass of the spectrum
_CERTAIN = 3.0  # standard errors

PASS_PROBLEM = (
    "Pass problem=normscope.Problem(model, loss, [(inputs, targets)]) to attach; a batch of the size of those trained "
    "on is enough."
)

EDGE_OF_STABILITY = Rule(
    id="curvature.edge-of-stability",
    threshold=EDGE,
    threshold_source="identity: on a quadratic, gradient descent grows without end above a sharpness of 2 / lr, with "
    "momentum b above (2 + 2 b) / lr, Adam above (2 + 2 b) / ((1 - b) lr) for the largest eigenvalue of P^-1 H; "
    "full-batch training settles there and goes on, so a warning needs a growing loss too",
    source="cohen2021",
    cause="The learning rate is too large for the curvature: steps overshoot along the sharpest direction.",
    remedy="Lower the learning rate below the value stated or warm it up (torch.optim.lr_scheduler.LinearLR); a "
    "normalization layer, or gradient clipping (torch.nn.utils.clip_grad_norm_), makes larger ones bearable.",
)
OUTLIERS = Rule(
    id="curvature.outliers",
    threshold=OUTLYING,
    threshold_source="measured: networks of 4 layers on MNIST at steps 50 to 100 have 1.6 to 3.0 with BatchNorm and "
    "7.1 to 9.7 without; 6 is twice the largest of the former",
    source="ghorbani2019",
    cause="A few directions are far steeper than all others, as in networks without normalization or with one sample "
    "class or layer that rules the loss.",
    remedy="Nothing must be done while the loss falls. BatchNorm before the nonlinearities removes such outliers "
    '(normscope.norms.convert(model, to="batch") where layers are of another kind).',
)
TRACE_DOMINATED = Rule(
    id="curvature.trace-dominated",
    threshold=SHARE,
    threshold_source="identity: with shares above 0.9 all other layers together hold a tenth of the curvature",
    source="yao2020",
    cause="One layer is far steeper than the others, so it alone limits the learning rate that all of them share.",
    remedy="Normalize what enters this layer, or give it a parameter group with a smaller learning rate.",
)
NEGATIVE_CURVATURE = Rule(
    id="curvature.negative",
    threshold=NEGATIVE,
    threshold_source="identity: 0.5 for a spectrum that is symmetric about 0, as of a random matrix, 0 at a minimum; "
    "measured: a residual network at a loss of 0.08 still has 0.42, by the one random vector of a snapshot",
    source="ghorbani2019",
    cause="The weights are near a saddle: as many directions go down as up, as at the start of training.",
    remedy="Train on; where the loss has stopped falling, a larger learning rate or momentum leaves a saddle.",
)


def edge_of_stability(record: Record) -> list[Finding]:
    """Judge whether the learning rate is above what the sharpness allows.

    Args:
        record: record of one run.

    Returns:
        One finding, none where a problem was given and nothing could be measured.
    """
    frame = metrics.stability(record)
    measured = frame.dropna(subset=["sharpness"])
    if not len(measured):
        lacking = record.runs and record.runs[0].get("problem") is False and len(record.steps)
        return EDGE_OF_STABILITY.undecided("The curvature was not measured.", PASS_PROBLEM) if lacking else []
    step, last = int(measured.index[-1]), measured.iloc[-1]
    evidence = _evidence(last)
    if not np.isfinite(last["ratio"]):
        return _without_edge(metrics.snapshot(record, step), evidence)
    fraction = f"{last['ratio']:.2g} of what is stable"
    scaled = np.isfinite(metrics.snapshot(record, step)["preconditioned"])
    kind = "preconditioned sharpness" if scaled else "sharpness"
    said = f"At step {step} the {kind} is {last['sharpness']:.3g}, {fraction} at this learning rate"
    broken = _growth(record, frame, step)
    if last["ratio"] > EDGE and broken:
        rate = metrics.snapshot(record, step)["lr"] / last["ratio"]
        return EDGE_OF_STABILITY.found(
            Verdict.WARNING,
            f"{said} (threshold {EDGE:g}), and {broken}; stable below a learning rate of {rate:.2g}.",
            step=step,
            evidence=evidence | {"stable_lr": float(rate)},
        )
    if step == 0 and not tables.at_rest(record):
        return EDGE_OF_STABILITY.ok(f"{said}; before training that decides nothing.", evidence)
    if last["ratio"] > NEAR:
        return replace(EDGE_OF_STABILITY, threshold=NEAR).found(
            Verdict.NOTE,
            f"{said} (threshold {NEAR:g}): training is at the edge of stability, and the loss does not grow.",
            step=step,
            evidence=evidence,
            cause="Sharpness rises until the learning rate stops it; large batches train there for long.",
            remedy="Nothing must be done; a larger learning rate is likely to make the loss spike.",
        )
    return EDGE_OF_STABILITY.ok(f"{said} (threshold {EDGE:g}).", evidence)


def outliers(record: Record) -> list[Finding]:
    """Judge whether a few eigenvalues lie far above the others.

    Args:
        record: record of one run.

    Returns:
        One finding, none where the K-th eigenvalue was never resolved.
    """
    ratios = metrics.outlier_ratio(record).dropna()
    if not len(ratios):
        return []
    step, ratio = int(ratios.index[-1]), float(ratios.iloc[-1])
    row = metrics.snapshot(record, step)
    evidence: Evidence = {"outlier_ratio": ratio, "k": int(row["k"]), "gradient_energy": row["energy"]}
    said = (
        f"At step {step} the largest eigenvalue of the Hessian is {ratio:.2g} times the {row['k']:.0f}th "
        f"(threshold {OUTLYING:g})"
    )
    if ratio <= OUTLYING:
        return OUTLIERS.ok(f"{said}.", evidence)
    energy = f"the {row['k']:.0f} steepest directions hold {row['energy']:.0%} of the squared gradient"
    return OUTLIERS.found(Verdict.NOTE, f"{said}; {energy}.", step=step, evidence=evidence)


def trace_dominated(record: Record) -> list[Finding]:
    """Judge whether one layer holds nearly all of the curvature.

    Args:
        record: record of one run.

    Returns:
        One finding, none for fewer than `FEWEST_LAYERS` layers with parameters.
    """
    frame = metrics.balance(record).dropna(subset=["share"])
    if len(frame) < FEWEST_LAYERS:
        return []
    top = frame.sort_values("share", ascending=False, kind="stable").iloc[0]
    share, certain = float(top["share"]), abs(top["trace"]) > _CERTAIN * top["error"]
    layers = count(len(frame), "layer")
    said = f"{top.name or 'the model itself'} has {share:.0%} of the trace of the Hessian over {layers}"
    evidence: Evidence = {"share": share, "trace": float(top["trace"]), "standard_error": float(top["error"])}
    if share <= SHARE or not certain:
        return TRACE_DOMINATED.ok(f"At most: {said} (threshold {SHARE:g}).", evidence)
    site = _site(record, str(top.name))
    return TRACE_DOMINATED.found(Verdict.NOTE, f"{said} (threshold {SHARE:g}).", sites=[site], evidence=evidence)


def negative(record: Record) -> list[Finding]:
    """Judge whether the weights at the end are near a saddle rather than a minimum.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no spectrum was kept.
    """
    mass = metrics.negative_mass(record).dropna()
    if not len(mass):
        return []
    step, share = int(mass.index[-1]), float(mass.iloc[-1])
    row = metrics.snapshot(record, step)
    evidence: Evidence = {"negative_mass": share, "smallest": row["smallest"]}
    said = (
        f"At step {step} {share:.0%} of the curvature is negative (threshold {NEGATIVE:.0%}), down to an eigenvalue of "
        f"{row['smallest']:.3g}"
    )
    if share <= NEGATIVE:
        return NEGATIVE_CURVATURE.ok(f"{said}.", evidence)
    return NEGATIVE_CURVATURE.found(Verdict.NOTE, f"{said}.", step=step, evidence=evidence)


def _evidence(row: pd.Series) -> dict[str, float | int | str | list[float]]:
    names = ("sharpness", "residual", "edge", "ratio", "held_loss")
    return {name: float(row[name]) for name in names if np.isfinite(row[name])}


def _without_edge(row: dict[str, float], evidence: Evidence) -> list[Finding]:
    """Say what the sharpness means where no optimizer, or one whose rule is not known, goes with it."""
    sharpness = row["sharpness"]
    if sharpness > 0:
        return EDGE_OF_STABILITY.ok(
            f"The sharpness is {sharpness:.3g}: gradient descent is stable below a learning rate of "
            f"{2 / sharpness:.2g} (threshold {EDGE:g} of that). No optimizer with a known edge was recorded.",
            {**evidence, "stable_lr": 2 / sharpness},
        )
    return EDGE_OF_STABILITY.ok(
        f"The largest eigenvalue of the Hessian is {sharpness:.3g}: no direction of the loss curves upwards, which "
        f"sets no limit to the learning rate (threshold {EDGE:g}).",
        evidence,
    )


def _growth(record: Record, frame: pd.DataFrame, step: int) -> str:
    """Say how the loss has grown around the last measured snapshot, "" where it has not."""
    later = frame["held_loss"][frame.index > step]
    if len(later) and not np.isfinite(later).all():
        return f"the loss on held samples is not finite at step {later.index[-1]}"
    ended = run.ending(record)
    if ended is not None and ended.step >= step:
        return f"training broke at step {ended.step}"
    seen = frame["held_loss"][frame.index <= step]
    if len(seen) < 2:
        return ""
    before, now = float(seen.iloc[-2]), float(seen.iloc[-1])
    if now - before > GROWN * abs(before):
        return f"the loss on held samples has grown from {before:.3g} to {now:.3g} since step {seen.index[-2]}"
    return ""


def _site(record: Record, module: str) -> str:
    """Return the output of a module where the record knows it, else its first parameter with a trace."""
    known = [str(site) for site in record.sites.reindex(columns=["site"])["site"]]
    return f"{module}/output" if f"{module}/output" in known else f"{module}/weight"
