"""Pictures of the eigenvalues of layers' inputs and gradients."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from normscope.core.estimate import Status
from normscope.core.figure import Figure
from normscope.core.record import Record
from normscope.figures.frames import MOST_CURVES, by_step, curve, over_depth, tidy
from normscope.metrics import conditioning

_LAYERS = "linear or convolutional layer, in order of execution"
_NAMED = "layer named in the finding"
MOST_CELLS = 128  # features of a map of correlations, evenly spaced where there are more
_ROUNDING = 1e-8  # of the largest eigenvalue; what is smaller is rounding in float32


def _kappa(record: Record, sites: tuple[str, ...], factor: str) -> pd.DataFrame:
    judged = conditioning.conditions(record, factor=factor)
    few = judged.loc[[status is Status.FEW_SAMPLES for status in judged["status"]], "site"]
    kappa = conditioning.condition_numbers(record, factor=factor, carried=True).drop(columns=few, errors="ignore")
    return _depth(kappa, sites, KAPPA.columns, "input" if factor == "input" else "output")


def _curvature(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    return _depth(conditioning.fisher(record).ffill(), sites, CURVATURE.columns, "output")


def _rank(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    return _depth(conditioning.effective_rank(record).ffill(), sites, RANK.columns, "input")


def _largest(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    """The layers with the smallest, two middle and the largest curvature at the end, where no finding names others."""
    curvature = conditioning.fisher(record)
    last = curvature.ffill().iloc[-1] if len(curvature) else pd.Series(dtype=float)
    ordered = [str(site) for site in last.dropna().sort_values().index]
    places = np.linspace(len(ordered) - 1, 0, min(MOST_CURVES, len(ordered))).astype(int)
    return by_step(curvature, [*sites, *(ordered[place] for place in places)], LARGEST.columns)


def _spectra(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    """Eigenvalues of the inputs named, else of the first, middle and last hidden layer, when they were last kept."""
    columns, kept = SPECTRA.columns, conditioning.spectra(record)
    hidden = [site for site in conditioning.hidden(record) if site in kept] or list(kept)
    places = dict.fromkeys((0, (len(hidden) - 1) // 2, len(hidden) - 1) if hidden else ())
    parts = []
    for site in [*(site for site in sites if site in kept), *(hidden[place] for place in places)][: MOST_CURVES - 1]:
        steps, values = kept[site]
        finite = np.flatnonzero(np.isfinite(values).all(axis=1))
        if len(finite):
            last = values[finite[-1]]
            shown = np.where(last > _ROUNDING * last[0], last, np.nan)
            ranks = np.arange(1, len(shown) + 1)
            parts.append(curve(columns, ranks, shown, f"{site}, step {steps[finite[-1]]}"))
    return tidy(parts, columns)


def _correlations(record: Record, sites: tuple[str, ...]) -> pd.DataFrame:
    """Correlations of one layer's inputs: of the site named, else where they are strongest on average."""
    stored = {site: conditioning.correlation(record, site) for site in conditioning.correlated(record)}
    known = [site for site in sites if site in stored]
    strongest = sorted(stored, key=lambda site: float(np.nan_to_num(np.abs(stored[site])).mean()), reverse=True)
    if not stored:
        return pd.DataFrame(columns=list(CORRELATIONS.columns))
    site = [*known, *strongest][0]
    width = len(stored[site])
    shown = np.unique(np.linspace(0, width - 1, min(width, MOST_CELLS)).astype(int))
    across, down = np.meshgrid(shown.astype(float), shown.astype(float))
    return curve(CORRELATIONS.columns, across.ravel(), down.ravel(), site, stored[site][np.ix_(shown, shown)].ravel())


def _depth(values: pd.DataFrame, sites: tuple[str, ...], columns: tuple[str, ...], slot: str) -> pd.DataFrame:
    """Values over depth, named by the layers' outputs, so that a site of a finding is found whatever its slot."""
    named = values.rename(columns=lambda site: f"{str(site).rpartition('/')[0]}/output")
    pointed = tuple(f"{site.rpartition('/')[0]}/output" for site in sites)
    return over_depth(named, pointed, columns, _NAMED).replace({"site": {"/output$": f"/{slot}"}}, regex=True)


KAPPA = Figure(
    id="conditioning.inputs-depth",
    title="How unequal the directions of a layer's input are",
    explains=("conditioning.ill-conditioned-inputs",),
    prepare=partial(_kappa, factor="input"),
    columns=("layer", "kappa", "step", "site"),
    x_label=_LAYERS,
    y_label="largest over median eigenvalue, κ₅₀",
    reading="Gradient descent needs about as many steps as this number: a level curve is healthy, one that climbs with "
    "depth calls for normalization. Gaps: the median eigenvalue is zero. Left out: layers with less than two samples a "
    "feature.",
    log_y=True,
    rules=(_NAMED,),
)
GRADIENT = Figure(
    id="conditioning.gradients-depth",
    title="How unequal the directions of a layer's gradient are",
    explains=("conditioning.ill-conditioned-gradients",),
    prepare=partial(_kappa, factor="gradient"),
    columns=("layer", "kappa", "step", "site"),
    x_label=_LAYERS,
    y_label="largest over median eigenvalue, κ₅₀",
    reading="It rises while a run fits its data; high from the first step on, all samples ask for the same change. "
    "Gaps: the median eigenvalue is zero.",
    log_y=True,
    rules=(_NAMED,),
)
CURVATURE = Figure(
    id="conditioning.curvature-depth",
    title="Curvature of every layer",
    explains=("conditioning.curvature-dominated",),
    prepare=_curvature,
    columns=("layer", "curvature", "step", "site"),
    x_label=_LAYERS,
    y_label="largest eigenvalue of the Fisher matrix, estimated",
    reading="The highest point limits the learning rate of all layers, those far below it hardly move.",
    log_y=True,
    rules=(_NAMED,),
)
RANK = Figure(
    id="conditioning.rank-depth",
    title="Directions that a layer's input uses",
    explains=("conditioning.rank-collapse",),
    prepare=_rank,
    columns=("layer", "rank", "step", "site"),
    x_label=_LAYERS,
    y_label="effective rank, (Σλ)² / Σλ²",
    reading="A curve that falls towards 1 with depth: deep layers see one direction, whatever the input is.",
    log_y=True,
    rules=(_NAMED,),
)
LARGEST = Figure(
    id="conditioning.curvature-steps",
    title="Curvature through the run",
    explains=(),
    prepare=_largest,
    columns=("step", "curvature", "site"),
    x_label="step",
    y_label="largest eigenvalue of the Fisher matrix, estimated",
    reading="A curve that climbs asks for a smaller learning rate, most of all shortly before a spike of the loss.",
    log_y=True,
)
SPECTRA = Figure(
    id="conditioning.spectra",
    title="Eigenvalues of the inputs",
    explains=(),
    prepare=_spectra,
    columns=("rank", "eigenvalue", "curve"),
    x_label="rank of the eigenvalue",
    y_label="eigenvalue of the second moment",
    reading="A flat curve uses all directions alike; a steep one is ruled by its first few, a cliff marks unused ones.",
    log_y=True,
)
CORRELATIONS = Figure(
    id="conditioning.correlations",
    title="Correlations between the features of a layer's input",
    explains=(),
    prepare=_correlations,
    columns=("feature", "other", "layer", "correlation"),
    x_label="feature",
    y_label="feature",
    reading="White off the diagonal is whitened; blocks of color are features that say the same. Where no finding "
    "names a layer, it is the one whose features agree most. Of a feature that does not vary nothing is shown.",
    mark="cell",
)
