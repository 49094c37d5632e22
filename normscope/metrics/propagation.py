"""Propagation: how signal and gradient change from layer to layer, and which units no longer take part."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from normscope.core.estimate import Estimate, Status
from normscope.core.record import Record
from normscope.metrics import run, tables

MIN_LAYERS = 3  # below, a rate per layer has no interval
_WEIGHTED = re.compile(r"Linear|Conv")
_TOKENS = re.compile(r"Embedding|Attention|attn", re.IGNORECASE)  # in a class or a path
_Z95 = 1.96
_ROWS = 3  # steps for which a unit must be silent, for the positions of one image are much alike
_UNDERFLOW = 1e-18  # below, a root mean square taken in float32 may be 0 although the values are not


class Depth(NamedTuple):
    """How a magnitude changes over the layers of a network.

    Attributes:
        rate: slope of its natural logarithm, per layer in order of execution.
        total: natural logarithm of its ratio from the first layer to the last: the smaller in size of what the rate
            implies and of what the two ends show, 0 where they disagree in sign.
        sustained: the same between the ends, without the largest step from one layer to the next.
        first: site at the input end.
        last: site at the output end.
        at_first: magnitude at the first site.
        at_last: magnitude at the last site.
    """

    rate: Estimate
    total: float
    sustained: float
    first: str
    last: str
    at_first: float
    at_last: float


def comparable(record: Record) -> list[str]:
    """Return the outputs that may be compared over depth, in order of execution.

    These are the outputs of weighted layers (linear and convolutional ones) without the last, the head, whose scale is
    set by the loss; where there are too few, those of activations. A layer right before a normalization layer stands
    for nothing, its scale being divided out: the normalization layer's output takes its place.

    Args:
        record: record of one run.

    Returns:
        Sites, at each call of a layer its first output.
    """
    known = tables.attributes(record)
    output = known["slot"].isin(["output", "output.0"])
    kind = known["class"].astype(str)
    follower = {before: site for site, before in known.loc[output & known["norm"].notna(), "predecessor"].items()}
    weighted = known.index[output & known["norm"].isna() & kind.str.contains(_WEIGHTED)].tolist()[:-1]
    active = known.index[output & known["activation"].isin(["relu", "bounded"])].tolist()
    return [str(follower.get(site, site)) for site in weighted] if len(weighted) >= MIN_LAYERS else active


def magnitudes(record: Record, *, role: str = "value", measure: str = "rms") -> pd.DataFrame:
    """Return the magnitude at comparable sites: a row a step, a column a site, in order of execution.

    Args:
        record: record of one run.
        role: "value" for the signal, "gradient" for the gradient.
        measure: "rms"; "std", the root of the mean variance of a channel, what differs between inputs; or "norm", the
            Euclidean norm, which layers of different sizes conserve in the backward pass.

    Returns:
        Positive values; NaN where nothing was measured, or where all is exactly zero, as behind a branch that starts at
        zero.
    """
    values = tables.table(record, "var" if measure == "std" else "rms", role=role)
    values = values[[site for site in comparable(record) if site in values]]
    if measure == "std":
        values = values**0.5
    if measure == "norm":
        count = tables.table(record, "count", role=role).reindex_like(values)
        channels = pd.to_numeric(tables.attributes(record)["channels"], errors="coerce").reindex(values.columns)
        values = values * (count * channels) ** 0.5
    return values.where((values > 0) & np.isfinite(values))


def depth(magnitude: pd.DataFrame) -> Depth:
    """Return the rate of a magnitude over depth: the median slope of all pairs of layers (Theil and Sen).

    Half of the layers may be anything without moving it, so alternating kinds of layers, branches and resets by a
    normalization layer do no harm. The standard error is that of the 95 % interval of the slope.

    Args:
        magnitude: rows of `magnitudes`; their median over steps is used.

    Returns:
        The rate, with `n` the number of layers.
    """
    if not len(magnitude) or not magnitude.shape[1]:
        return _no_depth(Status.NOT_RECORDED)
    log = magnitude.apply(np.log).median()
    known = log[np.isfinite(log)]
    if len(known) < MIN_LAYERS or len(known) < 0.5 * len(log):
        return _no_depth(Status.FEW_SAMPLES)
    y = known.to_numpy()
    slope, _, low, high = scipy_stats.theilslopes(y, np.flatnonzero(np.isfinite(log)))
    fitted, seen = slope * (len(log) - 1), y[-1] - y[0]
    total = min(fitted, seen, key=abs) if fitted * seen > 0 else 0.0
    sustained = seen - np.sign(seen) * max(np.diff(y) * np.sign(seen), default=0.0)
    rate = Estimate(float(slope), float(high - low) / (2 * _Z95), "log per layer", len(y), source="schoenholz2017")
    ends = float(np.exp(y[0])), float(np.exp(y[-1]))
    return Depth(rate, float(total), float(sustained), str(known.index[0]), str(known.index[-1]), *ends)


def windows(magnitude: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the first row and the last ones (a quarter, but three at least) in which half of the layers are finite.

    Args:
        magnitude: a row a step, a column a site.

    Returns:
        Both windows; the same rows where the run is short.
    """
    usable = magnitude[magnitude.notna().mean(axis=1) >= 0.5]
    return usable.iloc[:1], usable.iloc[-max(3, len(usable) // tables.LATE_FRACTION) :]


def growth(record: Record) -> pd.DataFrame:
    """Return by what factor the output of each site has grown since the start of the run.

    ratio = rms at the end / max(rms at the start, median rms of the comparable sites at the start), each a median of
    three steps (of fewer in a run of less than six): a layer that starts at zero is compared with its neighbors; where
    these start at zero too the factor is NaN. Where a run ends broken, or values that are not finite follow, the last
    finite rms is the end if it is larger.

    Args:
        record: record of one run.

    Returns:
        Estimates by site (see `tables.estimates`), with columns `start` and `end`, the rms that were divided.
    """
    rms = tables.table(record, "rms")
    finite = rms.where(np.isfinite(rms)).dropna(how="all")
    if len(finite) < 2:
        rows = [(str(site), np.nan, np.nan, 0) for site in rms]
        return tables.estimates(rows).assign(start=np.nan, end=np.nan)
    width = min(3, len(finite) // 2)
    start, end = finite.iloc[:width].median(), finite.iloc[-width:].median()
    broke = ~np.isfinite(rms.iloc[-1]) | (run.ending(record) is not None)
    end = end.where(~broke, np.fmax(end, finite.ffill().iloc[-1]))
    sites = [site for site in comparable(record) if site in finite]
    scale = float((start[sites] if sites else start).median())
    start = start.fillna(scale).clip(lower=scale)
    ratio = end / start.where(start > 0)
    frame = tables.estimates([(str(s), float(ratio[str(s)]), np.nan, int(finite[s].count())) for s in finite])
    return frame.assign(start=start.to_numpy(float), end=end.to_numpy(float))


def weighted(kind: str) -> bool:
    """Tell whether a class is that of a linear or convolutional layer.

    Args:
        kind: name of a class.

    Returns:
        True if it is.

    >>> weighted("Conv2d"), weighted("ReLU")
    (True, False)
    """
    return bool(_WEIGHTED.search(kind))


def is_transformer(record: Record) -> bool:
    """Tell whether a model looks like a transformer: it normalizes tokens, and has an embedding or attention.

    Args:
        record: record of one run.

    Returns:
        True if both are there.
    """
    known = tables.attributes(record)
    names = known["class"].astype(str) + " " + known["module"].astype(str)
    return bool(known["norm"].isin(["layer", "rms"]).any() and names.str.contains(_TOKENS).any())


def dead_fraction(record: Record, values: int) -> pd.DataFrame:
    """Return the fraction of channels of each ReLU that were exactly zero on the last values, of three steps or more.

    Args:
        record: record of one run.
        values: on how many values, at least; a channel counted as dead then fires with probability below 3 / values
            (rule of three, 95 %). Where no arrays were kept, the smallest fraction of a late step is taken.

    Returns:
        Estimates by site; n is the number of values seen of each channel: below `values` all that was seen counts. The
        standard error is 0, zeros being exact.
    """
    known = tables.attributes(record)
    relus = known.index[known["activation"] == "relu"]
    fraction, count = tables.table(record, "dead"), tables.table(record, "count")
    kept = tables.arrays(record, "rms")
    rows = []
    for site in [site for site in relus if site in fraction and site in count]:
        steps, rms = kept.get(site, (np.empty(0), np.empty((0, 0))))
        finite = np.isfinite(rms).all(axis=1) if len(steps) else np.empty(0, bool)
        seen = count[site].reindex(steps[finite]).fillna(0.0).to_numpy()
        if finite.any():
            nonzero = rms[finite][::-1] != 0
            firing = np.where(nonzero.any(axis=0), nonzero.argmax(axis=0), len(seen))
            last = np.concatenate(([0.0], np.cumsum(seen[::-1])))[firing]
            value = float(((last >= min(values, seen.sum())) & (firing >= min(_ROWS, len(seen)))).mean())
        else:
            window = tables.late(fraction[site])
            seen, value = count[site].reindex(window.index).to_numpy(), float(window.min())
        rows.append((str(site), value, 0.0, int(seen.sum()) if np.isfinite(seen.sum()) else 0))
    return tables.estimates(rows)


def unused_fraction(record: Record) -> pd.DataFrame:
    """Return the fraction of channels of each layer whose gradient was exactly zero at every step but the first.

    So a ReLU written as a function is judged: the gradient of a dead unit is zero. Left out: layers that a ReLU module
    follows, the head, and layers without any gradient or with one so small that its square underflows.

    Args:
        record: record of one run.

    Returns:
        Estimates by site; n is the number of steps.
    """
    known = tables.attributes(record)
    judged = set(known.loc[known["activation"] == "relu", "predecessor"])
    affine = known["norm"].notna() | known["class"].astype(str).str.contains(_WEIGHTED)
    hidden = set([site for site in known.index[affine] if site not in judged][:-1])
    rows = []
    for site, (steps, rms) in tables.arrays(record, "rms", role="gradient").items():
        later = rms[steps > steps[0]]
        if site in hidden and len(later) >= 2 and np.isfinite(later).all():
            used = later.max(axis=0)
            if (used > 0).any() and np.median(used[used > 0]) > _UNDERFLOW:
                rows.append((site, float((used == 0).mean()), 0.0, len(later)))
    return tables.estimates(rows)


@tables.once
def cut_off(record: Record) -> list[str]:
    """Return the sites below a cut: no gradient reaches them or any site before them, though it reaches the next one.

    Args:
        record: record of one run.

    Returns:
        Sites whose gradient is exactly zero at every late step, nearest to the loss first; none if the gradient only
        fades out, or if some earlier site has one.
    """
    rms = tables.table(record, "rms", role="gradient").iloc[1:]
    for cut, site in enumerate(rms.columns):
        end = float(tables.late(rms[site]).max())
        if end != 0:
            return [str(site) for site in rms.columns[:cut][::-1]] if end > _UNDERFLOW else []
    return []


def saturation(record: Record) -> pd.DataFrame:
    """Return the fraction of values within 1 % of the range's ends, in the late window, of hidden bounded activations.

    Args:
        record: record of one run.

    Returns:
        Estimates by site; a bounded activation after the last weighted layer, which may saturate rightly, is left out.
    """
    known = tables.attributes(record)
    weighted = np.flatnonzero(known["class"].astype(str).str.contains(_WEIGHTED) & (known["slot"] == "output"))
    hidden = known.iloc[: weighted[-1]] if len(weighted) else known
    sites = hidden.index[hidden["activation"] == "bounded"]
    frame = tables.table(record, "saturated")
    return tables.late_medians(frame[[site for site in sites if site in frame]])


def nonfinite_steps(record: Record) -> pd.DataFrame:
    """Return every step whose gradient norm was not finite.

    A step that a GradScaler skipped counts as one, for it skips no other; its norm was not read.

    Args:
        record: record of one run.

    Returns:
        Rows of the context, indexed by step, with `streak`, the number of such steps in a row up to this one.
    """
    frame = tables.context(record)
    bad: pd.Series[bool] = frame["grad_norm"].abs().eq(np.inf) | frame["skipped"]
    streak = bad.astype(int).groupby((~bad).cumsum()).cumsum()
    return frame.assign(streak=streak).loc[bad]


def nonfinite_sites(record: Record) -> pd.DataFrame:
    """Return where values that are not finite arose: one row a sampled step that has any.

    Args:
        record: record of one run.

    Returns:
        Columns step, site, role ("value", "gradient" or "weight"), channels (how many of the site) and sites (how many
        sites). The site is the first in order of execution whose values are not finite, else the last whose gradient is
        not, else the last parameter whose gradient is not. Sites that were so before while the gradient norm was
        finite, as a mask of -inf, come last.
    """
    norm = tables.context(record)["grad_norm"]
    sound = norm.index[np.isfinite(norm)]
    weights = tables.table(record, "norm", slot="*", role="gradient")
    counts: dict[str, pd.DataFrame] = {
        "value": tables.table(record, "nonfinite"),
        "gradient": tables.table(record, "nonfinite", role="gradient").iloc[:, ::-1],
        "weight": weights.iloc[:, ::-1].abs().eq(np.inf).astype(float),
    }
    found: dict[int, tuple[int, str, str, int, int]] = {}
    for masked in (False, True):
        for role, count in counts.items():
            before = (count[count.index.isin(sound)] > 0).any().to_numpy(bool)
            for step, row in zip(count.index, (count > 0).to_numpy(bool), strict=True):
                hit = count.columns[row & (before == masked)]
                if len(hit):
                    channels = int(min(count[hit[0]].loc[step], 2**31))
                    found.setdefault(int(step), (int(step), str(hit[0]), role, channels, int(row.sum())))
    return pd.DataFrame([found[step] for step in sorted(found)], columns=["step", "site", "role", "channels", "sites"])


def outliers(record: Record) -> pd.DataFrame:
    """Return how far the largest channel stands out: its rms over the median one, in the late window.

    Args:
        record: record of one run.

    Returns:
        Estimates by site, but for ReLUs, whose median channel may well be near zero; with columns `kurtosis`, the
        largest of a channel, and `peak`, the largest |x| over the median channel's rms.
    """
    known = tables.attributes(record)
    top, middle = tables.table(record, "rms.max"), tables.table(record, "rms.q50")
    relus = set(known.index[known["activation"] == "relu"])
    sites = [site for site in top if site in middle and site not in relus]
    middle = middle[sites].where(middle[sites] > 0)
    frame = tables.late_medians(top[sites] / middle)
    for name, stat, scale in (("kurtosis", "kurtosis.max", None), ("peak", "max.max", middle)):
        values = tables.table(record, stat).reindex(columns=sites)
        medians = tables.late_medians(values if scale is None else values / scale)
        frame[name] = medians["value"].to_numpy() if len(medians) else np.nan
    return frame


def eps_weight(record: Record) -> pd.DataFrame:
    """Return eps / (variance + eps) of the median channel, or token, of each normalization layer, in the late window.

    Args:
        record: record of one run.

    Returns:
        Estimates by site.
    """
    return tables.late_medians(tables.table(record, "eps_weight.q50", slot="input"))


def _no_depth(status: Status) -> Depth:
    return Depth(Estimate.missing(status, "schoenholz2017"), 0.0, 0.0, "", "", np.nan, np.nan)
