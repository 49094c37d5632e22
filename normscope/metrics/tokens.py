"""Tokens and norms of residual blocks: massive activations, and where each norm stands."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd

from normscope.core.record import Record
from normscope.metrics import structure, tables

TOP = 3
_QK = re.compile(r"(^|\.)([qk]_?norm|query_norm|key_norm|norm_[qk]|[qk]_layernorm|[qk]_ln)$")


def peaks(record: Record) -> pd.DataFrame:
    """Return the largest values at the inputs of layer and RMS norms, at the last sampled step that is finite.

    Args:
        record: record of one run.

    Returns:
        A row a site and rank, the largest |value| first: site, step, value, ratio (|value| over the median magnitude),
        token (position in the sequence) and channel.
    """
    middle, rows = tables.table(record, "middle", slot="input"), []
    for rank in range(1, TOP + 1):
        names = (f"peak{rank}", f"peak{rank}.token", f"peak{rank}.channel")
        value, token, channel = (tables.table(record, name, slot="input") for name in names)
        for site in value:
            series = value[site].replace([np.inf, -np.inf], np.nan).dropna()
            if len(series) and series.iloc[-1] != 0:
                step, found = int(series.index[-1]), float(series.iloc[-1])
                usual = float(middle[site].get(step, np.nan))
                ratio = abs(found) / usual if usual > 0 else np.inf
                rows.append((site, step, found, ratio, int(token[site][step]), int(channel[site][step])))
    frame = pd.DataFrame(rows, columns=["site", "step", "value", "ratio", "token", "channel"])
    return frame.sort_values("value", key=np.abs, ascending=False, kind="stable", ignore_index=True)


def placements(record: Record) -> dict[str, str]:
    """Return where each layer or RMS norm stands around the branches of residual blocks.

    A norm whose output is added into a later norm's input is "post" where it takes a sum itself, behind the addition,
    and "branch" where it takes a layer's output, before the addition; one that takes a sum and is not added is "pre".
    Where a block has norms before and behind its branches both are "peri". Norms of one name in blocks alike count as
    most of them do. Outside of blocks, a norm before them is "first" and one behind them "final"; norms of queries and
    keys are "qk".

    Args:
        record: record of one run.

    Returns:
        Module to "pre", "post", "branch", "peri", "first", "final" or "qk"; without norms that stand elsewhere.
    """
    frame = record.sites.reindex(columns=["site", "module", "slot", "takes", "added"])
    frame = frame[frame["slot"] == "placement"].drop_duplicates("site", keep="last").set_index("module")
    takes = {str(name): str(kind) for name, kind in frame["takes"].items()}
    added = {str(name): list(names) for name, names in frame["added"].items() if isinstance(names, list)}
    entered = {source for name in takes if takes[name] == "norm" for source in added.get(name, [])}
    alone = {name: "qk" for name in takes if _QK.search(name)}
    for name in takes:
        for source in added.get(name, []) if takes[name] == "sum" else []:
            if takes.get(source) == "layer":
                alone.setdefault(source, "branch")
            elif source not in entered:
                alone |= {source: "post", name: "post"}
    for name, kind in takes.items():
        if kind in ("sum", "norm"):
            alone.setdefault(name, "pre")
    alone = {name: alone[name] for name in takes if name in alone}  # in order of execution
    return _in_blocks(alone, [str(name) for name in structure.norms(record).index])


def _in_blocks(alone: dict[str, str], norms: Iterable[str]) -> dict[str, str]:
    """Settle norms of one role alike, and name those of blocks that have both, and those outside of blocks."""
    roles: dict[str, list[str]] = {}
    for name in alone:
        roles.setdefault(_role(name), []).append(name)
    kinds = {role: [alone[name] for name in names] for role, names in roles.items()}
    found = {name: max(kinds[role], key=kinds[role].count) for name in norms if (role := _role(name)) in kinds}
    beside: dict[str, set[str]] = {}
    for name, kind in found.items():
        beside.setdefault(name.rpartition(".")[0], set()).add(kind)
    for name, kind in found.items():
        if kind in ("pre", "branch") and {"pre", "branch"} <= beside[name.rpartition(".")[0]]:
            found[name] = "peri"
    order = list(alone)
    for name in [name for name in order if found[name] == "pre" and _role(name) == name]:
        around = name.rpartition(".")[0]
        inside = [order.index(other) for other in order if _role(other) != other and other.startswith(around)]
        if inside:
            found[name] = "first" if order.index(name) < inside[0] else "final"
    return found


def _role(name: str) -> str:
    """Return a path without the number of its block, the first in it."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name, count=1)
