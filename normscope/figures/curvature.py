"""Pictures of the Hessian: sharpness, spectrum, outliers, and how layers share the curvature."""

from __future__ import annotations

import numpy as np
import pandas as pd

from normscope.core.figure import Figure
from normscope.core.record import Record
from normscope.figures.frames import curve, over_depth, tidy
from normscope.metrics import curvature

_EDGE, _HELD = "edge of stability", "at the weights"
_NAMED = "layer named in the finding"
_FLOOR = 1e-8  # of the largest density, below which nothing is drawn
_KERNEL = 0.01  # of the width of a spectrum: that of a few steps of Lanczos is a few lines


def _lines(series: dict[str, pd.Series], columns: tuple[str, ...]) -> pd.DataFrame:
    known = {name: values[np.isfinite(values)] for name, values in series.items()}
    return tidy((curve(columns, values.index, values.to_numpy(), name) for name, values in known.items()), columns)


def _sharpness(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    del sites  # the picture is of the whole model
    frame, plain = curvature.stability(record), curvature.snapshots(record)
    scaled = plain["preconditioned"]
    of = {"largest eigenvalue of H": plain["sharpness"]}
    if scaled.notna().any():
        of = {"largest eigenvalue of P⁻¹H": scaled} | of
    return _lines(of | {_EDGE: frame["edge"]}, SHARPNESS.columns)


def _spectrum(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    """The density at the first and the last snapshot."""
    del sites
    parts, found = [], curvature.spectra(record)
    for step in dict.fromkeys([*list(found)[:1], *list(found)[-1:]]):
        nodes, weights = found[step]
        kernel = _KERNEL * max(float(np.ptp(nodes)), float(np.abs(nodes).max()), np.finfo(float).tiny)
        grid, values = curvature.density(nodes, weights, variance=kernel**2)
        shown = np.where(values > _FLOOR * values.max(), values, np.nan)
        parts.append(curve(SPECTRUM.columns, grid, shown, f"step {step}"))
    return tidy(parts, SPECTRUM.columns)


def _outliers(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    del sites
    return _lines({"λ₁ / λ_K": curvature.outlier_ratio(record)}, OUTLIERS.columns)


def _shares(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    del sites
    energy, negative = curvature.snapshots(record)["energy"], curvature.negative_mass(record)
    of = {"of the squared gradient, along the K steepest": energy, "of the curvature, negative": negative}
    return _lines(of, SHARES.columns)


def _layers(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    traces = curvature.layer_traces(record).rename(columns=lambda module: f"{module}/output")
    pointed = tuple(f"{site.rpartition('/')[0]}/output" for site in sites)
    return over_depth(traces, pointed, LAYERS.columns, _NAMED)


def _path(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    del sites
    frame = curvature.snapshots(record)
    of = {"highest": frame["loss_high"], "lowest": frame["loss_low"]}
    lines = _lines(of, PATH.columns)
    return tidy([lines, _lines({_HELD: frame["held_loss"]}, PATH.columns)], PATH.columns) if len(lines) else lines


SHARPNESS = Figure(
    id="curvature.sharpness",
    title="Sharpness against the edge of stability",
    explains=("curvature.edge-of-stability",),
    prepare=_sharpness,
    columns=("step", "eigenvalue", "curve"),
    x_label="step",
    y_label="largest eigenvalue",
    reading="Above the dashed line steps along the sharpest direction overshoot more each time. For Adam the line is "
    "of P⁻¹H, the Hessian as its second moment scales it.",
    log_y=True,
    references=(_EDGE,),
)
SPECTRUM = Figure(
    id="curvature.spectrum",
    title="Eigenvalues of the Hessian",
    explains=("curvature.negative",),
    prepare=_spectrum,
    columns=("eigenvalue", "density", "step"),
    x_label="eigenvalue",
    y_label="density",
    reading="The bulk at 0 are flat directions, single peaks far to the right the steepest ones; what lies left of 0 "
    "curves downwards. From one random vector, so heights are rough and the ends are sharp.",
    log_y=True,
)
OUTLIERS = Figure(
    id="curvature.outliers",
    title="How far the largest eigenvalue stands out",
    explains=("curvature.outliers",),
    prepare=_outliers,
    columns=("step", "ratio", "curve"),
    x_label="step",
    y_label="largest over K-th eigenvalue",
    reading="K is the number of classes, where the snapshot could afford it. Networks with BatchNorm stay near 2.",
)
SHARES = Figure(
    id="curvature.shares",
    title="Where the gradient points and what curves downwards",
    explains=(),
    prepare=_shares,
    columns=("step", "share", "curve"),
    x_label="step",
    y_label="share",
    reading="A gradient that lies in the few steepest directions goes up and down their walls; negative curvature near "
    "a half is that of a saddle, near 0 that of a minimum.",
)
LAYERS = Figure(
    id="curvature.layers",
    title="Trace of the Hessian by layer",
    explains=("curvature.trace-dominated",),
    prepare=_layers,
    columns=("layer", "trace", "step", "site"),
    x_label="layer with parameters, in order of execution",
    y_label="trace of its block",
    reading="The sum of a layer's eigenvalues: level where all layers learn alike. Small or negative values are noise.",
    rules=(_NAMED,),
)
PATH = Figure(
    id="curvature.path",
    title="Loss along the gradient",
    explains=(),
    prepare=_path,
    columns=("step", "loss", "curve"),
    x_label="step",
    y_label="loss on the held batch",
    reading="Half to four learning rates along the gradient of the same batch: a narrow band below the dashed line is "
    "a smooth loss, a band that rises above it one that such steps overshoot.",
    references=(_HELD,),
)
