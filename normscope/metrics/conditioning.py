"""Conditioning: how unequal the directions are in which a layer sees its input and gets its gradient.

F_k, the Fisher matrix of a layer's weight, is about T S_x (x) S_g (K-FAC), with S_x the second moment of its input over
rows, S_g that of the gradient of one sample's loss at its output, and T the rows of one sample (1 but for positions
and tokens). So eigenvalues multiply: gradient descent needs a step below 2 / lambda_max, and lambda_max / lambda steps
to move along a direction of eigenvalue lambda.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from normscope.core.errors import unknown_name
from normscope.core.estimate import Estimate, Status
from normscope.core.record import Record
from normscope.metrics import tables

PERCENTS = (50, 80, 90, 95, 100)
SPAN = 8  # units a feature of the data
ENOUGH = 2  # samples a feature from which eigenvalues are judged: with fewer the small ones are much too small
MIN_LAYERS = 3  # below, no layer is typical
ENDS = 3  # layers at either end over which a median is taken
_FACTORS = {"input": ("input", "value"), "gradient": ("output*", "gradient"), "patches": ("patches", "value")}
_ABOUT = ("moment", "covariance")
_SOURCE, _RANK = "huang2020layerwise", "daneshmand2020"


class Balance(NamedTuple):
    """How one layer's curvature stands out.

    Attributes:
        ratio: largest over median eigenvalue lambda_max(F) of the layers; n is their number.
        site: output of the layer with the largest.
        largest: its lambda_max(F).
        median: that of the median layer.
    """

    ratio: Estimate
    site: str
    largest: float
    median: float


class Collapse(NamedTuple):
    """How many directions are lost from the first hidden layers to the last ones.

    Attributes:
        ratio: effective rank of the inputs of the first three hidden layers (no more than the narrowest width, or the
            fewest samples less one, on the way let through) over that of the last three, medians; n is the number of
            layers.
        first: site of the first hidden layer.
        last: site of the last one.
        at_first: effective rank there.
        at_last: effective rank at the other end.
    """

    ratio: Estimate
    first: str
    last: str
    at_first: float
    at_last: float


def condition_number(eigenvalues: np.ndarray, percent: float, *, width: int, samples: int, rank: int) -> Estimate:
    """Return kappa_p = lambda_1 / lambda_k, k = ceil(p d / 100), of a d x d matrix.

    Args:
        eigenvalues: those that may be positive, descending.
        percent: p, in (0, 100]; 100 is the usual condition number.
        width: d.
        samples: samples from which the matrix was made.
        rank: eigenvalues that are not zero up to rounding.

    Returns:
        The estimate; without a value where lambda_k is zero, for lack of samples or of directions. Source:
        huang2020layerwise.

    >>> round(condition_number(np.array([8.0, 4.0, 2.0, 1.0]), 50, width=4, samples=9, rank=4).value, 3)
    2.0
    """
    index = math.ceil(percent * width / 100)
    if not np.isfinite(eigenvalues).all():
        return Estimate.missing(Status.NON_FINITE, _SOURCE)
    if index > rank:
        return Estimate.missing(Status.FEW_SAMPLES if samples <= index else Status.RANK_DEFICIENT, _SOURCE)
    return Estimate(float(eigenvalues[0] / eigenvalues[index - 1]), 0.0, n=samples, status=Status.EXACT, source=_SOURCE)


def series(record: Record, stat: str, *, factor: str = "input", about: str = "moment") -> pd.DataFrame:
    """Return what was stored of eigenvalues: a row a step, a column a site, in order of execution.

    Args:
        record: record of one run.
        stat: "max", "trace", "participation", "rank", "error" or "p50" to "p100".
        factor: "input", "gradient", or "patches" for the patches that convolutions see, where they were recorded.
        about: "moment" for the second moment, "covariance" for the one about the mean.

    Returns:
        NaN at steps at which another layer had its turn. An unknown factor or about is an ArgumentError.
    """
    slot, role = _place(factor)
    _check("about", about, _ABOUT)
    return tables.table(record, f"{about}.{stat}", slot=slot, role=role)


def spectra(
    record: Record, *, factor: str = "input", about: str = "moment"
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the stored eigenvalues by site: steps [n] and descending eigenvalues [n, k]."""
    slot, role = _place(factor)
    return tables.arrays(record, about, slot=slot, role=role)


def condition_numbers(
    record: Record, percent: int = 50, *, factor: str = "input", about: str = "moment", carried: bool = False
) -> pd.DataFrame:
    """Return kappa_p by step: a row a step, a column a site.

    Args:
        record: record of one run.
        percent: one of `PERCENTS`.
        factor: "input" or "gradient".
        about: "moment" or "covariance".
        carried: whether a layer keeps its last value until its next turn.

    Returns:
        NaN where it is undefined (see `conditions`) or was not measured.
    """
    small = series(record, f"p{percent}", factor=factor, about=about)
    large = series(record, "max", factor=factor, about=about).reindex_like(small)
    if carried:
        small, large = small.ffill(), large.ffill()
    return large / small.where(small > 0)


def conditions(
    record: Record, percent: int = 50, *, factor: str = "input", about: str = "moment", start: bool = False
) -> pd.DataFrame:
    """Return kappa_p of each layer, in the late window or at its first measurement.

    Args:
        record: record of one run.
        percent: one of `PERCENTS`.
        factor: "input" or "gradient".
        about: "moment" or "covariance".
        start: whether the first measurement is taken, not the late ones.

    Returns:
        Estimates by site (see `tables.estimates`), n the number of measurements, with columns samples and width. The
        status of a missing value says why: too few samples (less than `ENOUGH` a feature, where the sampling error of
        small eigenvalues is larger than they are), rank deficient, not estimated, not finite.
    """
    slot, role = _place(factor)
    largest = series(record, "max", factor=factor, about=about)
    kappa = condition_numbers(record, percent, factor=factor, about=about).reindex(columns=largest.columns)
    stored = series(record, f"p{percent}", factor=factor, about=about)
    samples, width = (tables.table(record, stat, slot=slot, role=role).median() for stat in ("samples", "width"))
    rows, statuses = [], []
    for site in map(str, largest):
        measured = kappa[site][largest[site].notna() | largest[site].abs().eq(np.inf)]
        window = measured.iloc[:1] if start else measured.tail(max(3, len(measured) // tables.LATE_FRACTION))
        status = Status.SAMPLED
        if site not in stored:
            status = Status.NOT_ESTIMATED
        elif samples[site] < ENOUGH * width[site]:
            status = Status.FEW_SAMPLES
        elif not len(window):
            status = Status.NON_FINITE
        elif window.isna().mean() > 0.5:
            status = Status.RANK_DEFICIENT
        value = float(window.median()) if status is Status.SAMPLED else np.nan
        rows.append((site, value, np.nan, len(window)))
        statuses.append(status)
    frame = tables.estimates(rows).assign(status=pd.Series(statuses, dtype=object))
    sites = frame["site"]
    return frame.assign(samples=samples.reindex(sites).to_numpy(), width=width.reindex(sites).to_numpy())


def effective_rank(
    record: Record, *, kind: str = "participation", factor: str = "input", about: str = "covariance"
) -> pd.DataFrame:
    """Return how many directions carry the variance: a row a step, a column a site.

    Args:
        record: record of one run.
        kind: "participation" for tr(S)^2 / |S|_F^2, which counts equal eigenvalues; "intrinsic" for tr(S) / lambda_max,
            which counts in units of the largest and is the smaller.
        factor: "input" or "gradient".
        about: "moment" or "covariance".

    Returns:
        Between 1 and the width; 0 where nothing varies. An unknown kind is an ArgumentError.
    """
    _check("kind", kind, ("participation", "intrinsic"))
    if kind == "participation":
        return series(record, "participation", factor=factor, about=about)
    trace, largest = (series(record, stat, factor=factor, about=about) for stat in ("trace", "max"))
    return (trace / largest).where(largest > 0, 0.0).where(largest.notna())


def fisher(record: Record, percent: int | None = None) -> pd.DataFrame:
    """Return T lambda_max(S_x) lambda_max(S_g) of each layer, or kappa_p(S_x) kappa_p(S_g): a row a step.

    The Fisher matrix of a layer's weight is their Kronecker product where input and gradient are independent; else it
    is an approximation, usually within a factor of a few. Of a convolution only channels are seen, not its kernel.

    Args:
        record: record of one run.
        percent: None for the largest eigenvalue; one of `PERCENTS` for the condition number.

    Returns:
        A column a layer, named by its output, in order of execution. Source: martens2015.
    """
    rows = tables.table(record, "samples", role="gradient") / tables.table(record, "batch", role="gradient")
    sides = []
    for factor in ("input", "gradient"):
        values = series(record, "max", factor=factor)
        if percent is not None:
            values = condition_numbers(record, percent, factor=factor)
        sides.append(values.rename(columns=lambda site: f"{str(site).rpartition('/')[0]}/output"))
    inputs, gradients = sides
    product = inputs.reindex(columns=gradients.columns) * gradients
    return product if percent is not None else product * rows.reindex(columns=product.columns)


def balance(record: Record) -> Balance:
    """Return how far the layer with the largest curvature is from the median layer, by their late estimates.

    Args:
        record: record of one run.

    Returns:
        The balance; a status instead of a ratio below three layers.
    """
    frame = tables.late_medians(fisher(record))
    values = frame.set_index("site")["value"] if len(frame) else pd.Series(dtype=float)
    values = values[(values > 0) & np.isfinite(values)]
    if len(values) < MIN_LAYERS:
        status = Status.FEW_SAMPLES if len(frame) else Status.NOT_RECORDED
        return Balance(Estimate.missing(status, "martens2015"), "", np.nan, np.nan)
    largest, median = float(values.max()), float(values.median())
    ratio = Estimate(largest / median, np.nan, n=len(values), source="martens2015")
    return Balance(ratio, str(values.idxmax()), largest, median)


def hidden(record: Record) -> list[str]:
    """Return the inputs of the layers behind the first one, in order of execution: what the network makes itself.

    Layers that see the data as well, as a projection beside the first one, count as first: their input is as long, as
    wide and has the same eigenvalue at the start.
    """
    largest = series(record, "max")
    first = largest.apply(lambda column: column.dropna().iloc[0] if column.notna().any() else np.nan)
    return [str(site) for site in largest.columns[1:] if first[site] != first.iloc[0]]


def spanned(record: Record) -> list[str]:
    """Return those of `hidden` that the data can fill: behind a linear layer on d features at most `SPAN` d wide.

    A few features, as coordinates in the plane, bend into many units without ever filling them: there the median
    eigenvalue says what the data are, not what the network does to them.
    """
    sites, width = hidden(record), tables.table(record, "width", slot="input").median()
    kinds, first = tables.attributes(record)["class"], str(next(iter(series(record, "max")), ""))
    if kinds.get(first) != "Linear":
        return sites
    return [site for site in sites if width[site] <= SPAN * width[first]]


def collapse(record: Record, *, start: bool) -> Collapse:
    """Return how the effective rank of the inputs, participation of their covariance, falls with depth.

    Args:
        record: record of one run.
        start: at the first measurement, else in the late window.

    Returns:
        The collapse; a status instead of a ratio with fewer than six hidden layers. Source: daneshmand2020.
    """
    rank = effective_rank(record)
    sites = [site for site in hidden(record) if site in rank and rank[site].notna().any()]
    if len(sites) < 2 * ENDS:
        return Collapse(Estimate.missing(Status.FEW_SAMPLES, _RANK), "", "", np.nan, np.nan)
    values = [rank[site].dropna() for site in sites]
    now = np.array([float(v.iloc[0] if start else tables.late(v).median()) for v in values])
    width, samples = (tables.table(record, stat, slot="input").median()[sites] for stat in ("width", "samples"))
    room = float(min(width.min(), samples.min() - 1))
    first, last = float(np.median(now[:ENDS])), float(np.median(now[-ENDS:]))
    ratio = min(first, room) / last if last > 0 else np.inf
    estimate = Estimate(ratio, np.nan, n=len(sites), source=_RANK)
    return Collapse(estimate, sites[0], sites[-1], first, last)


def correlated(record: Record) -> list[str]:
    """Return the inputs of which correlations were stored, in order of execution."""
    return list(tables.arrays(record, "correlation", slot="input"))


def correlation(record: Record, site: str) -> np.ndarray:
    """Return the last stored correlations between the features of a layer's input.

    Args:
        record: record of one run, attached with "correlation" among the probes.
        site: the input, as "fc/input".

    Returns:
        [d, d]; [0, 0] where none were stored.
    """
    _, values = tables.arrays(record, "correlation", slot="input").get(site, (np.empty(0), np.empty((0, 0))))
    width = math.isqrt(values.shape[1])
    return values[-1].reshape(width, width) if len(values) else np.empty((0, 0))


def _place(factor: str) -> tuple[str, str]:
    _check("factor", factor, _FACTORS)
    return _FACTORS[factor]


def _check(argument: str, value: str, options: Iterable[str]) -> None:
    if value not in options:
        raise unknown_name(argument, value, options)
