"""Comparison: the trials of several entries as tidy frames: at which learning rate each is shown, what separates."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from normscope.metrics.digest import NEEDS_PROBLEM, QUANTITIES, Quantity
from normscope.metrics.paired import leader, paired, sensitivity, student
from normscope.metrics.trial import Trial

MEBIBYTE = 2**20
_MORE = re.compile(
    "accuracy|acc|auc|auroc|auprc|f1|precision|recall|map|m?iou|dice|bleu|rouge|psnr|ssim|r2|score|top1|top5|reward"
)
_LESS = re.compile("loss|error|err|perplexity|ppl|nll|bpc|bpd|r?mse|mae|fid|wer|cer|time|seconds|latency|gap")


@dataclass(frozen=True)
class Column:
    """A number that entries are compared in.

    Attributes:
        name: its name in frames.
        label: what it is, as the head of a column.
        subject: "metric", "training", "cost", "findings", or one of the six subjects.
        better: "lower" or "higher"; "" where neither is.
        reading: what it is measured on.
    """

    name: str
    label: str
    subject: str
    better: str
    reading: str


_COST: tuple[Column, ...] = (
    Column(
        "speed",
        "speed",
        "cost",
        "higher",
        "steps a second over those of the first entry, same learning rate and seed, steps that were not sampled",
    ),
    Column("memory", "saved, MiB", "cost", "lower", "activations that autograd keeps from one forward pass"),
    Column("failures", "failures", "findings", "lower", "findings of verdict failure"),
    Column("warnings", "warnings", "findings", "lower", "findings of verdict warning"),
)
_SENSITIVITY = Column(
    "sensitivity",
    "sensitivity",
    "training",
    "lower",
    "E[min(final loss, first loss) - best final loss] over the learning rates",
)


def more_is_better(metric: str, higher: Collection[str] | None) -> bool:
    """Tell whether more of a metric is better: as `higher` says, else as its name does, else not.

    Args:
        metric: its name.
        higher: metrics of which more is better, None to go by names.

    Returns:
        The answer.

    >>> more_is_better("test_accuracy", None), more_is_better("test_loss", None), more_is_better("loss", ["loss"])
    (True, False, True)
    """
    return metric in higher if higher is not None else _named(metric, _MORE) and not _named(metric, _LESS)


def is_clear(metric: str, higher: Collection[str] | None) -> bool:
    """Tell whether the direction of a metric is known."""
    return higher is not None or _named(metric, _MORE) or _named(metric, _LESS)


def _named(metric: str, pattern: re.Pattern[str]) -> bool:
    """Tell whether one of the words of a name is one of those."""
    return any(pattern.fullmatch(word) for word in re.split(r"[^a-z0-9]+", metric.lower()))


def columns(trials: Sequence[Trial], higher: Collection[str] | None) -> tuple[Column, ...]:
    """Return what can be compared, in order: what `fit` returned, training, the subjects, cost, findings."""
    names = dict.fromkeys(name for trial in trials for name in trial.metrics)
    better = ("lower", "higher")
    metrics = [Column(n, n, "metric", better[more_is_better(n, higher)], "returned by fit") for n in names]
    measured = [Column(q.name, q.label, q.subject, q.better, q.reading) for q in QUANTITIES]
    training = [column for column in measured if column.name == "final_loss"]
    others = [column for column in measured if column.subject != "training"]
    return (*metrics, *training, _SENSITIVITY, *others, *_COST)


def needing_problem(trials: Sequence[Trial]) -> list[Quantity]:
    """Return what no trial has measured although it was attached, for want of a problem."""
    attached = [trial for trial in trials if trial.measured.keys() >= {quantity.name for quantity in QUANTITIES}]
    wanted = [quantity for quantity in QUANTITIES if NEEDS_PROBLEM in quantity.reading]
    return [q for q in wanted if attached and all(np.isnan(trial.measured[q.name]) for trial in attached)]


def tidy(trials: Sequence[Trial]) -> pd.DataFrame:
    """Return every number of every trial.

    Args:
        trials: any trials.

    Returns:
        Columns entry, learning_rate, seed, quantity, value; `throughput` in steps a second, `memory` in MiB. A trial
        that failed has no row.
    """
    rows = [
        (trial.entry, trial.rate, trial.seed, name, value / MEBIBYTE if name == "memory" else value)
        for trial in trials
        if trial.done
        for name, value in {**trial.measured, **trial.metrics}.items()
    ]
    frame = pd.DataFrame(rows, columns=["entry", "learning_rate", "seed", "quantity", "value"])
    return frame.astype({"learning_rate": float, "value": float})


def best_rates(trials: Sequence[Trial], select: str, higher: Collection[str] | None) -> dict[str, float]:
    """Return the learning rate at which each entry is best, by the mean of a metric over seeds.

    Args:
        trials: any trials.
        select: the metric.
        higher: metrics of which more is better, see `more_is_better`.

    Returns:
        Rates by entry; a rate with a seed that failed or is not finite is worse than any without, and of equal ones the
        smaller is taken. NaN stands for the rate that `fit` chose.
    """
    sign = -1.0 if more_is_better(select, higher) else 1.0
    scores: dict[str, dict[float, list[float]]] = {}
    for trial in trials:
        value = sign * trial.metrics.get(select, np.nan) if trial.done else np.nan
        # NaN is unequal to itself and would not serve as a key
        rate = 0.0 if np.isnan(trial.rate) else trial.rate
        scores.setdefault(trial.entry, {}).setdefault(rate, []).append(value if np.isfinite(value) else np.inf)

    def rank(item: tuple[float, list[float]]) -> tuple[float, float, float]:
        rate, values = item
        broken = float(np.mean(np.isinf(values)))
        finite = [value for value in values if np.isfinite(value)]
        return broken, float(np.mean(finite)) if finite else np.inf, rate

    best = {entry: min(found.items(), key=rank)[0] for entry, found in scores.items()}
    return {entry: rate or np.nan for entry, rate in best.items()}


def at_best(trials: Sequence[Trial], rates: dict[str, float]) -> list[Trial]:
    """Return the trials of each entry at its learning rate."""
    return [trial for trial in trials if _same(trial.rate, rates[trial.entry])]


def _same(one: float, other: float) -> bool:
    return one == other or (np.isnan(one) and np.isnan(other))


def values(name: str, trials: Sequence[Trial], rates: dict[str, float], entries: Sequence[str]) -> pd.DataFrame:
    """Return one column by seed and entry, at each entry's own learning rate where it depends on that.

    Args:
        name: name of the column.
        trials: all trials.
        rates: the learning rate of each entry.
        entries: the entries, in order.

    Returns:
        A row a seed, a column an entry; NaN where not measured.
    """
    if name == "sensitivity":
        return _sensitivities(trials).reindex(columns=list(entries))
    if name == "speed":
        return _speeds(trials, entries[0]).reindex(columns=list(entries))
    frame = tidy(at_best(trials, rates))
    found = frame[frame["quantity"] == name].pivot_table(index="seed", columns="entry", values="value", dropna=False)
    return found.reindex(columns=list(entries)).astype(float)


def _sensitivities(trials: Sequence[Trial]) -> pd.DataFrame:
    grids: dict[tuple[int, str], list[Trial]] = {}
    for trial in trials:
        grids.setdefault((trial.seed, trial.entry), []).append(trial)
    found: dict[str, dict[int, float]] = {}
    for (seed, entry), grid in grids.items():
        losses = [trial.measured.get("final_loss", np.nan) if trial.done else np.inf for trial in grid]
        starts = [trial.measured.get("initial_loss", np.nan) for trial in grid if trial.done]
        start = float(np.mean(starts)) if starts else np.nan
        found.setdefault(entry, {})[seed] = sensitivity(losses, start)
    return pd.DataFrame(found)


def _speeds(trials: Sequence[Trial], first: str) -> pd.DataFrame:
    """Return throughput over that of the first entry in the trial beside it, the median over learning rates."""
    frame = tidy(trials)
    frame = frame[frame["quantity"] == "throughput"].assign(learning_rate=frame["learning_rate"].fillna(0.0))
    wide = frame.pivot_table(index=["seed", "learning_rate"], columns="entry", values="value")
    if first not in wide:
        return pd.DataFrame(columns=list(wide.columns), dtype=float)
    return wide.div(wide[first], axis=0).groupby(level="seed").median()


def summary(
    trials: Sequence[Trial], entries: Sequence[str], select: str, higher: Collection[str] | None
) -> pd.DataFrame:
    """Return each entry in each column, over seeds, at its best learning rate.

    Args:
        trials: all trials.
        entries: the entries, in order; the first is what the others are compared with.
        select: the metric on which the learning rate is chosen.
        higher: metrics of which more is better.

    Returns:
        A row an entry and column: entry, quantity, subject, learning_rate, mean, deviation, low, high, n (seeds); the
        paired difference to the first entry, difference, difference_low, difference_high and separated; and best,
        whether it leads beyond doubt, see `paired.leader`.
    """
    rates = best_rates(trials, select, higher)
    rows = []
    for column in columns(trials, higher):
        table = values(column.name, trials, rates, entries)
        if not table.notna().to_numpy().any():
            continue
        leads = leader(table, column.better == "higher") if column.better else None
        for entry in entries:
            own = student(table[entry].to_numpy(float))
            apart = paired(table[entry], table[entries[0]])
            against = (apart.mean, apart.low, apart.high, apart.separated) if entry != entries[0] else (*_NOTHING,)
            place = (entry, column.name, column.subject, rates.get(entry, np.nan))
            rows.append((*place, own.mean, own.deviation, own.low, own.high, own.n, *against, entry == leads))
    return pd.DataFrame(rows, columns=list(_SUMMARY))


_NOTHING = (np.nan, np.nan, np.nan, False)
_SUMMARY = (
    "entry",
    "quantity",
    "subject",
    "learning_rate",
    "mean",
    "deviation",
    "low",
    "high",
    "n",
    "difference",
    "difference_low",
    "difference_high",
    "separated",
    "best",
)
