"""Spikes: at which steps the loss jumps, which tensors moved before it did, and what that says of the cause."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pandas as pd

from normscope.core.record import Record
from normscope.core.robust import MIN_HISTORY, WINDOW
from normscope.metrics import attention, onset, tables
from normscope.metrics.onset import AFTER, BEFORE, IQR, LEAST, ONSET, Window

# a jump of the loss is one of `FOLD`, and passes one of the pairs below: robust standard deviations of its logarithm,
# and part of the loss at the start
FOLD = 1.25  # of the median of the steps before
FAR, RISE = 6.0, 0.1  # a solved problem jumps now and then by less
NEAR, LOST = 3.0, 0.5  # half of what was learned is lost
STAYS, LASTING = 2.5, 8  # with `RISE`, the median of as many steps from there on
BEYOND, RECENT = 2.0, 50  # with `RISE`, as many times the largest of as many steps before
# of a gradient norm, where no loss is known
NORM_FAR, NORM_FOLD = 12.0, 10.0
OUTSIDE = 0.1  # of its norm, by which a weight changes beyond its step
RAISED, STEEP = 1.5, 20.0  # growth of a learning rate; one that is the cause whatever else drifted
STALE, STALE_STEPS = 2.3, 8  # RMS_t, and the steps before a spike in which it counts
FEW = 0.2  # part of the tensors that moved which may have begun before what is taken for the cause
GREW = 1.25  # growth of what makes queries and keys since it began to move
QUERY_KEY = re.compile(
    r"(^|[._])(q|k|qk|qkv|query|key|in_proj|c_attn|query_key_value|wq|wk)([._]|$)|to_[qk]|[qk]_(proj|norm)"
)
APART = 32  # steps without a jump that end a spike

_START = 10  # steps whose median is the loss at the start


class Spike(NamedTuple):
    """A jump of the loss, or of the gradient norm where no loss is known.

    Attributes:
        step: its first step.
        last: its last step.
        highest: the step of `peak`, the first that was not finite if there is one.
        of: "loss" or "gradient norm".
        before: median of the `WINDOW` steps before it, of their logarithms where all are positive.
        peak: largest value in it, infinite where it was not finite.
        recovered: whether the steps after it are back below `FOLD` of what was before.
        found: whether it passes the thresholds of a jump; else it is a step that was asked for.
    """

    step: int
    last: int
    highest: int
    of: str
    before: float
    peak: float
    recovered: bool
    found: bool = True


@tables.once
def spikes(record: Record) -> tuple[Spike, ...]:
    """Return the spikes of a run in the order of steps; none where neither loss nor gradient norm is known.

    Args:
        record: record of one run.
    """
    frame = tables.context(record)
    frame = frame[~frame["skipped"]]
    of = "loss" if frame["loss"].notna().mean() > 0.5 else "gradient norm"
    series = (frame["loss"] if of == "loss" else frame["grad_norm"]).dropna()
    if not len(series):
        return ()
    before, jumps = _jumps(series, of)
    start = abs(float(series.iloc[:_START].replace(np.inf, np.nan).median()))
    at = np.flatnonzero(jumps)
    found = []
    for together in np.split(at, np.flatnonzero(np.diff(at) > APART) + 1) if len(at) else []:
        first, end = int(together[0]), int(together[-1])
        level = float(before.iloc[first])
        after = series.iloc[end + 1 : end + 1 + APART]
        sizes = series.iloc[first : end + 1].abs()
        found.append(
            Spike(
                step=int(series.index[first]),
                last=int(series.index[end]),
                highest=int(sizes.index[int(np.argmax(sizes.to_numpy()))]),
                of=of,
                before=level,
                peak=float(sizes.max()),
                recovered=bool(len(after) and after.median() - level < max((FOLD - 1) * abs(level), RISE * start)),
            )
        )
    return tuple(found)


def _jumps(series: pd.Series, of: str) -> tuple[pd.Series, np.ndarray]:
    """Return the median of the steps before each, and which steps jump above it."""
    finite = series.where(np.isfinite(series))
    known = finite.dropna()
    logs = bool((known > 0).all())
    values = np.log(finite) if logs else finite
    start = abs(float(known.iloc[:_START].median())) if len(known) else 0.0
    window = values.shift().rolling(WINDOW, min_periods=MIN_HISTORY)
    spread = (window.quantile(0.75) - window.quantile(0.25)) / IQR
    spread = spread.clip(lower=LEAST if logs else LEAST * start)
    middle = window.median().ffill()
    sigmas = (values - middle) / spread
    before = np.exp(middle) if logs else middle
    if of == "loss":
        ahead = finite[::-1].rolling(LASTING, min_periods=LASTING).median()[::-1]
        stays = ((np.log(ahead) if logs else ahead) - middle) / spread
        rise, lasting = finite - before, np.minimum(finite, ahead) - before
        some, much = (np.maximum(part * start, (FOLD - 1) * before.abs()) for part in (RISE, LOST))
        recent = finite.shift().rolling(RECENT, min_periods=MIN_HISTORY).max()
        jumps = (stays > STAYS) & (sigmas > STAYS) & (lasting > some)
        jumps |= (sigmas > FAR) & (rise > some)
        jumps |= (sigmas > NEAR) & (rise > much)
        jumps |= logs & (finite > BEYOND * recent) & (rise > RISE * start)
    else:
        jumps = (sigmas > NORM_FAR) & (finite > NORM_FOLD * before)
    jumps |= ~np.isfinite(series)
    return before, jumps.to_numpy(bool)


def at(record: Record, step: int) -> Spike:
    """Return a step as if it were a spike, to ask what moved before it.

    Args:
        record: record of one run.
        step: a recorded step.
    """
    frame = tables.context(record)
    of = "loss" if np.isfinite(frame["loss"]).any() else "gradient norm"
    series = frame["loss" if of == "loss" else "grad_norm"]
    earlier = series.loc[: step - 1].tail(WINDOW).median()
    return Spike(step, step, step, of, float(earlier), float(series.loc[step]), recovered=True, found=False)


class Account(NamedTuple):
    """Why a spike came, as far as the record tells.

    Attributes:
        spike: the spike.
        kind: "overflow", "outside", "schedule", "attention", "second-moment", "data", "instability" or "undecided".
        since: the step at which it began.
        sites: tensors in which it began, the first first.
        evidence: the numbers that decided.
        moved: every tensor that moved before the spike, see `onset.onsets`.
    """

    spike: Spike
    kind: str
    since: int
    sites: tuple[str, ...]
    evidence: dict[str, float | int | str]
    moved: pd.DataFrame


@tables.once
def accounts(record: Record) -> tuple[Account, ...]:
    """Return each spike of a run with what it began with.

    Args:
        record: record of one run.
    """
    return tuple(account(record, spike) for spike in spikes(record))


def account(record: Record, spike: Spike) -> Account:
    """Return what a spike began with: the first of `KINDS` that the record shows.

    Args:
        record: record of one run.
        spike: the spike.

    Returns:
        The account; of kind "undecided" where nothing moved before, or the steps before were not kept.
    """
    found = onset.window(record, spike.step)
    if found is None:
        return Account(spike, "undecided", spike.step, (), {"recorded_steps": 0}, pd.DataFrame())
    moved = onset.onsets(found, spike.step)
    for kind, sign in KINDS:
        shown = sign(record, spike, found, moved)
        if shown is not None:
            return Account(spike, kind, *shown, moved)
    return Account(spike, "undecided", spike.step, (), {"moved": 0}, moved)


Shown = tuple[int, tuple[str, ...], dict[str, float | int | str]]


def _overflow(record: Record, spike: Spike, found: Window, moved: pd.DataFrame) -> Shown | None:
    """Tell whether gradients were not finite before the loss was lost, while nothing had grown."""
    del record
    until = found.gradient.index[found.gradient.index <= spike.step]
    broken = found.gradient.loc[until].isin([np.inf])
    if not broken.to_numpy().any():
        return None
    since = onset.first(broken.any(axis=1))
    if _before(moved, since - 1) > FEW:
        return None
    sites = tuple(str(site) for site in broken if broken.at[since, site])
    return since, sites, {"not_finite": len(sites), "of_tensors": broken.shape[1]}


def _outside(record: Record, spike: Spike, found: Window, moved: pd.DataFrame) -> Shown | None:
    """Tell whether a weight changed by more than its step: if nobody else writes it, | |w'| - |w| | <= |dw|."""
    del record, moved
    size = found.weight
    beyond = (size.diff().abs() - found.update) / size.shift()
    recent = beyond.loc[spike.step - BEFORE : spike.step]
    usual = beyond.loc[found.base].max()
    high = recent.where(recent > np.maximum(OUTSIDE, 3 * usual.fillna(0.0)))
    if not high.notna().to_numpy().any():
        return None
    since = onset.first(high.notna().any(axis=1))
    return since, _largest(high, since), {"changed": float(np.nanmax(high.loc[since]))}


def _schedule(record: Record, spike: Spike, found: Window, moved: pd.DataFrame) -> Shown | None:
    """Tell whether the learning rate rose before anything moved."""
    ratio = found.rate / found.rate.loc[found.base].median()
    recent = ratio.loc[spike.step - BEFORE : spike.step - 1 if spike.found else spike.step]
    raised = recent > RAISED
    if not raised.to_numpy().any():
        return None
    since = onset.first(raised.any(axis=1))
    largest = float(recent.max().max())
    steep = largest > STEEP and since >= spike.step - STALE_STEPS
    if not steep and _before(moved, since) > FEW:
        return None
    groups = [str(name) for name in recent.columns[raised.any()]]
    some = len(groups) < found.rate.shape[1]
    sites = [site for site in map(str, moved.index) if not some or _group(record, site) in groups]
    return since, tuple(sites), {"rate_growth": largest, "groups": len(groups), "of_groups": found.rate.shape[1]}


def _before(moved: pd.DataFrame, step: int) -> float:
    """Return which part of the tensors that moved began before a step: a single one may just drift."""
    return float((moved["onset"] < step).mean()) if len(moved) else 0.0


def _largest(frame: pd.DataFrame, step: int) -> tuple[str, ...]:
    """Return the sites with a value at a step, the largest first."""
    row = frame.T[step].dropna().sort_values(ascending=False)
    return tuple(map(str, row.index))


def _group(record: Record, site: str) -> str:
    """Return optimizer and group of a parameter, as the flight recorder names them."""
    facts = record.sites.reindex(columns=["site", "optimizer", "group"]).drop_duplicates("site", keep="last")
    row = facts.set_index("site").loc[site]
    return f"{row['optimizer']}/group{row['group']:.0f}" if row["group"] == row["group"] else ""


def _attention(record: Record, spike: Spike, found: Window, moved: pd.DataFrame) -> Shown | None:
    """Tell whether what makes queries and keys grew before."""
    early = moved.index[moved["onset"] < spike.step] if len(moved) else moved.index
    mine = [site for site in early if QUERY_KEY.search(tables.module_of(site)) and not site.endswith("/bias")]
    if not mine:
        return None
    onsets = moved["onset"].astype(int)
    began = pd.Series({site: found.weight[site].loc[: onsets[site] - 1].iloc[-1] for site in mine})
    growth = (found.weight[mine] / began).loc[spike.step - BEFORE : spike.step - 1]
    high = growth.where(growth > GREW)
    if not high.iloc[-1].notna().any():
        return None
    sites = _largest(high, int(high.index[-1]))
    since = onset.first(high[list(sites)].notna().any(axis=1))
    logits = _logits(record, sites[0], since, spike.last + AFTER)
    return since, sites, {"weight_growth": float(high.iloc[-1].max()), **logits}


def _logits(record: Record, site: str, since: int, last: int) -> dict[str, float | int | str]:
    """Return the largest logit of the attention that a weight belongs to, before a step and from it to another."""
    logits = attention.logits(record)
    module = tables.module_of(site)
    mine = [name for name in logits if module.startswith(f"{tables.module_of(str(name))}.")]
    if not mine:
        return {}
    known = logits[mine[0]].dropna()
    before, after = known.loc[: since - 1], known.loc[since:last]
    return {"logit_before": float(before.iloc[-1]), "logit": float(after.max())} if len(before) and len(after) else {}


def _second_moment(record: Record, spike: Spike, found: Window, moved: pd.DataFrame) -> Shown | None:
    """Tell whether gradients outgrew their second moments in the steps before."""
    del record
    recent = found.rms_t.loc[spike.step - STALE_STEPS : spike.step - 1]
    high = recent.where((recent > STALE) & (onset.scores(found.rms_t, found.base).reindex(recent.index) > ONSET))
    if not high.notna().to_numpy().any():
        return None
    since = onset.first(high.notna().any(axis=1))
    if len(moved) and moved["onset"].min() < since - STALE_STEPS:
        return None  # something else began before
    return since, _largest(high, since), {"rms_t": float(high.max().max()), "steps": spike.step - since}


def _data(record: Record, spike: Spike, found: Window, moved: pd.DataFrame) -> Shown | None:
    """Tell whether loss and gradient jumped together, and nothing before."""
    del record
    if not len(moved) or _before(moved, spike.step) > 0:
        return None
    growth = float(moved["growth"].max())
    return spike.step, (), {"gradient_growth": growth, "moved": len(moved), "of_tensors": found.gradient.shape[1]}


def _instability(record: Record, spike: Spike, found: Window, moved: pd.DataFrame) -> Shown | None:
    """Tell whether some tensors moved before the loss did."""
    del record, found
    early = moved[moved["onset"] < spike.step] if len(moved) else moved
    if not len(early):
        return None
    since = int(early["onset"].iloc[0])
    first = early[early["onset"] == since]
    return since, tuple(map(str, early.index)), {"steps": spike.step - since, "first": len(first), "moved": len(early)}


# the first that applies: what breaks arithmetic or is done from outside, before what grows by itself
KINDS = (
    ("overflow", _overflow),
    ("outside", _outside),
    ("schedule", _schedule),
    ("attention", _attention),
    ("second-moment", _second_moment),
    ("data", _data),
    ("instability", _instability),
)
