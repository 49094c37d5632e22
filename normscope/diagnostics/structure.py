"""Structure: what is wrong with normalization layers as they stand in the model, whatever it is trained on."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics.rule import Rule
from normscope.diagnostics.words import count
from normscope.metrics import structure as metrics

# origin of each threshold: the `threshold_source` of the rule that uses it
FEW_VALUES = 2.0  # numbers that one mean or variance is taken of
INFLATED = 2.0  # factor by which dropout raises a variance in training
LARGE_EPS = 1e-2
HALF = 2.0**-25  # and below, a number is 0 in float16

_PLAIN = (*metrics.CENTERING, "rms")  # kinds that divide by what they measure, and multiply by their gain
PASS_EXAMPLE = "Pass example=, a batch as the model takes it."

FEW = Rule(
    id="structure.few-values",
    threshold=FEW_VALUES,
    threshold_source="identity: of one value, value minus mean is 0; of two, it is plus or minus half their distance, "
    "which divided by the deviation leaves the sign",
    source="wu2018",
    cause="Groups are as small as the channels that they hold on a 1 x 1 map or a vector, or the normalized dimension "
    "is one number wide.",
    remedy="Use fewer groups (torch.nn.GroupNorm(1, channels) takes all channels together), normalize before pooling, "
    "or use LayerNorm over the channels.",
)
DROPOUT = Rule(
    id="structure.dropout-before-norm",
    threshold=INFLATED,
    threshold_source="identity: dropout with rate p multiplies the variance by 1 / (1 - p) at least, in training "
    "alone; a factor of 2 is a drift of 0.1 nats",
    source="li2018",
    cause="The running variance is taken of values with dropout, and inference divides values without it by it.",
    remedy="Move the dropout behind the last BatchNorm, lower its rate, or use a layer without running statistics "
    "(torch.nn.GroupNorm, LayerNorm).",
)
NEVER_REACHED = Rule(
    id="structure.never-reached",
    threshold=0.0,
    threshold_source="identity: calls of the layer in a forward pass of the model",
    source="huang2020",
    cause="The layer is defined, but the forward method of the module around it does not call it.",
    remedy="Call it in forward, or remove it: its parameters get no gradient, which DistributedDataParallel refuses.",
)
MISSING_NORM = Rule(
    id="structure.missing-norm",
    threshold=1.0,
    threshold_source="identity: one of at least three blocks of the same build differs from all others",
    source="huang2020",
    cause="The layer was left out, or replaced by an identity, in this block alone.",
    remedy="Give this block the normalization layer that the others have, unless it was left out on purpose.",
)
SHARED_NORM = Rule(
    id="structure.shared-norm",
    threshold=1.0,
    threshold_source="identity: calls of the layer in a forward pass of the model",
    source="wu2021",
    cause="One layer normalizes several inputs, as a head shared by the levels of a pyramid does: its running "
    "statistics mix what training normalizes apart.",
    remedy="Give each call a layer of its own (the weights around it may be shared), or use one without running "
    "statistics, as torch.nn.GroupNorm.",
)
FORWARD_FAILS = Rule(
    id="structure.forward-fails",
    threshold=0.0,
    threshold_source="identity: errors of the layer on the example",
    source="huang2020",
    cause="The layer cannot take this input: one value a channel, or another number of channels than it was built for.",
    remedy="Mend the size that the error names, or pass an example of the size that is trained on.",
)
EPS = Rule(
    id="structure.eps",
    threshold=LARGE_EPS,
    threshold_source="identity: eps is the variance below which a layer no longer normalizes; half precision has no "
    "positive number below 2^-24; measured: layers of 80 published architectures have 1e-12 to 1e-3",
    source="ioffe2015",
    cause="eps is set to a value that was meant for another layer, formula or type.",
    remedy="Use 1e-5 for BatchNorm, LayerNorm and GroupNorm, 1e-6 for RMSNorm; compute the statistics in float32.",
)
MIXED_KINDS = Rule(
    id="structure.mixed-kinds",
    threshold=1.0,
    threshold_source="identity: number of kinds of normalization",
    source="huang2020",
    cause="Parts of the model come from different designs, or a conversion has left some layers out.",
    remedy="Nothing if it is meant; else swap what is left: normscope.norms.convert(model, to=...).",
)
ZERO_GAINS = Rule(
    id="structure.zero-gains",
    threshold=0.0,
    threshold_source="identity: a gain of 0 leaves the bias alone, and passes no gradient on",
    source="goyal2017",
    cause="Gains are initialized at zero elsewhere than in the last normalization of a residual branch.",
    remedy="Initialize these gains with 1: torch.nn.init.ones_(layer.weight).",
)
FROZEN_GAINS = Rule(
    id="structure.frozen-gains",
    threshold=0.0,
    threshold_source="identity: requires_grad=False does not stop running statistics, only eval() does",
    source="wu2021",
    cause="Parameters were frozen (requires_grad=False), but the layer is in training mode: it normalizes with the "
    "statistics of the batch and overwrites those of the pretrained model.",
    remedy="Call layer.eval() on it after each model.train(), or train its gain and bias as well.",
)
UNSYNCHRONIZED = Rule(
    id="structure.unsynchronized",
    threshold=1.0,
    threshold_source="identity: processes that train together",
    source="wu2021",
    cause="Under data parallelism each process takes the statistics of its own share of the batch.",
    remedy="If that share is small (below 16 samples), use torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) before "
    "wrapping it.",
)


def forward_fails(record: Record) -> list[Finding]:
    """Judge whether a normalization layer refuses the example that is run.

    Args:
        record: record of one run.

    Returns:
        One finding, none where all take it, or nothing was run.
    """
    events = record.events[record.events["kind"] == "forward-failed"] if "kind" in record.events else record.events
    if not len(events):
        return []
    site, message = str(events["site"].iloc[0]), str(events["message"].iloc[0]).rstrip(".")
    return FORWARD_FAILS.found(
        Verdict.FAILURE,
        f"{site.rpartition('/')[0]} raised {message} (threshold 0 errors); layers behind it were not seen.",
        sites=[site],
    )


def few_values(record: Record) -> list[Finding]:
    """Judge whether means and variances are taken of one or two numbers, which leaves nothing or signs alone.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer's groups can be that small.
    """
    facts, frame = metrics.norms(record), metrics.calls(record)
    judged = facts[facts["norm"].isin(_PLAIN)]
    if not len(judged):
        return []
    if not len(frame):
        # without running it, only that of a vector can be so few
        doubtful = judged[judged["norm"].isin(["instance", "group", "batch"])]
        return unordered(FEW, record, f"of how many values {count(len(doubtful), 'layer')} take", len(doubtful))
    frame = frame[frame["values"].notna() & frame["module"].isin(judged.index)]
    trains = facts["training"].reindex(frame["module"]).to_numpy(bool)
    frame = frame[(frame["kind"] != "batch") | (trains & (frame["values"] <= 1))]
    none = frame[(frame["values"] <= 1) & (frame["kind"] != "rms")]
    signs = frame[((frame["values"] == FEW_VALUES) & (frame["kind"] != "rms")) | (frame["values"] <= 1)]
    if not len(frame):
        return []
    found = none if len(none) else signs
    if not len(found):
        return FEW.ok(
            f"One mean or variance is taken of {frame['values'].min():.0f} values at least (threshold {FEW_VALUES:g}).",
            {"values": float(frame["values"].min()), "layers": len(frame)},
        )
    top = found.iloc[0]
    shape = " x ".join(str(n) for n in top["shape"])
    left = "its output is its bias, whatever comes in, and no gradient passes it" if len(none) else "signs are left"
    groups = facts["groups"].get(top["module"])
    apart = f" in {groups:.0f} groups" if pd.notna(groups) else ""
    return FEW.found(
        Verdict.FAILURE if len(none) else Verdict.WARNING,
        f"{top['module']}: an input of {shape} is normalized{apart} over {count(top['values'], 'value')} each "
        f"(threshold {FEW_VALUES:g}): {left}; so at {count(found['module'].nunique(), 'layer')}.",
        sites=_sites(found["module"], "input"),
        evidence={"values": float(top["values"]), "layers": found["module"].nunique()},
        cause="The batch has one value a channel: a single sample behind a global pooling."
        if top["kind"] == "batch"
        else None,
        remedy="Use batches of more samples (drop_last=True in the loader), or LayerNorm."
        if top["kind"] == "batch"
        else None,
    )


def dropout_before_norm(record: Record) -> list[Finding]:
    """Judge whether dropout feeds a layer with running statistics, which then are those of training alone.

    Args:
        record: record of one run.

    Returns:
        One finding, none where the model has no dropout or no layer in training mode with running statistics.
    """
    facts, layers = metrics.modules(record), metrics.norms(record)
    layers = layers[layers["has_running"] & layers["training"].astype(bool)]
    rates = facts["drop"].dropna()
    rates = rates[rates > 0]
    if not len(layers) or not len(rates):
        return []
    source = metrics.sources(record)
    frame = pd.DataFrame(
        [(name, rates[source[name]]) for name in layers.index if source.get(name) in rates.index],
        columns=["module", "rate"],
    ).sort_values("rate", ascending=False, kind="stable")
    if not len(frame):
        if not metrics.ordered(record):
            return unordered(DROPOUT, record, f"whether {count(len(rates), 'dropout')} feed BatchNorm", len(rates))
        return DROPOUT.ok(f"No dropout right before {count(len(layers), 'layer')} with running statistics.")
    name, rate = str(frame["module"].iloc[0]), float(frame["rate"].iloc[0])
    factor = 1 / (1 - rate) if rate < 1 else float("inf")
    return DROPOUT.found(
        Verdict.WARNING if factor >= INFLATED else Verdict.NOTE,
        f"{source[name]} drops {rate:.0%} right before {name}: in training the variance is {factor:.2g} times that of "
        f"inference at least (threshold {INFLATED:g}); so at {count(len(frame), 'layer')}.",
        sites=_sites(frame["module"], "input"),
        evidence={"rate": rate, "factor": factor, "layers": len(frame)},
    )


def never_reached(record: Record) -> list[Finding]:
    """Judge whether normalization layers with trainable parameters are left out by the model's forward method.

    Args:
        record: record of one run.

    Returns:
        One finding, none where there is no such layer, or where nothing was seen to run.
    """
    layers, held, reached = metrics.norms(record), metrics.parameters(record), metrics.ran(record)
    trained = set(held["module"][held["trainable"].eq(True)])
    layers = layers[layers.index.isin(trained)]
    if not len(layers):
        return []
    if not reached:
        return unordered(NEVER_REACHED, record, f"whether {count(len(layers), 'layer')} are reached", len(layers))
    if forward_fails(record):
        return NEVER_REACHED.undecided(
            f"Not judged at {count(len(layers), 'layer')}: the example did not pass.",
            "Mend structure.forward-fails first.",
        )
    known = reached | metrics.used(record)
    left = [str(name) for name in layers.index if name and name not in known]
    if not left:
        return NEVER_REACHED.ok(f"All {count(len(layers), 'normalization layer')} are reached (threshold 0 left out).")
    # where the module around it did not run either, its branch was not taken: an auxiliary head, a layer dropped
    alone = [name for name in left if name.rpartition(".")[0] in reached or "." not in name]
    sites = [*alone, *(name for name in left if name not in alone)]
    sure = bool(alone) and metrics.fact(record, "training") is not False
    return NEVER_REACHED.found(
        Verdict.WARNING if sure else Verdict.NOTE,
        f"{sites[0]} was never called in a forward pass; so {len(left)} of "
        f"{count(len(layers), 'normalization layer')} (threshold 0).",
        sites=_sites(sites, "output"),
        evidence={"left_out": len(left), "layers": len(layers)},
        cause=None if alone else "The modules around did not run: a branch that this pass does not take.",
        remedy=None if alone else "Nothing if the branch is taken at other times; else remove it.",
    )


def missing_norm(record: Record) -> list[Finding]:
    """Judge whether a block lacks a normalization layer that all others of its build have.

    Args:
        record: record of one run.

    Returns:
        One finding, none where the model has no normalization layer.
    """
    layers, frame = metrics.norms(record), metrics.missing(record)
    if not len(layers):
        return []
    if not len(frame):
        return MISSING_NORM.ok(f"No block lacks a norm that others like it have ({count(len(layers), 'layer')}).")
    frame = frame.sort_values("end", kind="stable")
    inner, top = frame[~frame["end"].astype(bool)], frame.iloc[0]
    return MISSING_NORM.found(
        Verdict.WARNING if len(inner) else Verdict.NOTE,
        f"{top['module']}: no normalization here, while {count(top['alike'], 'place')} like it "
        f"{'have' if top['alike'] > 1 else 'has'} one; so at {count(len(frame), 'place')} (threshold 1).",
        sites=_sites(frame["module"], "output"),
        evidence={"places": len(frame), "alike": int(top["alike"])},
        cause=None if len(inner) else "The first or last block is built in another way, which is often meant.",
    )


def shared_norm(record: Record) -> list[Finding]:
    """Judge whether a layer with running statistics normalizes several inputs in one forward pass.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer in training mode keeps running statistics.
    """
    layers, frame = metrics.norms(record), metrics.calls(record)
    layers = layers[layers["has_running"] & layers["training"].astype(bool)]
    if not len(layers):
        return []
    if not len(frame):
        return unordered(SHARED_NORM, record, f"whether {count(len(layers), 'layer')} run once", len(layers))
    frame = frame[frame["module"].isin(layers.index)]
    several = frame.groupby("module", sort=False).agg(
        calls=("call", lambda c: c.max() + 1), sizes=("shape", lambda s: len({shape[2:] for shape in s}))
    )
    several = several[several["calls"] > 1].sort_values("sizes", ascending=False, kind="stable")
    if not len(several):
        return SHARED_NORM.ok(f"Each of {count(len(layers), 'layer')} with running statistics runs once (threshold 1).")
    top = several.iloc[0]
    apart = top["sizes"] > 1
    sized = f", with inputs of {top['sizes']} sizes" if apart else ""
    return SHARED_NORM.found(
        Verdict.WARNING if apart else Verdict.NOTE,
        f"{top.name}: runs {top['calls']} times in a forward pass{sized} (threshold 1), and its running statistics mix "
        f"them; so at {len(several)} of {count(len(layers), 'layer')}.",
        sites=_sites(several.index, "running"),
        evidence={"calls": int(top["calls"]), "sizes": int(top["sizes"]), "layers": len(several)},
    )


def eps(record: Record) -> list[Finding]:
    """Judge whether eps is a number that keeps the division finite and the normalization in force.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer's eps is known.
    """
    layers = metrics.norms(record)
    layers = layers[layers["eps"].notna() & layers["norm"].isin(_PLAIN)]
    if not len(layers):
        return []
    value, half = layers["eps"], layers["computes_in"].eq("float16")
    cases = (
        (half & (value <= HALF) & (value > 0), "is 0 in float16, in which this layer computes", HALF),
        (value <= 0, "lets a constant channel or token become 0 / 0, NaN", 0.0),
        (value >= LARGE_EPS, "outweighs variances that are usual", LARGE_EPS),
    )
    for which, meaning, limit in cases:
        if which.any():
            top = layers[which].iloc[0]
            return replace(EPS, threshold=limit).found(
                Verdict.WARNING,
                f"{top.name}: eps {top['eps']:.3g} {meaning} (threshold {limit:.2g}); so at {which.sum()} of "
                f"{count(len(layers), 'layer')}.",
                sites=_sites(layers.index[which], "output"),
                evidence={"eps": float(top["eps"]), "layers": int(which.sum())},
            )
    low, high = value.min(), value.max()
    said = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return EPS.ok(f"eps is {said} at {count(len(layers), 'layer')} (threshold {LARGE_EPS:g}).", {"eps": float(high)})


def mixed_kinds(record: Record) -> list[Finding]:
    """Judge whether the model mixes kinds of normalization: a note, for many designs do.

    Args:
        record: record of one run.

    Returns:
        One finding, none where the model has fewer than two normalization layers.
    """
    layers = metrics.norms(record)
    kinds = layers["norm"].value_counts()
    if len(layers) < 2:
        return []
    said = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    if len(kinds) == 1:
        return MIXED_KINDS.ok(f"All normalization layers are of one kind: {said} (threshold 1).")
    rarest = layers.index[layers["norm"] == kinds.index[-1]]
    return MIXED_KINDS.found(
        Verdict.NOTE,
        f"{len(kinds)} kinds of normalization (threshold 1): {said}.",
        sites=_sites(rarest, "output"),
        evidence={str(kind): int(n) for kind, n in kinds.items()},
    )


def zero_gains(record: Record) -> list[Finding]:
    """Judge whether gains are zero elsewhere than at the end of residual branches, where that is usual.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no gain is known.
    """
    gains = _gains(record)
    if not len(gains):
        return []
    zero = gains.index[gains["largest"] == 0]
    ends = {_last_beside(str(name), gains.index) for name in zero}
    bad = list(zero) if len(zero) == len(gains) else [name for name in zero if name not in ends]
    if not bad:
        ended = f"; {len(zero)} end their block with zeros, as residual branches may" if len(zero) else ""
        return ZERO_GAINS.ok(f"No gain blocks the signal at {count(len(gains), 'layer')}{ended}.")
    every = len(zero) == len(gains)
    return ZERO_GAINS.found(
        Verdict.WARNING if every and len(gains) > 1 else Verdict.NOTE,
        f"{bad[0]}: all gains are 0, so its output is its bias; so at {len(bad)} of {count(len(gains), 'layer')}"
        f"{' which is all' if every else ''} (threshold 0).",
        sites=_sites(bad, "output"),
        evidence={"layers": len(bad), "of_layers": len(gains)},
    )


def frozen_gains(record: Record) -> list[Finding]:
    """Judge whether layers whose parameters are frozen go on moving their running statistics.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no layer with parameters keeps running statistics.
    """
    layers, held = metrics.norms(record), metrics.parameters(record)
    own = held[held["module"].isin(layers.index[layers["has_running"]])]
    trainable = own["trainable"].eq(True).groupby(own["module"], sort=False).any()
    if not len(trainable):
        return []
    moving = layers.index[layers["training"].astype(bool) & (layers["momentum"] != 0)]
    bad = [str(name) for name in trainable.index[~trainable] if name in moving]
    if not bad:
        return FROZEN_GAINS.ok(f"No layer of {len(trainable)} with running statistics is frozen by halves.")
    return FROZEN_GAINS.found(
        Verdict.WARNING,
        f"{bad[0]}: gain and bias are frozen while its running statistics move; so at {len(bad)} of "
        f"{count(len(trainable), 'layer')} (threshold 0).",
        sites=_sites(bad, "running"),
        evidence={"layers": len(bad), "of_layers": len(trainable)},
    )


def unsynchronized(record: Record) -> list[Finding]:
    """Judge whether processes that train together take their batch statistics apart: a note.

    Args:
        record: record of one run.

    Returns:
        One finding, none where a single process trains, or no layer mixes samples.
    """
    layers = metrics.norms(record)
    layers = layers[layers["crosses"] & layers["training"].astype(bool) & layers["norm"].ne("other")]
    known = metrics.fact(record, "processes")
    processes = int(known) if isinstance(known, int) else 1
    if not len(layers) or processes < 2:
        return []
    alone = layers.index[~layers["synchronized"]]
    if not len(alone):
        return UNSYNCHRONIZED.ok(f"Statistics are taken over all {processes} processes at {len(layers)} layers.")
    return UNSYNCHRONIZED.found(
        Verdict.NOTE,
        f"{alone[0]}: each of {processes} processes takes batch statistics by itself (threshold 1); so at "
        f"{count(len(alone), 'layer')}.",
        sites=_sites(alone, "output"),
        evidence={"processes": processes, "layers": len(alone)},
    )


def _gains(record: Record) -> pd.DataFrame:
    """Return least and largest gain by layer, where a gain of 0 is one that multiplies by 0."""
    held, layers = metrics.parameters(record), metrics.norms(record)
    plain = layers[layers["norm"].isin(_PLAIN) & layers["gain"].notna() & layers["gain_offset"].fillna(0.0).eq(0)]
    own = held[held["module"].isin(plain.index) & held["largest"].notna()]
    return own.set_index("module")[["least", "largest"]]


def _last_beside(name: str, layers: pd.Index) -> str:
    """Return the last layer of the smallest block around a layer that holds another."""
    block = name
    while "." in block:
        block = block.rpartition(".")[0]
        inside = [other for other in layers if str(other).startswith(f"{block}.")]
        if len(inside) > 1:
            return str(inside[-1])
    return str(layers[-1])


def _sites(names: pd.Index | pd.Series | list[str], slot: str) -> list[str]:
    return [f"{name}/{slot}" for name in dict.fromkeys(map(str, names))]


def unordered(rule: Rule, record: Record, what: str, concerned: int) -> list[Finding]:
    """Conclude that the order of execution or the sizes are missing.

    Args:
        rule: the finding's fixed part.
        record: record of one run.
        what: what was not judged.
        concerned: how many layers it concerns.

    Returns:
        One finding, none where it concerns no layer, or where another run than a lint lacks it.
    """
    if not concerned or not record.runs[0].get("lint"):
        return []
    return rule.undecided(f"Not judged without running the model: {what}.", PASS_EXAMPLE)
