"""Gap: which statistics a model should be served with, and which of its norms is to blame where these are not its own.

The ids belong to the subject mismatch; they judge measurements of a model at rest, not a record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from normscope.core.estimate import Estimate, Status
from normscope.core.finding import Finding, Verdict, worst_first
from normscope.diagnostics.rule import Rule
from normscope.diagnostics.words import count
from normscope.metrics import gap as metrics
from normscope.metrics.gap import BATCH, GIVEN, RUNNING, TARGET, TRAINING, Measurements

# origin of each threshold: the `threshold_source` of the rule that uses it
NOTICEABLE = 0.01  # part of the metric; a smaller change is no reason to act
LARGE = 0.1
LAST_BATCH = 0.9  # momentum from which only the last batch counts
WARM_WEIGHT = 0.05  # weight of the initial statistics below which an average is warmed up
_KEPT = 8

_LIMIT = (
    "identity: Student's t at 1% for all comparisons of its kind together (Bonferroni), times the standard error of "
    "the paired difference; at least 1% of the metric"
)
STORED = Rule(
    id="mismatch.stored-statistics",
    threshold=None,
    threshold_source=_LIMIT,
    source="ioffe2017",
    cause="The stored statistics are not those of the training data under the trained weights.",
    remedy="normscope.norms.recalibrate(model, train_batches), then save the model with its buffers.",
)
SHIFT = Rule(
    id="mismatch.target-shift",
    threshold=None,
    threshold_source=_LIMIT,
    source="schneider2020",
    cause="The inputs that the model serves are distributed otherwise than those it was trained on.",
    remedy="normscope.norms.recalibrate(model, target_batches) on unlabelled inputs of the service; where these change "
    "all the time and come in batches as large as these, use batch statistics instead.",
)
MODE = Rule(
    id="mismatch.served-in-training-mode",
    threshold=None,
    threshold_source=_LIMIT,
    source="ioffe2015",
    cause="model.eval() was never called, or model.train() was called after it.",
    remedy="Call model.eval() before the model is saved, exported or served.",
)
BATCHES = Rule(
    id="mismatch.batch-statistics",
    threshold=None,
    threshold_source=_LIMIT,
    source="nado2020",
    cause="",
    remedy="",
)
ALONE = Rule(
    id="mismatch.norm-cost",
    threshold=None,
    threshold_source=_LIMIT,
    source="li2016",
    cause="Its stored statistics do not describe its input.",
    remedy="Recalibrate it: normscope.norms.recalibrate(model, batches).",
)
BROKEN = Rule(
    id="mismatch.broken-statistics",
    threshold=0.0,
    threshold_source="identity: a mean is finite, a variance finite and not negative",
    source="ioffe2015",
    cause="A forward pass in training mode over NaN or infinity, as after an overflow in half precision, or a damaged "
    "checkpoint; one such batch stays in a running average forever.",
    remedy="normscope.norms.recalibrate(model, train_batches) takes the statistics anew.",
)
FROZEN = Rule(
    id="mismatch.frozen-norms",
    threshold=None,
    threshold_source="identity: layers whose statistics do not change with their mode",
    source="wu2021",
    cause="Layers of this class use their stored statistics in both modes.",
    remedy="",
)


def judge(measured: Measurements) -> list[Finding]:
    """Judge what was measured of a model.

    Args:
        measured: the measurements.

    Returns:
        Findings, worst first: one each of stored statistics, target shift, batch statistics and mode, one of the norms
        by themselves, and where there are any, one of norms with numbers that cannot be and of those that no mode
        switches.
    """
    judges = (_stored, _shift, _batches, _mode, _alone, _broken, _frozen)
    return worst_first(finding for one in judges for finding in one(measured))


def _stored(m: Measurements) -> list[Finding]:
    """Judge whether statistics of the training data are better than the stored ones."""
    gain = m.gain(TRAINING)
    if gain is None:
        why = m.missing.get(TRAINING, "no training batches were given")
        return STORED.undecided(f"The stored statistics were not compared with those of training data: {why}.", _PASS)
    said = f"recalibrated on training data, {_pair(m, TRAINING, RUNNING)}"
    found = _verdict(STORED, m, gain, said, cause=_why(m), sites=_blamed(m))
    stale = _stale(m)
    if found[0].verdict is not Verdict.OK or not stale:
        return found
    column = "kl" if m.data == "training" else "kl_train"
    worse = gain.value < 0 and _beyond(m, gain, len(m.rows) - 1)
    return STORED.found(
        Verdict.NOTE,
        f"At {len(stale)} of {count(len(m.norms), 'norm')} the stored statistics lie further from those of training "
        f"data than sampling explains (worst {stale[0]}: {m.norm(stale[0])[column]:.2g} nats), yet "
        f"{said}{_paired(gain)}.",
        sites=stale[:_KEPT],
        evidence=_evidence(m, gain) | {"kl": float(m.norm(stale[0])[column])},
        cause=_OTHER if worse else reason(m.norm(stale[0]))[0],
        remedy="Keep the stored statistics; pass more batches of the training data, as various as these are."
        if worse
        else None,
    )


def _shift(m: Measurements) -> list[Finding]:
    """Judge whether statistics of the target data are better than both the stored ones and those of training data."""
    if m.data != "target":
        return SHIFT.undecided("No target batches were given, so nothing is said of the data that is served.", _TARGET)
    trained = m.gain(TRAINING)
    before = TRAINING if trained and trained.value > 0 else RUNNING
    gain = m.gain(TARGET, before)
    if gain is None:
        return SHIFT.undecided(f"Target data: not measured, {m.missing.get(TARGET, 'no reason known')}.", _TARGET)
    than = "recalibrated on training data" if before == TRAINING else "with running statistics"
    said = f"recalibrated on target data, {_pair(m, TARGET, before)} {than}"
    cause = None
    if trained is None:
        cause = (
            f"{SHIFT.cause} Or the stored statistics do not fit the training data either; pass train_batches to tell "
            "these apart."
        )
    found = _verdict(SHIFT, m, gain, said, cause=cause, sites=_blamed(m))
    away = _away(m)
    if found[0].verdict is not Verdict.OK or len(away) < len(m.norms) / 2:
        return found
    top = m.norm(away[0])
    return SHIFT.found(
        Verdict.NOTE,
        f"At {len(away)} of {count(len(m.norms), 'norm')} most channels of the target data lie further from the stored "
        f"statistics than sampling explains (worst {away[0]}: {top['kl']:.2g} nats), yet {said}{_paired(gain)}.",
        sites=away[:_KEPT],
        evidence=_evidence(m, gain) | {"kl": float(top["kl"]), "kl_expected": float(top["kl_expected"])},
        remedy="Do not recalibrate: other means and variances are not what the metric lacks. Finetune on target data, "
        "or adapt gains and biases (Tent).",
    )


def _batches(m: Measurements) -> list[Finding]:
    """Judge what statistics of the batch would do."""
    gain = m.gain(BATCH)
    if gain is None:
        return BATCHES.undecided(f"Batch statistics: not measured, {m.missing.get(BATCH, '')}.", _BATCHES)
    size = m.samples / m.batches
    said = f"with statistics of batches of about {size:.0f}, {_pair(m, BATCH, RUNNING)}"
    if not _beyond(m, gain, len(m.rows) - 1):
        return BATCHES.ok(f"{_capital(said)}{_paired(gain)}: no difference to act on.", _evidence(m, gain))
    if gain.value < 0:
        return BATCHES.ok(
            f"{_capital(said)}{_paired(gain)}: a model served in training mode would be worse.", _evidence(m, gain)
        )
    best = max((g.value for row in (TRAINING, TARGET) if (g := m.gain(row))), default=0.0)
    if best >= gain.value / 2:
        return BATCHES.ok(
            f"{_capital(said)}{_paired(gain)}; recalibrated statistics give that back at any batch size.",
            _evidence(m, gain),
        )
    return BATCHES.found(
        Verdict.NOTE,
        f"{_capital(said)}{_paired(gain)}, which recalibrated statistics do not give back.",
        evidence=_evidence(m, gain),
        cause="Batches differ from one another, by class or by origin, and the model uses what their statistics tell.",
        remedy="Shuffle the batches and measure again: a gain that vanishes came from how batches were put together.",
    )


def _mode(m: Measurements) -> list[Finding]:
    """Judge in which mode the model was handed over."""
    gain = m.gain(GIVEN)
    norms = f"{len(m.training)} of {count(len(m.norms), 'norm')}"
    if not (m.training or m.dropping):
        return MODE.ok(f"The model was handed over in evaluation mode: {norms} in training mode.")
    dropping = f" and {count(m.dropping, 'dropout module')}" if m.dropping else ""
    said = f"The model was handed over with {norms}{dropping} in training mode"
    if gain is None:
        why = m.missing.get(GIVEN, "")
        return MODE.found(Verdict.WARNING, f"{said}; as it was, it could not be measured: {why}.", sites=m.training)
    said = f"{said}; as it was, {_pair(m, GIVEN, RUNNING)} in evaluation mode"
    worse = _beyond(m, gain, 1) and gain.value < 0
    return replace(MODE, threshold=_limit(m, gain, 1)).found(
        Verdict.WARNING if worse else Verdict.NOTE,
        f"{said}{_paired(gain)}.",
        sites=m.training,
        evidence=_evidence(m, gain),
        remedy=None if worse or gain.value < 0 else f"{MODE.remedy} A metric that calls eval() itself hides this.",
    )


def _alone(m: Measurements) -> list[Finding]:
    """Judge whether a norm by itself costs more than chance explains."""
    gains = m.gains()
    if not gains:
        kinds = ", ".join(dict.fromkeys(m.norms["class"]))
        return ALONE.undecided(
            f"No norm could be switched by itself: {kinds} stores statistics by its own rule, or no batch reached it.",
            "Go by the rows of the table, which hold for all norms together.",
        )
    top, gain = next(iter(gains.items()))
    k, of = len(gains), f"{len(gains)} of {count(len(m.norms), 'norm')} switched one at a time"
    divergent = m.norm(top)
    told = f"{divergent['kl']:.3g} nats from those of the data in the median channel"
    said = f"{top or 'the model'}: switched by itself to statistics of the data, it recovers {gain.value:.4g}"
    evidence = _evidence(m, gain) | {
        "norms": k,
        "kl": float(divergent["kl"]),
        "kl_expected": float(divergent["kl_expected"]),
        "channels_beyond": float(divergent["beyond"]),
    }
    if not gain.usable:
        return ALONE.undecided(
            f"What a norm recovers by itself is not known: {_why_not(gain)}.", _help(gain), evidence=evidence
        )
    rule = replace(ALONE, threshold=_limit(m, gain, k))
    if not _costs(m, gain, k):
        return rule.ok(f"No norm by itself recovers more than {_limit(m, gain, k):.2g} ({of}).", evidence)
    sites = [path for path, each in gains.items() if _costs(m, each, k)]
    cause, remedy = reason(divergent)
    if not any(_costs(m, g, len(m.rows) - 1) for row in (TRAINING, TARGET) if (g := m.gain(row))):
        remedy = (
            "Recalibrate this norm alone, for with all of them the metric does not get better: "
            f"normscope.norms.recalibrate(model, batches, only={top!r})."
        )
    return rule.found(
        _size(m, gain),
        f"{said} ± {gain.standard_error:.2g} of {m.metric} (threshold {rule.threshold:.2g}); its statistics lie "
        f"{told}, sampling explains {divergent['kl_expected']:.2g}; {of}.",
        sites=sites[:_KEPT],
        evidence=evidence | {"norms_beyond": len(sites)},
        cause=cause,
        remedy=remedy,
    )


def _broken(m: Measurements) -> list[Finding]:
    """Say which norms store numbers that cannot be."""
    broken = m.norms[m.norms["broken"] > 0]
    if not len(broken):
        return []
    top = str(broken.index[0])
    return BROKEN.found(
        Verdict.FAILURE,
        f"{top or 'the model'}: {m.norm(top)['broken']} of its stored numbers are NaN, infinite or negative variances; "
        f"so at {len(broken)} of {count(len(m.norms), 'norm')}.",
        sites=[str(path) for path in broken.index][:_KEPT],
        evidence={"broken": int(m.norm(top)["broken"]), "norms": len(broken)},
    )


def _frozen(m: Measurements) -> list[Finding]:
    """Say which norms were left out."""
    if not m.frozen:
        return []
    kinds = ", ".join(dict.fromkeys(m.frozen.values()))
    return FROZEN.found(
        Verdict.UNDECIDED,
        f"{count(len(m.frozen), 'norm')} of class {kinds} could not be judged: no mode switches their statistics.",
        sites=tuple(m.frozen)[:_KEPT],
        remedy="Replace them by nn.BatchNorm2d with the same buffers, weights and eps, and measure again.",
    )


def reason(norm: Mapping[str, Any]) -> tuple[str, str]:
    """Return what most likely made the statistics of a norm unfit, and what to do about it.

    Args:
        norm: what `Measurements.norm` returns.

    Returns:
        Cause and remedy.
    """
    momentum, updates = float(norm["momentum"]), float(norm["updates"])
    again = "Recalibrate now: normscope.norms.recalibrate(model, batches)"
    if norm["initial"]:
        return (
            "Its statistics are those of a new layer: it never ran in training mode, its momentum is 0, or a "
            "checkpoint was loaded without its buffers (strict=False, weights only).",
            f"{again}; then look for what drops running_mean and running_var on the way.",
        )
    if momentum >= LAST_BATCH:
        return (
            f"Its momentum is {momentum:g}: torch's momentum is the weight of the newest batch, so only the last batch "
            "counts.",
            f"{again}; train with momentum={max(1 - momentum, 0.01):.2g}.",
        )
    if momentum > 0 and updates > 0 and (1 - momentum) ** updates > WARM_WEIGHT:  # a converted model counts none
        return (
            f"After {count(updates, 'update')} with momentum {momentum:g} the average still "
            f"holds {(1 - momentum) ** updates:.0%} of its initial value.",
            f"{again}; train longer, or with a larger momentum.",
        )
    if norm["beyond"] == 0:
        return (
            "Its running average trails the weights, which still moved at the end of training; no channel is far off.",
            f"{again} on training data, or end training with a small learning rate.",
        )
    changed = "weights changed after the statistics were taken (averaged, quantized, finetuned), or buffers overwritten"
    other = "other data, or a preprocessing that differs"
    fits = float(norm["kl_train"]) <= metrics.NATS
    known = other if fits else f"{other}; or {changed}" if math.isnan(norm["kl_train"]) else changed
    where = "on data as it is served" if fits or math.isnan(norm["kl_train"]) else "on training data"
    told = f" Training data lie {norm['kl_train']:.2g} nats from them." if not math.isnan(norm["kl_train"]) else ""
    return f"Its stored statistics are not those of its input: {known}.{told}", f"{again} {where}."


# ---- words and limits ------------------------------------------------------------------------------------------------

_OTHER = "These batches are not like the data that the model was trained on, or too few of them."
_PASS = "Pass train_batches: batches of the data that the model was trained on."
_TARGET = "Pass target_batches: batches of the data that the model serves, with what the metric needs."
_BATCHES = "Pass batches of at least two samples."


def _why_not(gain: Estimate) -> str:
    return "the metric is not finite" if gain.status is Status.NON_FINITE else gain.status.value


def _help(gain: Estimate) -> str:
    """Say what to pass where a difference cannot be judged."""
    if gain.status is Status.NON_FINITE:
        return "Let the metric be finite: leave out samples that have none, or see mismatch.broken-statistics first."
    return "Pass more batches, or a metric that returns one number a sample."


def _verdict(
    rule: Rule, m: Measurements, gain: Estimate, said: str, *, cause: str | None, sites: list[str]
) -> list[Finding]:
    """Conclude from one row against another."""
    if not gain.usable:
        return rule.undecided(f"{_capital(said)}: {_why_not(gain)}.", _help(gain), evidence=_evidence(m, gain))
    rule = replace(rule, threshold=_limit(m, gain, len(m.rows) - 1))
    text = f"{_capital(said)}{_paired(gain)} (threshold {rule.threshold:.2g})"
    if not _costs(m, gain, len(m.rows) - 1):
        return rule.ok(f"{text}.", _evidence(m, gain))
    return rule.found(_size(m, gain), f"{text}.", sites=sites, evidence=_evidence(m, gain), cause=cause)


def _limit(m: Measurements, gain: Estimate, comparisons: int) -> float:
    """Return the size from which a difference is acted on."""
    return float(np.fmax(metrics.limit(gain, comparisons), NOTICEABLE * _scale(m)))


def _scale(m: Measurements) -> float:
    return max((abs(row.value) for row in m.rows.values() if math.isfinite(row.value)), default=0.0)


def _beyond(m: Measurements, gain: Estimate, comparisons: int) -> bool:
    return gain.usable and abs(gain.value) > _limit(m, gain, comparisons)


def _costs(m: Measurements, gain: Estimate, comparisons: int) -> bool:
    return gain.value > 0 and _beyond(m, gain, comparisons)


def _size(m: Measurements, gain: Estimate) -> Verdict:
    return Verdict.FAILURE if gain.value > LARGE * _scale(m) else Verdict.WARNING


def _blamed(m: Measurements) -> list[str]:
    """Return the norms that cost more than chance explains, the worst first."""
    gains = m.gains()
    return [path for path, gain in gains.items() if _costs(m, gain, len(gains))][:_KEPT]


def _stale(m: Measurements) -> list[str]:
    """Return the norms whose stored statistics are away from training data, the worst first."""
    norms = m.norms
    if m.data == "training":
        column, which = "kl", norms["beyond"] > 0.5
    else:
        column = "kl_train"
        which = norms[column] > np.fmax(metrics.NATS, metrics.RATIO * norms["kl_expected"])
    return [str(path) for path in norms[which].sort_values(column, ascending=False, kind="stable").index]


def _away(m: Measurements) -> list[str]:
    """Return the norms most of whose channels are away from what is stored, unlike training data; worst first."""
    norms = m.norms[(m.norms["beyond"] > 0.5) & ~(m.norms["kl_train"] > metrics.NATS)]
    return [str(path) for path in norms.sort_values("kl", ascending=False, kind="stable").index]


def _why(m: Measurements) -> str | None:
    sites = _blamed(m)
    return f"{STORED.cause} Worst at {sites[0]}: {reason(m.norm(sites[0]))[0]}" if sites else None


def _pair(m: Measurements, row: str, other: str) -> str:
    return f"{m.metric} {m.rows[row].value:.4g} instead of {m.rows[other].value:.4g}"


def _paired(gain: Estimate) -> str:
    error = f" ± {gain.standard_error:.2g}" if math.isfinite(gain.standard_error) else ""
    return f", {'better' if gain.value >= 0 else 'worse'} by {abs(gain.value):.3g}{error}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _evidence(m: Measurements, gain: Estimate) -> dict[str, float | int | str | list[float]]:
    return {"recovered": gain.value, "standard_error": gain.standard_error, "parts": gain.n, "over": m.over}
