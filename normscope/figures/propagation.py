"""Pictures of signal and gradient through depth."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from normscope.core.figure import Figure
from normscope.core.record import Record
from normscope.figures.frames import at_slot, by_step, curve, last_array, outputs, over_depth, rules, tidy
from normscope.metrics import propagation, tables

_DEPTH = ("layer", "magnitude", "step", "site")
_LAYERS = "comparable layer, in order of execution"
_NAMED = "layer named in the finding"
_BEGAN = "first NaN or infinity seen"
_HALF = "as large as the variance"
_BEFORE, _AFTER, _LEADING = 60, 6, 3


def _depth(record: Record, sites: tuple[str, ...], role: str, measure: str) -> pd.DataFrame:
    """Magnitudes at the layers that may be compared, rms at all where those are too few for a curve."""
    magnitudes = propagation.magnitudes(record, role=role, measure=measure)
    if magnitudes.shape[1] < propagation.MIN_LAYERS:
        magnitudes = tables.table(record, "rms", role=role).drop(columns="/output", errors="ignore")
    return over_depth(magnitudes, sites, _DEPTH, _NAMED)


def _dead(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    """Dead fractions of the outputs, or of their gradients where the worst layer has more of these."""
    columns = DEAD.columns
    values, gradients = (
        by_step(dead, outputs(sites, dead), columns)
        for dead in (tables.table(record, "dead", role=role) for role in ("value", "gradient"))
    )
    gradients = gradients.assign(site=gradients["site"] + ", gradient") if len(gradients) else gradients
    ends = [frame.groupby("site", sort=False)["dead"].last().iloc[:1].sum() for frame in (values, gradients)]
    return gradients if ends[1] > ends[0] else values


def _peaks(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    values = tables.table(record, "peak1", slot="input").abs()
    return by_step(values, at_slot(sites, "input", values), PEAKS.columns)


def _saturated(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    saturated = tables.table(record, "saturated")
    return by_step(saturated, outputs(sites, saturated), SATURATED.columns)


def _eps(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    columns, weights = EPS_WEIGHT.columns, tables.table(record, "eps_weight.q50", slot="input")
    shares = by_step(weights, at_slot(sites, "input", weights), columns)
    if not len(shares):
        return shares
    return tidy([shares, curve(columns, [shares["step"].min(), shares["step"].max()], 0.5, _HALF)], columns)


def _onset(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    """Largest values of the layer where NaN came first and of those that lead to it, up to that step."""
    columns, broken = NON_FINITE.columns, propagation.nonfinite_sites(record)
    named = broken[broken["site"].isin(sites)] if broken["site"].isin(sites).any() else broken
    if not len(named):
        return tidy([], columns)
    step, site, role = named.iloc[0][["step", "site", "role"]]
    sizes = tables.table(record, "max", role=role)
    # a gradient reaches a layer from the one executed after it
    order = list(sizes.columns)[:: 1 if role == "value" else -1]
    here = order.index(site) if site in order else 0
    near = order[max(0, here - _LEADING) : here + 1][::-1]
    at = int(np.searchsorted(sizes.index, step))
    window = sizes.iloc[max(0, at - _BEFORE) : at + _AFTER + 1]
    return tidy([by_step(window, near, columns), rules(columns, step, _BEGAN)], columns)


def _channels(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    columns = OUTLIERS.columns
    for site in outputs(sites, [item.site for item in record.channels]):
        step, values = last_array(record, site, "rms", "output*")
        if len(values):
            ends, middle = [0, len(values) - 1], float(np.nanmedian(values))
            shown = curve(columns, np.arange(len(values)), values, f"{site} at step {step}")
            return tidy([shown, curve(columns, ends, middle, "median channel")], columns)
    return tidy([], columns)


SIGNAL = Figure(
    id="propagation.signal-depth",
    title="Signal through depth",
    explains=("propagation.signal-exploding",),
    prepare=partial(_depth, role="value", measure="rms"),
    columns=_DEPTH,
    x_label=_LAYERS,
    y_label="rms of the output",
    reading="A curve that keeps climbing multiplies the signal at every layer; a level one is healthy.",
    log_y=True,
    rules=(_NAMED,),
)
DIFFERENCES = Figure(
    id="propagation.differences-depth",
    title="What is left of the differences between inputs",
    explains=("propagation.signal-vanishing",),
    prepare=partial(_depth, role="value", measure="std"),
    columns=_DEPTH,
    x_label=_LAYERS,
    y_label="standard deviation of the output, over inputs",
    reading="A curve that keeps falling: deep layers see nearly the same whatever the input is.",
    log_y=True,
    rules=(_NAMED,),
)
GRADIENT = Figure(
    id="propagation.gradient-depth",
    title="Gradient through depth",
    explains=("propagation.gradient-exploding", "propagation.gradient-vanishing"),
    prepare=partial(_depth, role="gradient", measure="norm"),
    columns=_DEPTH,
    x_label=_LAYERS,
    y_label="norm of the gradient of the output",
    reading="The gradient travels from right to left; a level curve reaches the first layers unchanged.",
    log_y=True,
    rules=(_NAMED,),
)
DEAD = Figure(
    id="propagation.dead-channels",
    title="Dead channels of the worst layers",
    explains=("propagation.dead-units",),
    prepare=_dead,
    columns=("step", "dead", "site"),
    x_label="step",
    y_label="fraction of channels that are exactly 0",
    reading="A channel that is 0 for a whole batch gets no gradient: it does not recover by itself.",
)
SATURATED = Figure(
    id="propagation.saturation",
    title="Saturated activations of the worst layers",
    explains=("propagation.saturated-units",),
    prepare=_saturated,
    columns=("step", "saturated", "site"),
    x_label="step",
    y_label="fraction within 1 % of the range's ends",
    reading="At the ends of its range an activation is flat, and the gradient that passes it is close to 0.",
)
PEAKS = Figure(
    id="propagation.peaks",
    title="Largest value at the input of norms",
    explains=("propagation.massive-activations",),
    prepare=_peaks,
    columns=("step", "magnitude", "site"),
    x_label="step",
    y_label="magnitude of the largest value",
    reading="Values that come up within some steps and then stay are massive activations; growth without end is not.",
    log_y=True,
)
NON_FINITE = Figure(
    id="propagation.onset",
    title="Up to the first NaN or infinity",
    explains=("propagation.non-finite",),
    prepare=_onset,
    columns=("step", "max", "site"),
    x_label="step",
    y_label="largest magnitude",
    reading="Where it came, and what leads to it: growth is an overflow, level curves a division or logarithm of 0.",
    log_y=True,
    rules=(_BEGAN,),
)
OUTLIERS = Figure(
    id="propagation.channel-sizes",
    title="Size of every channel",
    explains=("propagation.outlier-channels",),
    prepare=_channels,
    columns=("channel", "rms", "curve"),
    x_label="channel",
    y_label="rms of the channel",
    reading="Points far above the rest are outliers: they set the scale for quantization and for norms over channels.",
    log_y=True,
    mark="point",
    references=("median channel",),
)
EPS_WEIGHT = Figure(
    id="propagation.eps-weight",
    title="What eps contributes to the denominator",
    explains=("propagation.eps-dominates",),
    prepare=_eps,
    columns=("step", "eps_weight", "site"),
    x_label="step",
    y_label="eps / (variance + eps), median",
    reading="Near 0 the layer normalizes; near 1 it only divides by a constant, the root of eps.",
    references=(_HALF,),
)
