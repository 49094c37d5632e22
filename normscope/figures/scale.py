"""Pictures of scale-invariant weights: how invariant they are, how they turn, and what their norms do."""

from __future__ import annotations

import numpy as np
import pandas as pd

from normscope.core.figure import Figure
from normscope.core.record import Record
from normscope.figures.frames import MOST_CURVES, by_step, curve, tidy
from normscope.metrics import scale, tables

_FED, _OTHER, _LIMIT = "before a normalization layer", "other weights", "scale-invariant below"
_BALANCED = "in equilibrium"


def _defects(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    """Defects of all weights, in order of execution; those of the finding are among them."""
    del sites  # the picture is of the whole model
    columns, frame = DEFECTS.columns, scale.invariance(record)
    frame = frame.assign(at=np.arange(len(frame)), feeds=scale.weights(record)["feeds"])
    frame = frame[np.isfinite(frame["defect"])]
    if not len(frame):
        return tidy([], columns)
    parts = []
    for name, part in ((_FED, frame[frame["feeds"] != ""]), (_OTHER, frame[frame["feeds"] == ""])):
        parts.append(curve(columns, part["at"].to_numpy(), part["defect"].to_numpy(), name, part.index, part["unit"]))
    ends = [frame["at"].iloc[0], frame["at"].iloc[-1]]
    return tidy([*parts, curve(columns, ends, scale.PARTIAL, _LIMIT, "", "")], columns)


def _chosen(record: Record, sites: tuple[str, ...]) -> tuple[str, ...]:
    """Return the sites of a finding; without one the first, middle and last scale-invariant weight."""
    if sites:
        return sites
    units = scale.invariance(record)["unit"]
    known = list(map(str, units.index[units.isin(("row", "block", "tensor"))]))
    return tuple(dict.fromkeys(known[i] for i in (0, len(known) // 2, -1))) if known else ()


def _moving(record: Record, sites: tuple[str, ...], what: str) -> pd.DataFrame:
    """One quantity of `metrics.scale.motion` by step, a column a site."""
    moves = scale.motion(record)
    return pd.DataFrame({site: moves[site][what] for site in dict.fromkeys(sites) if site in moves}).sort_index()


def _rates(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    sites = _chosen(record, sites)
    return by_step(_moving(record, sites, "effective"), sites, RATES.columns)


def _norms(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    return by_step(tables.table(record, "norm", slot="*"), _chosen(record, sites), NORMS.columns)


def _angles(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    """Angles of the worst weights, and what the settings of the worst imply."""
    sites, columns = _chosen(record, sites), ANGLES.columns
    moving = _moving(record, sites, "angle")
    angles = by_step(moving, [str(site) for site in moving.columns[: MOST_CURVES - 1]], columns)
    if not len(angles):
        return angles
    expected = by_step(_moving(record, sites, "expected"), angles["site"].iloc[:1], columns)
    return tidy([angles, expected.assign(site=_BALANCED)], columns)


def _gains(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    columns, parts = GAINS.columns, []
    for suffix, name in (("max", "largest"), ("q50", "median"), ("min", "smallest")):
        values = tables.table(record, f"value.{suffix}", slot="*")
        known = [site for site in sites if site in values][:1]
        parts.append(by_step(values, known, columns).assign(gain=name))
    return tidy(parts, columns)


def _biases(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    norms = tables.table(record, "norm", slot="*", role="gradient")
    shown = [name for site in sites[:2] for name in (site, f"{tables.module_of(site)}/weight")]
    return by_step(norms, shown, BIASES.columns)


DEFECTS = Figure(
    id="scale.defects",
    title="How far each weight is from scale invariance",
    explains=("scale.invariance",),
    prepare=_defects,
    columns=("weight", "defect", "kind", "site", "unit"),
    x_label="weight, in order of execution",
    y_label="gradient along the weight, of a random direction's",
    reading="Far below the dashed line only the direction of a weight matters; at 1 its size matters like any other's.",
    log_y=True,
    mark="point",
    references=(_LIMIT,),
)
RATES = Figure(
    id="scale.effective-rate",
    title="Effective learning rate",
    explains=("scale.effective-rate",),
    prepare=_rates,
    columns=("step", "rate", "site"),
    x_label="step",
    y_label="learning rate over |w|² (SGD) or |w| (Adam, Muon)",
    reading="The schedule divided by what the norm has become: a curve that falls on its own has lost its steps.",
    log_y=True,
)
ANGLES = Figure(
    id="scale.angle",
    title="Angle by which weights turn per step",
    explains=("scale.equilibrium",),
    prepare=_angles,
    columns=("step", "angle", "site"),
    x_label="step",
    y_label="angle in radians",
    reading="In equilibrium all weights of a group turn alike, by the dashed angle, whatever their size or gradient.",
    log_y=True,
    references=(_BALANCED,),
)
NORMS = Figure(
    id="scale.norms",
    title="Norm of the weights",
    explains=("scale.decay",),
    prepare=_norms,
    columns=("step", "norm", "site"),
    x_label="step",
    y_label="|w|",
    reading="Growth without end: steps add to the norm and nothing takes from it. Level: decay takes what steps add.",
)
GAINS = Figure(
    id="scale.gains",
    title="Gains of the worst layer",
    explains=("scale.gain-decay", "scale.gain-collapse"),
    prepare=_gains,
    columns=("step", "value", "gain"),
    x_label="step",
    y_label="gain over channels",
    reading="Gains that all drift to 0 follow a penalty, not the data; channels at 0 are switched off.",
)
BIASES = Figure(
    id="scale.biases",
    title="Gradient of biases and of the weights beside them",
    explains=("scale.bias-before-norm",),
    prepare=_biases,
    columns=("step", "norm", "site"),
    x_label="step",
    y_label="norm of the gradient",
    reading="A bias whose gradient is only rounding does nothing: the normalization after it takes it away.",
    log_y=True,
)
