"""Mismatch: will the model that is evaluated be the one that was trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from normscope.core.estimate import Status
from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics import propagation, units
from normscope.diagnostics.rule import Rule
from normscope.diagnostics.words import count
from normscope.metrics import mismatch as metrics
from normscope.metrics import structure, tables, training

# origin of each threshold: the `threshold_source` of the rule that uses it
DRIFT = 0.1  # nats; the mean is off by 0.45 standard deviations, or the variance by a factor of 2
DRIFT_RATIO = 5.0  # times what sampling alone brings about
WARM_WEIGHT = 0.05  # weight of the initial statistics below which an average is warmed up
WARM_UPDATES = 100  # or so many updates, whatever the momentum: then a slow momentum is to blame
GAP = 0.5  # distance of the outputs in both modes, relative to their norm
GAP_NOTICEABLE = 0.25
LOSS_RATIO = 3.0  # loss with running statistics over loss with batch statistics
LOSS_RATIO_NOTICEABLE = 1.5
LOSS_RATIO_LARGE = 10.0  # from here on outputs that lie a noticeable distance apart are too far
TRAILING = 0.1  # of a weight, moved while the running average looks back
FIRST = 3  # sampled steps that are the start of a run
STOPPED = 3  # intervals between sampled steps without movement
SLOW = 0.1  # torch's default momentum; below, an average is slow
FAST = 0.5  # from here on the newest batch outweighs all others
LAST_BATCH = 0.9  # from here on only the last batch counts; 0.9 and 0.99 are the same setting in other libraries, 1 - m
EXTRA = 1.1  # updates per training forward
TINY = 0.5  # fraction of channels with a running variance below eps
TINY_NOTICEABLE = 0.1
GAIN = 1000.0  # 1 / sqrt(var + eps)

RUNNING_STATISTICS = Rule(
    id="mismatch.running-statistics",
    threshold=DRIFT,
    threshold_source="identity: E[KL] = (1 + m / (2 - m)) / n for n samples; 10 times that, at least 0.1 nats; "
    "measured: warmed-up healthy networks stay below 3 times",
    source="wu2021",
    cause="Weights, and with them activations, moved faster than the running average, or batches differ from one "
    "another (one class, one domain each), or something else wrote to the buffers.",
    remedy="Recompute the statistics before evaluating: reset_running_stats(), momentum = None, then forward passes "
    "over training data in training mode; shuffle batches; end training with a small learning rate.",
)
TRAIN_EVAL_GAP = Rule(
    id="mismatch.train-eval-gap",
    threshold=LOSS_RATIO,
    threshold_source="measured: in 24 healthy BatchNorm runs, batches of 4 to 256, the loss ratio stays below 1.25 "
    "wherever the outputs lie more than 0.25 apart, once weights move by less than 1 % a step; identity: while the "
    "average looks back over 10 steps, faster ones move by more than 0.1 of their size",
    source="ioffe2017",
    cause="Running statistics do not describe the batches that the weights were trained with.",
    remedy="Recompute the running statistics on training data before evaluating (reset_running_stats(), momentum = "
    "None, forward passes in training mode); with batches below 16 use synchronized statistics, or GroupNorm: "
    'normscope.norms.convert(model, to="group").',
)
NEVER_UPDATED = Rule(
    id="mismatch.never-updated",
    threshold=0.0,
    threshold_source="identity: in training mode with a momentum above 0 each forward pass moves the running "
    "statistics",
    source="ioffe2015",
    cause="Something keeps the buffers from moving: momentum 0, buffers restored after each step (an EMA or a "
    "checkpoint), or a layer that overrides forward without updating them.",
    remedy="Set momentum to 0.1, and look for code that copies buffers back (load_state_dict, swap of EMA weights).",
)
MOMENTUM = Rule(
    id="mismatch.momentum",
    threshold=LAST_BATCH,
    threshold_source="identity: running statistics average over (2 - m) / m batches, and keep (1 - m)^updates of their "
    "initial values",
    source="ioffe2015",
    cause="In torch, momentum is the weight of the newest batch; elsewhere it is that of the past, 1 - m.",
    remedy="Set momentum to 0.1, or 0.01 for small batches and long runs; recompute the statistics of a trained model "
    "with momentum = None.",
)
UPDATED_TWICE = Rule(
    id="mismatch.updated-twice",
    threshold=EXTRA,
    threshold_source="identity: each training forward updates the running statistics once",
    source="chen2016",
    cause="Activation checkpointing runs the layer a second time inside the backward pass, in training mode.",
    remedy="Set momentum to 1 - sqrt(1 - m), 0.0513 for 0.1, or keep normalization layers out of the checkpointed "
    "part.",
)
EVALUATION_MODE = Rule(
    id="mismatch.evaluation-mode",
    threshold=DRIFT,
    threshold_source=RUNNING_STATISTICS.threshold_source,
    source="wu2021",
    cause="model.eval(), or freezing (norm_eval=True in detectors), left the layer normalizing with stored statistics.",
    remedy="Call model.train() before training if this was not meant; if it was, recompute the stored statistics on "
    "the new data first.",
)
TINY_VARIANCE = Rule(
    id="mismatch.tiny-variance",
    threshold=TINY,
    threshold_source="identity: below eps, a channel is divided by sqrt(eps) and is not normalized",
    source="ioffe2015",
    cause="The channels before the layer have died or been driven to a constant; inference then magnifies whatever "
    "differs.",
    remedy="Check the layer before it for dead or constant channels and for too strong weight decay; do not set eps "
    "below 1e-5.",
)


def running_statistics(record: Record) -> list[Finding]:
    """Judge whether running statistics describe the batches, beyond what sampling explains.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer in training mode keeps running statistics.
    """
    frame = _layers(record)
    frame = frame[frame["training"] != 0]
    if not len(frame):
        return []
    judged = frame[frame["drift"].notna()]
    if not len(judged):
        return RUNNING_STATISTICS.undecided(
            f"No drift was recorded at {count(len(frame), 'layer')} with running statistics.",
            "Attach with the probe 'normalization', for at least one training step.",
        )
    beyond = judged[judged["excess"] > 1]
    alone = beyond[beyond["warm"] & ~beyond["shared"]]
    top = (alone if len(alone) else judged).iloc[0]
    rule = replace(RUNNING_STATISTICS, threshold=float(top["limit"]))
    evidence = _drift_evidence(top) | {"layers_beyond": len(beyond), "layers": len(judged)}
    said = (
        f"{top.name}: batch and running statistics of the median channel differ by {top['drift']:.3g} nats, sampling "
        f"explains {top['expected']:.2g} (threshold {top['limit']:.2g}); they differ by more than sampling explains at "
        f"{len(beyond)} of {count(len(judged), 'layer')}"
    )
    if not len(beyond):
        return rule.ok(f"{said}.", evidence)
    stopped = _stopped(record)
    if beyond.index.isin(stopped).all():
        return rule.found(
            Verdict.NOTE,
            f"{said}. Explained by mismatch.never-updated; mend that first.",
            sites=beyond.index.tolist(),
            evidence=evidence,
            cause="These running statistics do not move.",
            remedy="Mend mismatch.never-updated, train on and look again.",
        )
    if not beyond["warm"].any():
        young = f"after {count(top['updates'], 'update')} the average still holds {top['initial']:.0%} of its start"
        return rule.undecided(f"{said}, but {young}.", "Train on and look again.", evidence=evidence)
    series = tables.table(record, "drift.q50", slot="running")[str(top.name)].dropna()
    mixed = not len(alone)
    return rule.found(
        Verdict.NOTE if mixed else Verdict.WARNING,
        f"{said}.",
        sites=(beyond if mixed else alone).index.tolist(),
        step=tables.onset(series > top["limit"]),
        evidence=evidence,
        cause="The layer runs several times in a pass, so its statistics mix several populations." if mixed else None,
        remedy="Give each call its own normalization layer, or one without running statistics." if mixed else None,
    )


def train_eval_gap(record: Record) -> list[Finding]:
    """Judge whether the model is worse on held batches with running than with batch statistics.

    Args:
        record: record of one run, attached with a problem.

    Returns:
        One finding, none where no layer keeps running statistics.
    """
    frame = _layers(record)
    if not len(frame):
        return []
    gap, (batch, population) = metrics.gap(record), metrics.losses(record)
    if not gap.usable:
        missing = gap.status is Status.NOT_RECORDED
        compared = "loss with running and with batch statistics"
        return TRAIN_EVAL_GAP.undecided(
            f"Not compared: {compared}." if missing else f"Not compared: {compared}, for outputs are not finite.",
            "To compare, pass problem=normscope.Problem(model, loss, [(inputs, targets)]) to attach."
            if missing
            else "See propagation.non-finite first.",
        )
    evidence = {"gap": gap.value, "loss_batch": batch, "loss_population": population, "samples": gap.n}
    limits = ((GAP, LOSS_RATIO), (GAP_NOTICEABLE, LOSS_RATIO_LARGE), (GAP_NOTICEABLE, LOSS_RATIO_NOTICEABLE))
    apart, loss_ratio = next((pair for pair in limits if _worse(record, *pair)), limits[-1])
    stopped = _stopped(record)
    trailing = not stopped and _trailing(record, frame)
    bad = loss_ratio != LOSS_RATIO_NOTICEABLE and not trailing
    rule = replace(TRAIN_EVAL_GAP, threshold=loss_ratio)
    said = (
        f"On {gap.n} held samples the loss is {population:.3g} with running and {batch:.3g} with batch statistics "
        f"(threshold {loss_ratio:g} times), and the outputs lie {gap.value:.2g} of their norm apart (threshold {apart})"
    )
    if not _worse(record, GAP_NOTICEABLE, LOSS_RATIO_NOTICEABLE):
        return rule.ok(f"{said}.", evidence)
    young = not stopped and not frame["warm"].all() and not tables.at_rest(record)
    if young and (frame["training"] != 0).all():
        seen = int(frame["updates"].min())
        return rule.undecided(
            f"{said}, but running statistics have seen only {seen} {'batch' if seen == 1 else 'batches'}.",
            "Train on and look again.",
            evidence=evidence,
        )
    if stopped:
        rule = replace(
            rule,
            cause="Running statistics do not move in training, see mismatch.never-updated.",
            remedy="Mend mismatch.never-updated first; then recompute the running statistics on training data.",
        )
    mild = not bad and not stopped
    return rule.found(
        Verdict.FAILURE if bad and gap.value > 1 else Verdict.WARNING if bad else Verdict.NOTE,
        f"{said}.",
        sites=frame.index.tolist(),
        step=int(tables.table(record, "gap", phase="population").index[-1]),
        evidence=evidence,
        cause=None
        if not mild
        else "Running statistics trail the weights at a high learning rate; usual in mid-training.",
        remedy=None if not mild else "Before this model is used, recompute the running statistics on training data.",
    )


@tables.once
def never_updated(record: Record) -> list[Finding]:
    """Judge whether running statistics move while the layer is in training mode.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer in training mode keeps running statistics, or where nothing was trained.
    """
    layers = _layers(record)
    layers = layers[layers["training"] == 1].iloc[: 0 if tables.at_rest(record) else None]
    frame = metrics.stillness(record).set_index("site")
    frame = frame.loc[[site for site in layers.index if site in frame.index]]
    frame = frame[frame["n"] > 0].sort_values("value", ascending=False, kind="stable")
    if not len(layers):
        return []
    if not len(frame):
        return NEVER_UPDATED.undecided("One sampled step does not show movement.", "Train past a second sampled step.")
    still = frame[(frame["value"] == 1) | (frame["value"] * frame["n"] >= STOPPED)]
    if not len(still):
        return NEVER_UPDATED.ok(f"Running statistics move at {count(len(frame), 'layer')}.", {"layers": len(frame)})
    site, since = str(still.index[0]), int(still["since"].iloc[0])
    known = layers.loc[still.index].iloc[0]
    never, intervals = bool(still["value"].iloc[0] == 1), round(still["value"].iloc[0] * still["n"].iloc[0])
    verdict = Verdict.FAILURE if known["excess"] > 1 else Verdict.NOTE if known["excess"] <= 1 else Verdict.WARNING
    return NEVER_UPDATED.found(
        verdict,
        f"{site}: running statistics {'never moved' if never else 'stopped moving'} from step {since} on, over "
        f"{count(intervals, 'interval')} in training mode (threshold 0 movement); so at {len(still)} of "
        f"{count(len(frame), 'layer')}.",
        sites=still.index.tolist(),
        step=since,
        evidence=_drift_evidence(known) | {"intervals": int(still["n"].iloc[0]), "layers_still": len(still)},
    )


def momentum(record: Record) -> list[Finding]:
    """Judge whether the momentum lets running statistics follow and still average.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer in training mode keeps running statistics.
    """
    layers = _layers(record)
    layers = layers[layers["training"] != 0]
    if not len(layers):
        return []
    m = layers["momentum"]
    stopped = layers.index.isin(_stopped(record))  # no momentum lets these follow
    behind = ((layers["excess"] > 1) | _worse(record, GAP, LOSS_RATIO)) & ~stopped
    slow = ((m < SLOW) | m.isna()) & behind & (layers["updates"] >= WARM_UPDATES / 2)
    cases = (
        (m == 0, Verdict.FAILURE, "momentum 0 leaves the running statistics at their initial values"),
        (m >= LAST_BATCH, Verdict.WARNING, "running statistics are those of the last batch or two"),
        (slow & (m != 0), Verdict.WARNING, "the running average is too slow for this run"),
        ((m >= FAST) & (m < LAST_BATCH), Verdict.NOTE, "the newest batch outweighs all others"),
    )
    for which, verdict, meaning in cases:
        if which.any():
            sites = layers.index[which].tolist()
            top = layers.loc[sites[0]]
            said = "a cumulative average" if np.isnan(top["momentum"]) else f"momentum {top['momentum']:g}"
            return MOMENTUM.found(
                verdict,
                f"{sites[0]}: {meaning} ({said}, {count(top['updates'], 'update')}, weight of the initial value "
                f"{top['initial']:.2g}, drift {top['drift']:.3g} nats, threshold {top['limit']:.2g}); {len(sites)} of "
                f"{count(len(layers), 'layer')}.",
                sites=sites,
                evidence=_drift_evidence(top)
                | {
                    "momentum": float(top["momentum"]),
                    "updates": float(top["updates"]),
                    "initial_weight": float(top["initial"]),
                },
            )
    if stopped.any():
        return MOMENTUM.found(
            Verdict.NOTE,
            f"Not judged at {stopped.sum()} of {count(len(layers), 'layer')}: explained by mismatch.never-updated; "
            "mend that first.",
            sites=layers.index[stopped].tolist(),
            cause="These running statistics do not move, whatever the momentum.",
            remedy="Mend mismatch.never-updated, train on and look again.",
        )
    low, high = m.min(), m.max()
    said = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return MOMENTUM.ok(
        f"Momentum {said} suits {count(len(layers), 'layer')} (threshold {LAST_BATCH}).", {"momentum": float(high)}
    )


def updated_twice(record: Record) -> list[Finding]:
    """Judge whether running statistics are updated more than once for each training forward.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer keeps running statistics of its own.
    """
    layers = _layers(record)
    layers = layers[~layers["shared"] & (layers["training"] != 0)]
    frame = metrics.extra_updates(record).set_index("site")
    frame = frame[frame.index.isin(layers.index)]
    if not len(frame):
        return []
    twice = frame[(frame["recomputed"] > 0) | (frame["silent_steps"] >= 2) | (frame["value"] >= EXTRA)]
    if not len(twice):
        return UPDATED_TWICE.ok(
            f"Updated once a forward: {count(len(frame), 'layer')} (threshold {EXTRA}).", {"layers": len(frame)}
        )
    top = twice.iloc[0]
    evidence = {name: float(top[name]) for name in ("recomputed", "silent")} | {
        "updates_per_forward": float(top["value"])
    }
    checkpointed = top["recomputed"] > 0
    how = "in the backward pass" if checkpointed else "under no_grad"
    times = top["recomputed"] if checkpointed else top["silent"]
    said = f"{times:.2g} times a step {how}" if times > 0 else f"{top['value']:.3g} times a training forward"
    return UPDATED_TWICE.found(
        Verdict.WARNING,
        f"{twice.index[0]}: running statistics are updated {said} besides training forwards (threshold {EXTRA} updates "
        f"a forward); so at {len(twice)} of {count(len(frame), 'layer')}.",
        sites=twice.index.tolist(),
        evidence=evidence,
        cause=None
        if checkpointed
        else "The model runs in training mode under no_grad, as in a validation loop without eval().",
        remedy=None if checkpointed else "Call model.eval() before such forwards and model.train() after them.",
    )


def evaluation_mode(record: Record) -> list[Finding]:
    """Judge whether layers that train in evaluation mode normalize with statistics that fit.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer keeps running statistics.
    """
    layers = _layers(record)
    known = layers[layers["training"].notna()]
    if not len(known):
        return []
    frozen = known[known["training"] == 0]
    if not len(frozen):
        return EVALUATION_MODE.ok(
            f"In training mode while training: {count(len(known), 'layer')}.", {"layers": len(known)}
        )
    top = frozen.iloc[0]
    evidence = _drift_evidence(top) | {"layers_in_evaluation_mode": len(frozen), "layers": len(known)}
    said = f"{top.name}: in evaluation mode while training, as {len(frozen)} of {count(len(known), 'layer')}"
    if np.isnan(top["drift"]):
        return EVALUATION_MODE.undecided(
            f"{said}; no drift was recorded.", "Attach with the probe 'normalization'.", evidence=evidence
        )
    disagree = _disagrees_from_the_start(record, top)
    return replace(EVALUATION_MODE, threshold=float(top["limit"])).found(
        Verdict.WARNING if disagree else Verdict.NOTE,
        f"{said}; batches differ from the stored statistics by {top['drift']:.3g} nats (threshold {top['limit']:.2g}).",
        sites=frozen.index.tolist(),
        evidence=evidence,
        remedy=None
        if disagree
        else "Nothing if this is meant, as in detectors: the stored statistics fitted at the start; else call "
        "model.train() before training.",
    )


def tiny_variance(record: Record) -> list[Finding]:
    """Judge whether running variances are so small that inference divides by next to nothing.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no running variances were recorded.
    """
    frame = (
        metrics
        .small_variance(record)
        .dropna(subset="value")
        .sort_values(["value", "gain"], ascending=False, kind="stable")
    )
    if not len(frame):
        return []
    beyond = frame[(frame["value"] > TINY) | (frame["gain"] > GAIN)]
    noticed = beyond if len(beyond) else frame[frame["value"] > TINY_NOTICEABLE]
    top = (noticed if len(noticed) else frame).iloc[0]
    floor = TINY if len(beyond) or not len(noticed) else TINY_NOTICEABLE
    said = (
        f"{top['site']}: {top['value']:.0%} of {count(top['n'], 'channel')} have a running variance below eps "
        f"(threshold {floor:.0%}), and inference multiplies a channel by up to {top['gain']:.3g} (threshold {GAIN:g})."
    )
    evidence = {"fraction": float(top["value"]), "gain": float(top["gain"]), "layers_beyond": len(beyond)}
    if not len(noticed):
        return TINY_VARIANCE.ok(said, evidence)
    dead = units.origin(record, propagation.dead_units(record), str(top["site"]))
    follows = f" This is probably a consequence of {units.DEAD_UNITS} at {dead}." if dead else ""
    return replace(TINY_VARIANCE, threshold=floor).found(
        Verdict.WARNING if len(beyond) else Verdict.NOTE,
        f"{said}{follows}",
        sites=noticed["site"].tolist(),
        evidence=evidence,
        cause=f"The units before it are zero, probably since {dead}." if dead else None,
        remedy=f"Mend {units.DEAD_UNITS} at {dead} first." if dead else None,
    )


def _stopped(record: Record) -> list[str]:
    """Return the layers that mismatch.never-updated reports as a failure, which explains what else they show."""
    return [site for found in never_updated(record) if found.verdict is Verdict.FAILURE for site in found.sites]


@tables.once
def _layers(record: Record) -> pd.DataFrame:
    """Return the layers with running statistics, their limit of drift, drift / limit (`excess`) and whether warm.

    The largest excess comes first.
    """
    layers = metrics.running_layers(record)
    limit = np.fmax(DRIFT, DRIFT_RATIO * layers["expected"])
    due = np.fmax(layers["updates"], layers["steps"])
    left = (1 - layers["momentum"].fillna(1.0).clip(0, 1)) ** due
    warm = (left <= WARM_WEIGHT) | (due >= WARM_UPDATES)
    layers = layers.assign(limit=limit, excess=layers["drift"] / limit, warm=warm)
    return layers.sort_values("excess", ascending=False, kind="stable")


def _disagrees_from_the_start(record: Record, layer: pd.Series) -> bool:
    """Tell whether stored statistics never fitted; where weights have moved away from them since, inference has too."""
    drift = tables.table(record, "drift.q50", slot="running")[str(layer.name)].dropna()
    misfits = bool(drift.head(FIRST).median() > layer["limit"]) and bool(layer["excess"] > 1)
    return misfits and not _before_all_training(record, str(layer.name))


def _before_all_training(record: Record, site: str) -> bool:
    """Tell whether nothing up to a layer is trained: then inference does what training did, whatever the statistics."""
    held, order = structure.parameters(record), tables.layers(record)["order"]
    if not len(held):
        return False
    trained = order.reindex(held["module"][held["trainable"].eq(True)].unique()).dropna()
    return bool(len(trained)) and float(order.get(tables.module_of(site), np.inf)) < trained.min()


def _trailing(record: Record, layers: pd.DataFrame) -> bool:
    """Tell whether weights have moved since, and batch and running statistics yet agree within the limit everywhere."""
    rates = training.rates(record)
    if rates is None or (layers["excess"] > 1).any() or layers["shared"].any():
        return False
    return rates.late / max(float(layers["momentum"].min()), SLOW) > TRAILING  # a slow momentum is no excuse


def _worse(record: Record, apart: float, ratio: float) -> bool:
    """Tell whether running statistics make held batches worse: outputs so far apart, a loss so many times higher."""
    gap, (batch, population) = metrics.gap(record), metrics.losses(record)
    if not gap.usable or gap.value <= apart:
        return False
    return population - batch > (ratio - 1) * abs(batch) if np.isfinite(population - batch) else gap.value > 1


def _drift_evidence(layer: pd.Series) -> dict[str, float | int | str | list[float]]:
    return {name: float(layer[name]) for name in ("drift", "expected", "limit", "batch")}
