"""Rest: findings of other subjects, where the structure of a model alone decides them, before anything is trained."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics import mismatch, noise, scale
from normscope.diagnostics.structure import unordered
from normscope.diagnostics.words import count
from normscope.metrics import structure as metrics

SLOW = 1e-3  # momentum below which an average needs more than a thousand batches
_CENTERED = ("batch", "instance")  # kinds that take away what a bias adds to a channel


def bias_before_norm(record: Record) -> list[Finding]:
    """Judge whether biases stand right before a normalization that takes them away.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no bias can stand there.
    """
    layers, held = metrics.norms(record), metrics.parameters(record)
    judged = layers.index[layers["norm"].isin(_CENTERED) & layers["training"].astype(bool)]
    biases = held[held["slot"].eq("bias") & ~held["module"].isin(layers.index)].set_index("module")
    source = {name: before for name, before in metrics.sources(record).items() if name in judged}
    idle = {before: name for name, before in source.items() if before in biases.index}
    if not idle:
        open_still = len(judged) > len(source) and len(biases) and not metrics.ordered(record)
        return unordered(scale.BIAS_BEFORE_NORM, record, "whether biases stand before norms", int(bool(open_still)))
    before, name = next(iter(idle.items()))
    return replace(scale.BIAS_BEFORE_NORM, threshold=0.0).found(
        Verdict.NOTE,
        f"The bias has no effect at {count(len(idle), 'layer')} (threshold 0), as {before} before {name}, which takes "
        "the mean of each channel away.",
        sites=[f"{module}/bias" for module in idle],
        evidence={"biases": len(idle)},
    )


def gain_decay(record: Record) -> list[Finding]:
    """Judge whether decay acts on gains and biases of normalization layers: a note, for some optimizers need it.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no optimizer holds such a parameter.
    """
    frame = metrics.settings(record)
    frame = frame[frame["module"].isin(metrics.norms(record).index) & frame["trainable"].eq(True)]
    decayed = frame[frame["decay"] > 0]
    if not len(frame):
        return []
    if not len(decayed):
        return scale.GAIN_DECAY.ok(f"No decay on {count(len(frame), 'gain or bias').replace('biass', 'biases')}.")
    return scale.GAIN_DECAY.found(
        Verdict.NOTE,
        f"Decay of {decayed['decay'].max():g} acts on {count(len(decayed), 'parameter')} of normalization layers "
        "(threshold 0).",
        sites=[str(site) for site in decayed.index],
        evidence={"parameters": len(decayed), "decay": float(decayed["decay"].max())},
    )


def decay(record: Record) -> list[Finding]:
    """Judge whether weights right before a normalization layer have any decay.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no such weight is known.
    """
    frame = metrics.settings(record)
    before = set(metrics.sources(record).values()) - set(metrics.norms(record).index)
    frame = frame[frame["module"].isin(before) & frame["shape"].map(len).gt(1) & frame["trainable"].eq(True)]
    frame = frame[frame["decay"].notna()]
    none = frame[frame["decay"] == 0]
    if not len(frame):
        return []
    if not len(none):
        return scale.DECAY.ok(f"Decay acts on {count(len(frame), 'weight')} before normalization (threshold above 0).")
    return replace(scale.DECAY, threshold=0.0).found(
        Verdict.NOTE,
        f"{len(none)} of {count(len(frame), 'weight')} before a normalization layer have no decay (threshold above 0): "
        "their norms can only grow.",
        sites=[str(site) for site in none.index],
        evidence={"weights": len(none), "of_weights": len(frame)},
        cause="weight_decay of their parameter group is 0.",
        remedy="In a long run set weight_decay of their group, such that learning rate times weight_decay times steps "
        "is above 1; in a short one nothing need be done.",
    )


def small_batch(record: Record) -> list[Finding]:
    """Judge whether outputs of normalization layers depend too much on who else is in the batch.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer in training mode crosses the batch.
    """
    layers = metrics.norms(record)
    judged = layers[layers["norm"].eq("batch") & layers["training"].astype(bool)]
    if len(metrics.calls(record)):
        return noise.small_batch(record)
    return unordered(noise.SMALL_BATCH, record, "how large batches are", len(judged))


def whitening_batch(record: Record) -> list[Finding]:
    """Judge whether batches are large enough for the features that are whitened together.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer whitens over the batch.
    """
    layers = metrics.norms(record)
    if len(metrics.calls(record)):
        return noise.whitening_batch(record)
    return unordered(noise.WHITENING_BATCH, record, "how large batches are", int(layers["whitens"].eq(True).sum()))


def momentum(record: Record) -> list[Finding]:
    """Judge whether the momentum lets running statistics follow and still average.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer in training mode keeps running statistics.
    """
    layers = metrics.norms(record)
    layers = layers[layers["has_running"] & layers["training"].astype(bool)]
    if not len(layers):
        return []
    m = layers["momentum"]
    cumulative = m.isna() & layers["class"].astype(str).str.contains("BatchNorm")
    cases = (
        (m == 0, Verdict.FAILURE, "momentum 0 leaves the running statistics at their initial values", 0.0),
        (m >= mismatch.LAST_BATCH, Verdict.WARNING, "running statistics are those of the last batch or two", None),
        (m < SLOW, Verdict.WARNING, f"running statistics need more than {1 / SLOW:.0f} batches to follow", SLOW),
        (m >= mismatch.FAST, Verdict.NOTE, "the newest batch outweighs all others", mismatch.FAST),
        (cumulative, Verdict.NOTE, "a cumulative average gives the first batch as much weight as the last", None),
    )
    for which, verdict, meaning, limit in cases:
        if which.any():
            top = layers[which].iloc[0]
            said = "momentum None" if pd.isna(top["momentum"]) else f"momentum {top['momentum']:g}"
            threshold = mismatch.LAST_BATCH if limit is None else limit
            return replace(mismatch.MOMENTUM, threshold=threshold).found(
                verdict,
                f"{top.name}: {meaning} ({said}, threshold {threshold:g}); so at {which.sum()} of "
                f"{count(len(layers), 'layer')}.",
                sites=[f"{name}/running" for name in layers.index[which]],
                evidence={"momentum": float(top["momentum"]), "layers": int(which.sum())},
            )
    low, high = m.min(), m.max()
    said = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return mismatch.MOMENTUM.ok(
        f"Momentum {said} suits {count(len(layers), 'layer')} (threshold {mismatch.LAST_BATCH}).",
        {"momentum": float(high)},
    )


def evaluation_mode(record: Record) -> list[Finding]:
    """Judge whether layers are in evaluation mode while the model is in training mode: a note, usual in detection.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer keeps running statistics, or the model is in evaluation mode itself.
    """
    layers = metrics.norms(record)
    layers = layers[layers["has_running"]]
    if not len(layers) or metrics.fact(record, "training") is not True:
        return []
    frozen = layers.index[~layers["training"].astype(bool)]
    if not len(frozen):
        return mismatch.EVALUATION_MODE.ok(f"In training mode, as the model: {count(len(layers), 'layer')}.")
    return mismatch.EVALUATION_MODE.found(
        Verdict.NOTE,
        f"{frozen[0]}: in evaluation mode while the model is in training mode, as {len(frozen)} of "
        f"{count(len(layers), 'layer')}.",
        sites=[f"{name}/running" for name in frozen],
        evidence={"layers_in_evaluation_mode": len(frozen), "layers": len(layers)},
    )
