"""Structure: what a record says of a model at rest, of its optimizers, and of the order in which layers run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod

import numpy as np
import pandas as pd

from normscope.core.record import Record
from normscope.metrics import tables

CENTERING = ("batch", "instance", "group", "layer")  # kinds that subtract the mean of what they normalize
MOST_LACKING = 4  # a norm is missed where at most one block in so many lacks it
_FEWEST = 3  # blocks alike, from which one that differs stands out
_GENERIC = ("Sequential", "ModuleList", "ModuleDict")  # alike only where they stand side by side
_PASSING = ("Identity", "Flatten", "Unflatten")  # layers that change no value
_MODULES = (
    "module",
    "class",
    "after",
    "drop",
    "norm",
    "eps",
    "momentum",
    "groups",
    "has_running",
    "gain",
    "gain_offset",
    "axis",
    "ndim",
    "training",
    "crosses",
    "whitens",
    "synchronized",
    "computes_in",
)
_PARAMETERS = ("site", "module", "slot", "shape", "dtype", "trainable", "holders", "least", "largest")
_GROUPS = ("optimizer", "group", "lr", "peak", "momentum", "decay", "eps", "rule", "decoupled")
_NUMBERS = (
    "drop",
    "eps",
    "momentum",
    "groups",
    "gain_offset",
    "axis",
    "ndim",
    "least",
    "largest",
    "lr",
    "peak",
    "decay",
)


def fact(record: Record, name: str) -> object:
    """Return a fact of the structure as a whole, None where the record says nothing.

    Args:
        record: record of one run.
        name: "training", "processes" or "foreign".

    Returns:
        The mode of the model, the number of processes that train together, or how many tensors the optimizers hold that
        are not the model's.
    """
    return _structure(record).get(name)


def modules(record: Record) -> pd.DataFrame:
    """Return the modules in the order of definition, indexed by name.

    Args:
        record: record of one run.

    Returns:
        The columns class, after (the module whose output it certainly takes, else ""), drop (rate of dropout); of
        normalization layers norm (the kind, NaN for others), eps, momentum, groups, has_running, gain, gain_offset,
        axis, ndim (dimensions normalized), training, crosses (whether it mixes samples), whitens, synchronized,
        computes_in.
    """
    return _rows(record, "modules", _MODULES).set_index("module")


def norms(record: Record) -> pd.DataFrame:
    """Return the rows of `modules` that normalize, with `training` of the late window where the run tells it.

    Where it does not, that of the layer, or what `model.train()` would make of a model in evaluation mode.

    Args:
        record: record of one run.

    Returns:
        The same columns.
    """
    frame = modules(record)
    frame = frame[frame["norm"].notna()]
    seen = tables.late_medians(tables.table(record, "training", slot="running")).set_index("site")["value"]
    late = seen.reindex([f"{name}/running" for name in frame.index]).to_numpy(float)
    stated = frame["training"].eq(True).to_numpy() | (fact(record, "training") is False)
    return frame.assign(
        training=np.where(np.isnan(late), stated, late != 0),
        **{name: frame[name].eq(True) for name in ("has_running", "crosses", "synchronized")},
    )


def parameters(record: Record) -> pd.DataFrame:
    """Return the parameters, indexed by site, in the order of definition.

    Args:
        record: record of one run.

    Returns:
        The columns module, slot, shape (a list), dtype, trainable, holders (pairs of optimizer and group), and of the
        gains of normalization layers least and largest magnitude.
    """
    return _rows(record, "parameters", _PARAMETERS).set_index("site")


def groups(record: Record) -> pd.DataFrame:
    """Return the parameter groups of the optimizers, indexed by optimizer and group.

    Args:
        record: record of one run.

    Returns:
        The columns lr, peak (of its schedule), momentum, decay, eps, rule ("" where the step is not one of torch's),
        decoupled.
    """
    return _rows(record, "groups", _GROUPS).set_index(["optimizer", "group"])


def settings(record: Record) -> pd.DataFrame:
    """Return the parameters with the settings of their group: of the first, where several hold them.

    Args:
        record: record of one run.

    Returns:
        The rows of `parameters` that an optimizer holds, with the columns of `groups`.
    """
    frame = parameters(record)
    frame = frame[frame["holders"].map(bool).astype(bool)]
    optimizer, group = ([holders[0][i] for holders in frame["holders"]] for i in (0, 1))
    return frame.assign(optimizer=optimizer, group=group).join(groups(record), on=["optimizer", "group"])


def ran(record: Record) -> set[str]:
    """Return the modules that are known to have run, and those around them.

    Args:
        record: record of one run.

    Returns:
        Names; empty where no output was seen.
    """
    known = tables.attributes(record)
    outputs = known[known["slot"].astype(str).str.startswith("output") & known["module"].ne("")]
    return {name for module in outputs["module"].unique() for name in (module, *_around(module))}


def calls(record: Record) -> pd.DataFrame:
    """Return how normalization layers were called: a row a call of a forward pass, in order.

    Args:
        record: record of one run.

    Returns:
        The columns module, call, kind, shape (of the input) and values, the numbers that one mean or variance is taken
        of: NaN where that is not known.
    """
    known, facts = tables.attributes(record), norms(record)
    seen = known[known["slot"].eq("input") & known["module"].isin(facts.index)]
    rows = []
    for module, call, shape in zip(seen["module"], seen["call"], seen["shape"], strict=True):
        if isinstance(shape, list):
            layer = facts.loc[module]
            rows.append((module, int(call), str(layer["norm"]), tuple(shape), _values(layer, shape)))
    frame = pd.DataFrame(rows, columns=["module", "call", "kind", "shape", "values"])
    return frame.astype({"values": float})


def sources(record: Record) -> dict[str, str]:
    """Return of each normalization layer the module whose output it takes as it is.

    Layers that change no value are passed over. What ran is known from the run, else from the definition.

    Args:
        record: record of one run.

    Returns:
        Module to module; without those whose source is unknown, as behind a sum.
    """
    facts, known = modules(record), tables.attributes(record)
    outputs = known[known["slot"].eq("output")]
    before = {str(name): str(after) for name, after in facts["after"].items() if isinstance(after, str) and after}
    for module, source in zip(outputs["module"], outputs["predecessor"], strict=True):
        before[str(module)] = tables.module_of(str(source))
    classes = facts["class"].to_dict()
    found = {}
    for name in facts.index[facts["norm"].notna()]:
        source = before.get(str(name), "")
        while source and classes.get(source) in _PASSING:
            source = before.get(source, "")
        if source:
            found[str(name)] = source
    return found


def ordered(record: Record) -> bool:
    """Tell whether the record knows in which order layers run: some of them have run."""
    return bool(ran(record))


def used(record: Record) -> set[str]:
    """Return the modules with a parameter that got a gradient: used, even where they were not called."""
    gradients = tables.table(record, "norm", slot="*", role="gradient")
    return {tables.module_of(str(site)) for site in gradients.columns[(gradients > 0).any()]}


def missing(record: Record) -> pd.DataFrame:
    """Return where a normalization layer is missing that others of the same build have.

    Two comparisons: blocks of one class whose names differ in numbers alone, with the same weighted layers, of which at
    most one in `MOST_LACKING`, and no whole stage, lacks a norm at a place where the others have one; and layers of one
    class in a row, of which a single pair, neither the first nor the last, has no norm between.

    Args:
        record: record of one run.

    Returns:
        A row a place: module (where it is missed: the name that it would have, or the layer before the place), alike
        (how many have it), end (whether it is missing at the first or the last of them).
    """
    lacking, normed = dict(_lacking_blocks(record)), [str(name) for name in norms(record).index]
    alone = {place: facts for place, facts in lacking.items() if not _by_design(place, lacking, normed)}
    found, order = alone | dict(_lacking_gaps(record)), {str(name): i for i, name in enumerate(modules(record).index)}
    places = sorted(found, key=lambda place: (next(order[name] for name in _upward(place) if name in order), place))
    return pd.DataFrame([(place, *found[place]) for place in places], columns=["module", "alike", "end"])


def _lacking_blocks(record: Record) -> Iterator[tuple[str, tuple[int, bool]]]:
    facts, classes = modules(record), modules(record)["class"].to_dict()
    normed, weighted = _inside(facts.index[facts["norm"].notna()]), _inside(_weighted(record))
    alike: dict[tuple[object, ...], list[str]] = {}
    for block in facts.index:
        if block and block in weighted:
            parent = block.rpartition(".")[0] if classes[block] in _GENERIC else ""
            role = re.sub(r"\d+(?=\.|$)", "", block)
            alike.setdefault((classes[block], parent, role, frozenset(weighted[block])), []).append(block)
    for blocks in alike.values():
        places = {place for block in blocks for place in normed.get(block, ())}
        for place in places if len(blocks) >= _FEWEST else ():
            lacking = [block for block in blocks if place not in normed.get(block, ())]
            if 0 < len(lacking) <= max(1, len(blocks) // MOST_LACKING):
                for block in lacking:
                    yield f"{block}.{place}", (len(blocks) - len(lacking), block in (blocks[0], blocks[-1]))


def _by_design(place: str, lacking: Iterable[str], present: Iterable[str]) -> bool:
    """Tell whether a norm is missing wherever one number of its path is another, as in a whole stage."""
    mates: dict[int, set[str]] = {}
    for other in {*lacking, *present}:
        at = _only_number(place.split("."), other.split("."))
        if at is not None:
            mates.setdefault(at, set()).add(other)
    return any(found <= set(lacking) for found in mates.values())


def _only_number(path: Sequence[str], other: Sequence[str]) -> int | None:
    """Return at which part two paths differ, where that is one and they differ in its number alone."""
    apart = [i for i, pair in enumerate(zip(path, other, strict=False)) if pair[0] != pair[1]]
    if len(path) != len(other) or len(apart) != 1:
        return None
    one, two = (re.sub(r"\d+$", "", parts[apart[0]]) for parts in (path, other))
    return apart[0] if one == two else None


def _lacking_gaps(record: Record) -> Iterator[tuple[str, tuple[int, bool]]]:
    facts, weighted = modules(record), set(_weighted(record))
    normed = set(facts.index[facts["norm"].notna()])
    for parent in facts.index[facts["class"].eq("Sequential")]:
        children = [name for name in facts.index if name and name.rpartition(".")[0] == parent]
        at = [i for i, name in enumerate(children) if name in weighted]
        gaps = [
            (children[i], any(name in normed for name in children[i:k]))
            for i, k in pairwise(at)
            if facts["class"][children[i]] == facts["class"][children[k]]
        ]
        without = [i for i, (_, has) in enumerate(gaps) if not has]
        if len(without) == 1 and len(gaps) > _FEWEST and 0 < without[0] < len(gaps) - 1:
            yield gaps[without[0]][0], (len(gaps) - 1, False)


def _weighted(record: Record) -> list[str]:
    """Return the modules with a matrix of their own."""
    frame = parameters(record)
    return list(dict.fromkeys(frame["module"][frame["shape"].map(len).gt(1)]))


def _inside(names: Iterable[str]) -> dict[str, set[str]]:
    """Return of each module around some the paths from it to these."""
    found: dict[str, set[str]] = {}
    for name in names:
        for outer in _around(name):
            found.setdefault(outer, set()).add(name[len(outer) + 1 :])
    return found


def _upward(name: str) -> Iterator[str]:
    yield from (name, *_around(name), "")


def _around(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _values(layer: pd.Series, shape: Sequence[int]) -> float:
    """Return of how many numbers a layer takes one mean or variance."""
    kind, channels, rank = layer["norm"], int(layer["axis"]), len(shape)
    if rank < 2:
        return np.nan
    if kind in ("layer", "rms"):
        last = max(int(layer["ndim"]), 1)
        return float(shape[1] if channels == 1 and last < 2 else prod(shape[-last:]))
    if kind == "batch":
        return prod(shape) / max(shape[channels], 1)
    if kind == "group":
        return float(shape[1] / max(layer["groups"], 1) * prod(shape[2:]))
    digits = [int(c) for c in str(layer["class"]) if c.isdigit()]
    if kind == "instance" and digits:  # layers of graphs take their areas from elsewhere
        return float(prod(shape[2:] if rank > digits[0] + 1 else shape[1:]))
    return np.nan


def _structure(record: Record) -> Mapping[str, object]:
    found = record.runs[0].get("structure") if record.runs else None
    return found if isinstance(found, Mapping) else {}


def _rows(record: Record, name: str, columns: Sequence[str]) -> pd.DataFrame:
    rows = _structure(record).get(name)
    frame = pd.DataFrame(rows if isinstance(rows, list) else []).reindex(columns=list(columns))
    numbers = [column for column in columns if column in _NUMBERS]
    return frame.assign(**{column: pd.to_numeric(frame[column], errors="coerce") for column in numbers})
