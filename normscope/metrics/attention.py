"""Attention: the largest logits of heads, what bounds them, the entropy of their weights, log Z of the output."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from normscope.core.record import Record
from normscope.metrics import structure, tables

SLOT = "attention"
LARGE = 100.0  # logit, tau of QK-clip
START = 3  # sampled steps that count as the start
RISE = 1.25  # late median over that of the first half, from which a value counts as rising
_NORMS = re.compile(
    r"(^|\.)(?:(?P<q>q_?norm|query_norm|norm_q|q_layernorm|q_ln)|(?P<k>k_?norm|key_norm|norm_k|k_layernorm|k_ln))$"
)


def logits(record: Record) -> pd.DataFrame:
    """Return the largest logit of any head: a row a sampled step, a column a site.

    A logit is scale q.k of a query and a key that it sees, before biases, masks and soft caps.

    Args:
        record: record of one run.

    Returns:
        float64; empty where no scores were seen.
    """
    return tables.table(record, "logit.max", slot=SLOT)


def ceilings(record: Record) -> pd.DataFrame:
    """Return what no logit can exceed, by step and site: scale max|q| max|k| of the head where that is largest.

    Args:
        record: record of one run.

    Returns:
        float64; of attention whose scores were not seen too.
    """
    return tables.table(record, "ceiling.max", slot=SLOT)


def entropies(record: Record) -> pd.DataFrame:
    """Return the entropy of the median head, by step and site.

    Of each query the entropy of its weights over the logarithm of the keys that it sees: 1 looks at all alike, 0 at
    one. The mean over queries.

    Args:
        record: record of one run.

    Returns:
        float64; empty where no scores were seen.
    """
    return tables.table(record, "entropy.q50", slot=SLOT)


def heads(record: Record, site: str, stat: str) -> np.ndarray:
    """Return the last finite values of each head of a site.

    Args:
        record: record of one run.
        site: the site, as "blocks.0.attention/attention".
        stat: "logit", "ceiling" or "entropy".

    Returns:
        [H]; empty where none were kept.
    """
    _, values = tables.arrays(record, stat, slot=SLOT).get(site, (None, np.empty((0, 0))))
    finite = values[np.isfinite(values).all(axis=1)]
    return finite[-1] if len(finite) else np.empty(0)


def from_gains(record: Record) -> pd.DataFrame:
    """Return what the gains of the norms of queries and keys allow, by step and site.

    A normalized vector of n numbers is at most sqrt(n) max|gamma| + |beta| long, whatever the input, and a rotation
    by position does not change that: logit <= scale |q| |k|, with RMSNorm over a head sqrt(d) max|gamma_q|
    max|gamma_k|.

    Args:
        record: record of one run.

    Returns:
        float64; without sites whose attention normalizes neither, or whose scale was not seen.

    Source: dehghani2023.
    """
    scales = tables.late_medians(tables.table(record, "scale", slot=SLOT)).set_index("site")["value"]
    found: dict[str, pd.Series] = {}
    for owner, sides in _qk_norms(record).items():
        site = f"{owner}/{SLOT}"
        if set(sides) == {"q", "k"} and site in scales.index:
            bounds = [_longest(record, norm) for norm in sides.values()]
            if all(bound is not None for bound in bounds):
                found[site] = (bounds[0] * bounds[1] * scales[site]).dropna()  # type: ignore[operator]  # not None
    return pd.DataFrame(found)


def _qk_norms(record: Record) -> dict[str, dict[str, str]]:
    """Return by module the norms of its queries and keys."""
    found: dict[str, dict[str, str]] = {}
    for name in structure.norms(record).index:
        match = _NORMS.search(str(name))
        if match is not None:
            found.setdefault(str(name)[: match.start()], {})["q" if match["q"] else "k"] = str(name)
    return found


def _longest(record: Record, norm: str) -> pd.Series | None:
    """Return by step how long the output of a layer or RMS norm can be, None where its gain is not recorded."""
    facts, held = structure.norms(record).loc[norm], structure.parameters(record)
    if facts["norm"] not in ("layer", "rms") or not isinstance(facts["gain"], str):
        return None
    gain = f"{norm}/{facts['gain']}"
    top, low = (tables.table(record, f"value.{end}", slot="*") for end in ("max", "min"))
    if gain not in top or gain not in held.index:
        return None
    offset, size = float(np.nan_to_num(facts["gain_offset"])), float(np.prod(held["shape"][gain]))
    largest = pd.concat([(top[gain] + offset).abs(), (low[gain] + offset).abs()], axis=1).max(axis=1)
    biases = [site for site in held.index if held["module"][site] == norm and site != gain]
    norms = tables.table(record, "norm", slot="*")
    added = sum((norms[site] for site in biases if site in norms), start=pd.Series(0.0, index=largest.index))
    found: pd.Series = size**0.5 * largest + added
    return found


def is_rising(series: pd.Series) -> bool:
    """Tell whether a value is higher in the late window than in the first half of the run.

    Args:
        series: values by step.

    Returns:
        Whether the late median is `RISE` times that of the first half, or more.

    >>> is_rising(pd.Series([1.0, 2.0, 3.0, 4.0])), is_rising(pd.Series([1.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]))
    (True, False)
    """
    finite = series.replace([np.inf, -np.inf], np.nan).dropna()
    if len(finite) < 2:
        return False
    return bool(tables.late(finite).median() >= RISE * finite.iloc[: max(1, len(finite) // 2)].median())


def log_z(record: Record) -> pd.Series:
    """Return the mean of log Z = log sum exp of the model's output over its last axis, by sampled step.

    Args:
        record: record of one run.

    Returns:
        float64; empty where the model does not attend, or no linear layer gives its output.
    """
    frame = tables.table(record, "log_z", slot="logits")
    return frame.iloc[:, 0].dropna() if frame.shape[1] else pd.Series(dtype=float)


def output_layer(record: Record) -> tuple[str, float, float]:
    """Return the weight that gives the model's output, and its norm at the start and late.

    Args:
        record: record of one run.

    Returns:
        The last matrix with as many rows as there are outputs; "" and NaN where there is none.
    """
    known, held = tables.attributes(record), structure.parameters(record)
    rows = known.loc[known["slot"] == "logits", "channels"]
    fitting = [str(site) for site, shape in held["shape"].items() if len(shape) == 2 and shape[0] in rows.to_numpy()]
    norms = tables.table(record, "norm", slot="*")
    site = next((site for site in fitting[::-1] if site in norms), "")
    if not site:
        return "", np.nan, np.nan
    series = norms[site].dropna()
    return site, float(series.head(START).median()), float(tables.late(series).median())
