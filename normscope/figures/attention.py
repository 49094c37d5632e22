"""Pictures of attention: logits and entropy of heads over steps and layers, and log Z of the output."""

from __future__ import annotations

import numpy as np
import pandas as pd

from normscope.core.figure import Figure
from normscope.core.record import Record
from normscope.figures.frames import by_step, curve, tidy
from normscope.metrics import attention, tables

_LIMIT, _ALLOWED = "threshold", "allowed by queries and keys"


def _logits(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    """Largest logits of the layers with the largest; where no score was seen, what queries and keys allow."""
    columns, seen = LOGITS.columns, attention.logits(record)
    values = seen if seen.shape[1] else attention.ceilings(record)
    shown = by_step(values, _first(values, sites, largest=True), columns)
    if not len(shown):
        return shown
    if not seen.shape[1]:
        return shown.assign(site=shown["site"] + f", {_ALLOWED}")
    if not shown["logit"].max() > attention.LARGE / 2:
        return shown  # the threshold would press the curves flat
    return tidy([shown, curve(columns, [shown["step"].min(), shown["step"].max()], attention.LARGE, _LIMIT)], columns)


def _entropies(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    values = attention.entropies(record)
    return by_step(values, _first(values, sites, largest=False), ENTROPIES.columns)


def _heads(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    """The largest logit of each head of each layer, at the first and the last step that kept them."""
    del sites  # the picture is of the whole model
    parts, columns = [], HEADS.columns
    for layer, (site, (steps, values)) in enumerate(tables.arrays(record, "logit", slot=attention.SLOT).items()):
        for i in dict.fromkeys((0, len(steps) - 1)):
            names = [f"head {head}" for head in range(values.shape[1])]
            parts.append(curve(columns, np.full(len(names), layer), values[i], f"step {steps[i]}", site, names))
    return tidy(parts, columns)


def _level(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    del sites  # one output for the whole model
    series = attention.log_z(record)
    return (
        curve(LEVEL.columns, series.index, series.to_numpy(float), "log Z") if len(series) else tidy([], LEVEL.columns)
    )


def _first(values: pd.DataFrame, sites: tuple[str, ...], *, largest: bool) -> list[str]:
    """Return the sites of a finding, then the others by their late values."""
    late = tables.late_medians(values).set_index("site")["value"].sort_values(ascending=not largest, kind="stable")
    return [*sites, *map(str, late.index)]


LOGITS = Figure(
    id="attention.logits",
    title="Largest attention logit of a layer's heads",
    explains=("attention.logits-grow",),
    prepare=_logits,
    columns=("step", "logit", "site"),
    x_label="step",
    y_label="scale q·k, before bias and mask",
    reading="A curve that rises without end ends in one-hot attention; one that has come to rest may stay where it is.",
    references=(_LIMIT,),
)
HEADS = Figure(
    id="attention.heads",
    title="Largest attention logit of each head",
    explains=(),
    prepare=_heads,
    columns=("layer", "logit", "step", "site", "head"),
    x_label="layer that attends, in order of execution",
    y_label="scale q·k, before bias and mask",
    reading="Each point is a head. A single head far above the others is what QK-clip rescales.",
    mark="point",
)
ENTROPIES = Figure(
    id="attention.entropy",
    title="Attention entropy of a layer's median head",
    explains=("attention.entropy-collapse",),
    prepare=_entropies,
    columns=("step", "entropy", "site"),
    x_label="step",
    y_label="entropy over its largest value",
    reading="1: all keys alike; 0: a single key. A layer that falls to 0 while the loss does not has collapsed.",
)
LEVEL = Figure(
    id="attention.log-z",
    title="Level of the output's logits",
    explains=("attention.output-logits",),
    prepare=_level,
    columns=("step", "log_z", "curve"),
    x_label="step",
    y_label="mean of log sum exp",
    reading="The loss does not see this level; a drift costs digits in half precision.",
)
