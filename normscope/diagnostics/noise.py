"""Noise: whether batches are large enough for the statistics taken of them, random, and fit to the gradient."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from normscope.core.estimate import Status
from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics.rule import Evidence, Rule
from normscope.diagnostics.words import count
from normscope.metrics import noise as metrics
from normscope.metrics import tables

# origin of each threshold: the `threshold_source` of the rule that uses it
MOVED = 0.5  # of its size that an output moves with its batch
MOVED_NOTICEABLE = 0.35
PER_FEATURE = 2.0  # values for each feature that is whitened
PER_FEATURE_NOTICEABLE = 4.0
NOT_RANDOM = 3.0  # times the variance of random draws
APART = 10.0  # between noise scale and batch size
_ODD_SIZES = 4  # different lengths of the input's first dimension from which it is not taken for the batch
_SHOWN = (32, 128, 512)  # batch sizes that evidence compares

PASS_PROBLEM = (
    "To measure it, pass problem=normscope.Problem(model, loss, [(inputs, targets)]) to attach, with some hundred "
    "samples."
)

SMALL_BATCH = Rule(
    id="noise.small-batch",
    threshold=MOVED,
    threshold_source="identity: BatchNorm of n independent values moves an output by sqrt(3 / (2 n)) of its size, 0.5 "
    "at n = 6 and 0.35 at n = 12; measured: healthy networks at batches of 16 to 256 stay below 0.32",
    source="ioffe2017",
    cause="Mean and variance come from too few independent values: the batch of one device or micro-batch is small, "
    "and pixels of one image are alike.",
    remedy="Enlarge the batch that one forward pass sees, take statistics over all devices "
    "(torch.nn.SyncBatchNorm.convert_sync_batchnorm), or use a layer that does not cross the batch: "
    'normscope.norms.convert(model, to="group", groups=8).',
)
WHITENING_BATCH = Rule(
    id="noise.whitening-batch",
    threshold=PER_FEATURE,
    threshold_source="identity: the covariance of m samples of d white features has eigenvalues (1 ± sqrt(d / m))^2, "
    "which differ 34-fold at m = 2 d, 9-fold at 4 d, and is singular for m <= d",
    source="S150",
    cause="A covariance of d features is estimated from too few values, and its inverse magnifies the error.",
    remedy="Whiten in smaller groups, as normscope.norms.convert(model, to=..., groups=...), enlarge the batch, or use "
    'fewer iterations of Newton\'s method ("iterative").',
)
BATCHES_NOT_RANDOM = Rule(
    id="noise.batches-not-random",
    threshold=NOT_RANDOM,
    threshold_source="identity: 1 for independent draws, 2 where each sample is there in two views; 3 is beyond both",
    source="wu2021",
    cause="The data are sorted by class, domain or length, samples are repeated within a batch, or a loader reads one "
    "shard after the other.",
    remedy="Shuffle: torch.utils.data.DataLoader(..., shuffle=True), a larger shuffle buffer for streamed data, and "
    "each worker its own part of the data.",
)
GRADIENT_NOISE = Rule(
    id="noise.gradient-noise",
    threshold=APART,
    threshold_source="identity: at a batch of B, training takes 1 + B_noise / B times the fewest steps and 1 + B / "
    "B_noise times the fewest samples; 10-fold apart, one of them is 11 times the least",
    source="mccandlish2018",
    cause="The gradient's noise is far from its signal at this batch size.",
    remedy="",
)


def small_batch(record: Record) -> list[Finding]:
    """Judge whether outputs of normalization layers depend too much on who else is in the batch.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer in training mode, other than whitening ones, crosses the batch.
    """
    frame = _crossing(record)
    frame = frame[frame["whitened"].isna()]
    if not len(frame):
        return []
    measured = frame["moved"].notna()
    if not measured.any():
        return _small_batch_unmeasured(frame)
    frame = frame[measured].sort_values("moved", ascending=False, kind="stable")
    top = frame.iloc[0]
    moved, batch = float(top["moved"]), float(top["batch"])
    limit = MOVED if moved > MOVED or moved <= MOVED_NOTICEABLE else MOVED_NOTICEABLE
    noise = f"which moves an output by {moved:.2g} of its size"
    if np.isfinite(top["var_noise"]):
        noise = f"mean and variance are off by {top['mean_noise']:.2g} deviations and {top['var_noise']:.0%}, {noise}"
    else:
        noise = f"statistics are noisy, {noise}"
    said = f"{top.name}: in a batch of {batch:.0f} {noise} (threshold {limit}; {_at(moved, batch)})"
    evidence = _noise_evidence(top)
    if moved <= MOVED_NOTICEABLE:
        return SMALL_BATCH.ok(f"{said}.", evidence)
    beyond = frame[frame["moved"] > limit]
    return replace(SMALL_BATCH, threshold=limit).found(
        Verdict.WARNING if limit == MOVED else Verdict.NOTE,
        f"{said}; so at {len(beyond)} of {count(len(frame), 'layer')}.",
        sites=beyond.index.tolist(),
        evidence=evidence,
    )


def whitening_batch(record: Record) -> list[Finding]:
    """Judge whether batches are large enough for the features that are whitened together.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer that whitens over the batch is known.
    """
    frame = _crossing(record)
    frame = frame[frame["whitened"].notna()]
    if not len(frame):
        return []
    share = frame["whitened_from"] / frame["whitened"]
    frame = frame.assign(share=share, worst=np.fmax(PER_FEATURE / share, frame["relative"].fillna(0.0) / MOVED))
    frame = frame.sort_values("worst", ascending=False, kind="stable")
    top = frame.iloc[0]
    d, m = float(top["whitened"]), float(top["whitened_from"])
    noisy = top["share"] >= PER_FEATURE and top["relative"] > MOVED
    limit = PER_FEATURE if top["worst"] > 1 or top["share"] >= PER_FEATURE_NOTICEABLE else PER_FEATURE_NOTICEABLE
    said = f"{top.name}: {d:.0f} features are whitened from {m:.0f} values a batch, {top['share']:.2g} for each"
    said += f" (threshold {limit:g}{', at or below 1 the covariance is singular' if m <= d else ''})"
    if np.isfinite(top["relative"]):
        said += f"; an output moves by {top['relative']:.2g} of its size with its batch (threshold {MOVED})"
    evidence = {"features": d, "values": m} | _noise_evidence(top)
    if top["worst"] <= 1 and top["share"] >= PER_FEATURE_NOTICEABLE:
        return WHITENING_BATCH.ok(f"{said}.", evidence)
    bad = top["worst"] > 1
    beyond = frame[(frame["worst"] > 1) if bad else (frame["share"] < PER_FEATURE_NOTICEABLE)]
    group = max(1, int(m // PER_FEATURE_NOTICEABLE))
    return replace(WHITENING_BATCH, threshold=MOVED if noisy else limit).found(
        Verdict.WARNING if bad else Verdict.NOTE,
        f"{said}; so at {len(beyond)} of {count(len(frame), 'layer')}.",
        sites=beyond.index.tolist(),
        evidence=evidence,
        cause="Values are many but alike, as pixels of one image are." if noisy else None,
        remedy=None if noisy else f"Whiten at most {group} features together, or: {WHITENING_BATCH.remedy}",
    )


def batches_not_random(record: Record) -> list[Finding]:
    """Judge whether batches are independent draws from the same data.

    Args:
        record: record of one run.

    Returns:
        One finding, none where the model's input was not seen.
    """
    ratio = metrics.sampling(record)
    if ratio.status is Status.NOT_RECORDED:
        return []
    if metrics.sizes(record) >= _ODD_SIZES:
        return BATCHES_NOT_RANDOM.undecided(
            f"The first dimension of the input has {metrics.sizes(record)} different lengths: it is not taken for the "
            f"batch, and whether batches are random was not judged.",
            "Nothing to do where batches hold graphs or sequences of varying length.",
        )
    evidence: Evidence = {"ratio": ratio.value, "standard_error": ratio.standard_error, "comparisons": ratio.n}
    said = (
        f"The means of {ratio.n} batches of inputs vary {ratio.value:.2g} ± {ratio.standard_error:.2g} times as much "
        f"as those of random draws (threshold {NOT_RANDOM:g})"
    )
    if not ratio.usable:
        return BATCHES_NOT_RANDOM.undecided(f"{said}, too few to judge.", "Train on and look again.", evidence=evidence)
    if ratio.value <= NOT_RANDOM or ratio.value - 2 * ratio.standard_error <= 1:
        return BATCHES_NOT_RANDOM.ok(f"{said}.", evidence)
    return BATCHES_NOT_RANDOM.found(
        Verdict.WARNING,
        f"{said}: they are no random draws, if the first dimension of the input is the batch.",
        sites=["/input"],
        evidence=evidence,
    )


def gradient_noise(record: Record) -> list[Finding]:
    """Judge whether the batch size is near that at which the gradient's noise equals its signal.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no step was recorded.
    """
    batch = float(tables.context(record)["batch_size"].astype(float).median())
    scale, least, micro = metrics.scale(record)
    if not np.isfinite(batch) or batch < 1:
        return []
    if scale.status is Status.NOT_RECORDED:
        return GRADIENT_NOISE.undecided("The noise of the gradient was not measured.", PASS_PROBLEM)
    if scale.status is Status.NON_FINITE:
        return GRADIENT_NOISE.undecided("Gradients are not finite.", "See propagation.non-finite first.")
    known = scale.usable
    value = scale.value if known else least
    where = "micro-batches of training" if micro else "held samples"
    if not known and not np.isfinite(least):
        return GRADIENT_NOISE.undecided(
            f"On {where}, the mean gradient cannot be told from zero.",
            "Hold more samples, or batches, in problem=, or train on: the signal is what is hard to see.",
        )
    said = (
        f"On {where}, noise and signal of the gradient are equal at a batch of "
        f"{f'{value:.3g} ± {scale.standard_error:.2g}' if known else f'{value:.3g} or more'} samples; batches have "
        f"{batch:.0f} (threshold {APART:g}-fold apart)"
    )
    evidence: Evidence = {"noise_scale_at_least": value, "batch": batch}
    if known:
        evidence = {"noise_scale": value, "standard_error": scale.standard_error, "batch": batch}
    vague = known and not scale.standard_error <= value / 2  # it says no more than the order of magnitude
    near = value * APART >= batch and value + 2 * scale.standard_error <= APART * batch
    if vague and not near:
        return GRADIENT_NOISE.undecided(
            f"{said}, but the standard error of {scale.standard_error:.2g} is beyond half of it.",
            "Hold more samples, or batches, in problem=, or train on: the signal is what is hard to see.",
            evidence=evidence,
        )
    if known and not vague and value * APART < batch:
        return GRADIENT_NOISE.found(
            Verdict.NOTE,
            f"{said}.",
            evidence=evidence,
            cause="Samples of a batch agree on the gradient: most of them add nothing.",
            remedy=f"A batch of about {max(value, 1):.0f} trains as well a step, at a fraction of the cost; with "
            "BatchNorm no smaller than its own noise allows, see noise.small-batch.",
        )
    if not vague and value > APART * batch:
        return GRADIENT_NOISE.found(
            Verdict.NOTE,
            f"{said}.",
            evidence=evidence,
            cause="Steps are mostly noise, as usual late in training.",
            remedy="A larger batch, or accumulating over several, takes fewer steps to the same loss at about the same "
            "cost in samples; with it raise the learning rate, or lower the learning rate as training ends.",
        )
    return GRADIENT_NOISE.ok(f"{said}.", evidence)


def _small_batch_unmeasured(frame: pd.DataFrame) -> list[Finding]:
    """Judge BatchNorm by counts alone: a channel has as many independent values as samples at least."""
    least = (1.5 / frame["values"]) ** 0.5
    most = (1.5 / frame["batch"]) ** 0.5
    if not most.notna().any():
        return SMALL_BATCH.undecided("The noise of batch statistics was not measured.", PASS_PROBLEM)
    site, bound = str(most.idxmax()), float(most.max())
    batch = float(frame["batch"].min())
    evidence: Evidence = {"at_most": bound, "batch": batch}
    said = f"{site}: with a batch of {batch:.0f} independent samples an output moves by at most {bound:.2g} of its size"
    if bound <= MOVED:
        return SMALL_BATCH.ok(f"{said} (threshold {MOVED}).", evidence)
    if (least > MOVED).any():
        beyond = frame.index[least > MOVED].tolist()
        return SMALL_BATCH.found(
            Verdict.WARNING,
            f"{least.idxmax()}: with {frame['values'].min():.0f} values a channel an output moves by about "
            f"{least.max():.2g} of its size with its batch (threshold {MOVED}); so at {len(beyond)} of "
            f"{count(len(frame), 'layer')}.",
            sites=[str(least.idxmax()), *(str(site) for site in beyond if site != least.idxmax())],
            evidence=evidence,
        )
    return SMALL_BATCH.undecided(
        f"{said}, which was not measured (threshold {MOVED}).", PASS_PROBLEM, evidence=evidence
    )


def _crossing(record: Record) -> pd.DataFrame:
    """Return the layers that train with statistics of the batch: those that were frozen do not."""
    frame = metrics.layers(record)
    return frame[frame["training"] != 0]


def _at(moved: float, batch: float) -> str:
    """Say what other batch sizes would give."""
    return ", ".join(f"{moved * (batch / size) ** 0.5:.2g} at {size}" for size in _SHOWN)


def _noise_evidence(layer: pd.Series) -> dict[str, float | int | str | list[float]]:
    names = ("moved", "relative", "snd", "error", "mean_noise", "var_noise", "batch")
    found = {name: float(layer[name]) for name in names if np.isfinite(layer[name])}
    if "moved" in found and "batch" in found:
        found |= {f"moved_at_{n}": found["moved"] * (found["batch"] / n) ** 0.5 for n in _SHOWN}
    return dict(found)
