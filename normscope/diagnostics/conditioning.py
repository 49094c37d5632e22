"""Conditioning: can one learning rate serve all directions, layers and depths."""

from __future__ import annotations

import pandas as pd

from normscope.core.estimate import Status
from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics.rule import Rule
from normscope.diagnostics.words import count
from normscope.metrics import conditioning as metrics
from normscope.metrics import scale, tables

# origin of each threshold: the `threshold_source` of the rule that uses it
INPUT_KAPPA = 2e4  # kappa_50 of a hidden layer's input
GRADIENT_KAPPA = 1e5  # kappa_50 of a layer's output gradient, in more than half of the layers
DOMINANCE = 1e4  # largest over median lambda_max(F)
COLLAPSE = 4.0  # effective rank of the first hidden layers over that of the last

_NORMALIZE = (
    "Put a normalization layer after each weighted layer (torch.nn.BatchNorm1d or LayerNorm, or any of "
    "normscope.norms.build)"
)
INPUTS = Rule(
    id="conditioning.ill-conditioned-inputs",
    threshold=INPUT_KAPPA,
    threshold_source="measured: in 13 runs that learn (perceptrons to 20 layers with and to 10 without normalization, "
    "convolutional and residual networks, a transformer) no hidden layer is beyond 9000 at the start and 6000 at the "
    "end, in deeper ones without normalization the worst is at 7e4 to 6e5",
    source="huang2020layerwise",
    cause="What the layer gets varies almost along one line: a common mean or a few directions outweigh the rest, and "
    "each layer without normalization adds to it. Along the other directions gradient descent hardly moves.",
    remedy=f"{_NORMALIZE}, whiten its input (normscope.norms.build('iterative', channels)), or add shortcuts; an "
    "adaptive optimizer (torch.optim.AdamW) helps where the architecture must stay.",
)
GRADIENTS = Rule(
    id="conditioning.ill-conditioned-gradients",
    threshold=GRADIENT_KAPPA,
    threshold_source="measured: at the start of 13 runs that learn less than half of the layers are beyond it, in "
    "a 20-layer perceptron that does not learn 13 of 19",
    source="huang2020layerwise",
    cause="All samples ask a layer's units for the same few changes: the layers behind act as a linear map of low "
    "rank, or pass on hardly any difference between samples.",
    remedy=f"{_NORMALIZE}, add shortcuts, and initialize with torch.nn.init.kaiming_normal_ (ReLU) or xavier_normal_ "
    "(tanh).",
)
CURVATURE = Rule(
    id="conditioning.curvature-dominated",
    threshold=DOMINANCE,
    threshold_source="measured: in 13 runs that learn the largest is at most 440 times the median, in a network "
    "whose signal dies out 1e7 times; identity: the layer with the largest limits the learning rate of all, 2 / "
    "lambda_max",
    source="martens2015",
    cause="One layer has a far larger input or gradient than the others, so the learning rate that it bears leaves the "
    "others almost at rest.",
    remedy="Standardize the input data if it is the first layer, put a normalization layer before this layer if it is "
    "another, give it a smaller learning rate in a parameter group of its own, or use AdamW.",
)
RANK = Rule(
    id="conditioning.rank-collapse",
    threshold=COLLAPSE,
    threshold_source="measured: at most 2.7 at the start of 13 runs that learn, 5 to 10 in perceptrons of 20 and "
    "30 layers without normalization",
    source="daneshmand2020",
    cause="Each layer without normalization aligns the samples more, until deep layers see one direction, whatever the "
    "input is.",
    remedy=f"{_NORMALIZE}, add shortcuts, or use fewer layers.",
)


def ill_conditioned_inputs(record: Record) -> list[Finding]:
    """Judge whether the inputs of hidden layers vary almost along one line, from the start of the run to its end.

    What a run only passes through, as transformers do in their first steps, is a note while it lasts.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no hidden linear or convolutional layer was measured that the data can fill.
    """
    judged_at = metrics.spanned(record)
    start, late = (metrics.conditions(record, start=start).set_index("site") for start in (True, False))
    start, late = start[start.index.isin(judged_at)], late[late.index.isin(judged_at)]
    if not len(late):
        return []
    judged = late.dropna(subset="value").sort_values("value", ascending=False, kind="stable")
    flat = late.index[_is(late, Status.RANK_DEFICIENT)].tolist()
    beyond = judged.index[judged["value"] > INPUT_KAPPA].tolist()
    lasting = [site for site in beyond if not start.loc[site, "value"] <= INPUT_KAPPA]
    layers = len(judged) + len(flat)
    evidence: dict[str, float | int | str | list[float]] = {"layers": layers, "rank_deficient": len(flat)}
    if beyond:
        return _beyond(record, late["value"].dropna(), start["value"], lasting or beyond, flat, evidence)
    if flat:
        return _flat(flat, evidence)
    if not len(judged):
        return _unjudged(late)
    worst = float(judged["value"].iloc[0])
    return INPUTS.ok(
        f"The largest eigenvalue of an input's second moment is at most {worst:.3g} times the median one "
        f"({judged.index[0]}; threshold {INPUT_KAPPA:g}).",
        evidence | {"kappa_50": worst},
    )


def ill_conditioned_gradients(record: Record) -> list[Finding]:
    """Judge whether most layers' output gradients vary almost along one line, at the start and at the end of the run.

    Later in a run that fits its data the few samples that are left dominate the gradient, which is no fault; so both
    are needed.

    Args:
        record: record of one run.

    Returns:
        One finding, none with fewer than three layers before the head, or too few samples.
    """
    ends = [metrics.conditions(record, factor="gradient", start=start).iloc[:-1] for start in (True, False)]
    judged = [end[end["value"].notna() | _is(end, Status.RANK_DEFICIENT)] for end in ends]
    beyond = [end[~(end["value"] <= GRADIENT_KAPPA)] for end in judged]
    layers = min(map(len, judged))
    if layers < metrics.MIN_LAYERS:
        return []
    worst = min(len(found) / len(end) for found, end in zip(beyond, judged, strict=True))
    evidence = {"layers": layers, "beyond_at_start": len(beyond[0]), "beyond_at_end": len(beyond[1])}
    if worst <= 0.5:
        few = min(map(len, beyond))
        return GRADIENTS.ok(
            f"The largest eigenvalue of a gradient's second moment is beyond {GRADIENT_KAPPA:g} times the median one "
            f"in {few} of {layers} layers (threshold: half of them).",
            evidence,
        )
    sites = beyond[1]["site"].tolist()
    return GRADIENTS.found(
        Verdict.WARNING,
        f"At {len(sites)} of {layers} layers the output gradients of all samples lie along a few directions: the "
        f"largest eigenvalue of their second moment is beyond {GRADIENT_KAPPA:g} times the median one (threshold), as "
        f"at {sites[-1]}.",
        sites=sites[::-1],
        evidence=evidence,
    )


def curvature_dominated(record: Record) -> list[Finding]:
    """Judge whether one layer's curvature is far above that of the others, in the late window.

    Args:
        record: record of one run.

    Returns:
        One finding, none with fewer than three layers.
    """
    found = metrics.balance(record)
    if not found.ratio.usable:
        return []
    ratio, numbers = found.ratio.value, f"{found.largest:.2g} against {found.median:.2g}"
    evidence = {"ratio": ratio, "largest": found.largest, "median": found.median, "layers": found.ratio.n}
    if ratio <= DOMINANCE:
        return CURVATURE.ok(
            f"The largest curvature of a layer is {ratio:.3g} times the median layer's ({found.site}; threshold "
            f"{DOMINANCE:g}).",
            evidence,
        )
    rules = set(scale.weights(record)["rule"])
    adaptive = bool(rules) and rules <= {"adam", "muon"}
    return CURVATURE.found(
        Verdict.NOTE if adaptive else Verdict.WARNING,
        f"{found.site}: the curvature of this layer, the largest eigenvalue of its Fisher matrix, is {ratio:.3g} times "
        f"that of the median layer (threshold {DOMINANCE:g}; {numbers}).",
        sites=[found.site],
        evidence=evidence,
        remedy="Nothing while an optimizer that scales each parameter's step trains; SGD would need a smaller learning "
        "rate for this layer."
        if adaptive
        else None,
    )


def rank_collapse(record: Record) -> list[Finding]:
    """Judge whether deep layers see far fewer directions than shallow ones, from the start of the run to its end.

    A trained classifier may rightly end with as few directions as it has classes, so the start is needed as well.

    Args:
        record: record of one run.

    Returns:
        One finding, none with fewer than six hidden layers.
    """
    start, end = metrics.collapse(record, start=True), metrics.collapse(record, start=False)
    if not (start.ratio.usable and end.ratio.usable):
        return []
    ratio = min(start.ratio.value, end.ratio.value)
    evidence = {"lost_at_start": start.ratio.value, "lost_at_end": end.ratio.value, "layers": end.ratio.n}
    evidence |= {"rank_first": end.at_first, "rank_last": end.at_last}
    if ratio <= COLLAPSE:
        return RANK.ok(
            f"Inputs vary along {end.at_first:.2g} directions at the first hidden layers and along {end.at_last:.2g} "
            f"at the last (threshold {COLLAPSE:g}-fold fewer).",
            evidence,
        )
    return RANK.found(
        Verdict.WARNING,
        f"The directions along which inputs vary fall from {end.at_first:.2g} at the first hidden layers to "
        f"{end.at_last:.2g} at the last of {end.ratio.n}, {ratio:.2g}-fold (threshold {COLLAPSE:g}).",
        sites=(end.last, end.first),
        evidence=evidence,
    )


def _beyond(
    record: Record,
    late: pd.Series,
    start: pd.Series,
    sites: list[str],
    flat: list[str],
    evidence: dict[str, float | int | str | list[float]],
) -> list[Finding]:
    """Conclude that inputs are ill-conditioned: a note where none of them was so at the start."""
    site, first = sites[0], str(late.index[0])
    passing = bool(start[site] <= INPUT_KAPPA)
    begun = f", at the start {start[site]:.3g} times" if passing else ""
    return INPUTS.found(
        Verdict.NOTE if passing else Verdict.WARNING,
        f"{site}: the largest eigenvalue of its input's second moment is {late[site]:.3g} times the median one{begun} "
        f"(threshold {INPUT_KAPPA:g}; {late[first]:.3g} at {first}); {len(sites) + len(flat)} of "
        f"{count(len(late) + len(flat), 'hidden layer')} are beyond it.",
        sites=[*sites, *flat],
        step=tables.onset(metrics.condition_numbers(record)[site].dropna() > INPUT_KAPPA),
        evidence=evidence
        | {"kappa_50": float(late[site]), "kappa_50_first": float(late[first]), "sites_beyond": len(sites)}
        | ({"kappa_50_start": float(start[site])} if passing else {}),
        cause="Training has made this input nearly one-dimensional; early in a run that often passes."
        if passing
        else None,
        remedy="Train on; if it stays, lower the learning rate or warm it up, or normalize this input."
        if passing
        else None,
    )


def _flat(flat: list[str], evidence: dict[str, float | int | str | list[float]]) -> list[Finding]:
    """Note that inputs have no variance at all in half of their directions."""
    return INPUTS.found(
        Verdict.NOTE,
        f"{flat[0]}: fewer than half of the directions of its input carry anything, so the median eigenvalue is zero; "
        f"{len(flat)} of {evidence['layers']} hidden layers are so.",
        sites=flat,
        evidence=evidence,
        cause="Dead units, or a narrow layer right before it.",
        remedy="Look at propagation.dead-units; behind a bottleneck it is expected.",
    )


def _unjudged(frame: pd.DataFrame) -> list[Finding]:
    """Conclude that there are too few samples, or that all layers are too wide."""
    few = frame[_is(frame, Status.FEW_SAMPLES)]
    if not len(few):
        return INPUTS.undecided(
            f"All {len(frame)} hidden layers are too wide for all their eigenvalues to be taken, or not finite.",
            "Look at the largest eigenvalue and the effective rank instead.",
        )
    needed = int(metrics.ENOUGH * few["width"].min())
    return INPUTS.undecided(
        f"Small eigenvalues need {metrics.ENOUGH} samples a feature, here at least {needed}: the {len(few)} hidden "
        f"layers have {few['samples'].median():.0f} samples.",
        f"Attach to some steps with a batch of {needed} or more.",
        evidence={"samples": float(few["samples"].median()), "width": float(few["width"].min())},
    )


def _is(frame: pd.DataFrame, status: Status) -> pd.Series:
    return pd.Series([found is status for found in frame["status"]], index=frame.index, dtype=bool)
