"""Attention: do its logits grow without end, do its heads look at single keys, does the output drift."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.diagnostics.rule import Rule
from normscope.diagnostics.words import count
from normscope.metrics import attention as metrics
from normscope.metrics import run, tables, training

# origin of each threshold: the `threshold_source` of the rule that uses it
LOGIT = metrics.LARGE  # scale q.k
COLLAPSED = 0.05  # entropy of the median head over its largest value
FALLEN = 0.5  # of what it was
DRIFT = 64.0  # |log Z|

LOGITS_GROW = Rule(
    id="attention.logits-grow",
    threshold=LOGIT,
    threshold_source="kimi2025",
    source="wortsman2023",
    cause="Queries and keys grow together, which nothing in the loss holds back; a softmax of such logits is one-hot, "
    "and its gradient vanishes or jumps.",
    remedy="Normalize queries and keys of each head (torch.nn.RMSNorm(head_dim) before the product, QK-norm), or scale "
    "the weights of a head's queries and keys by sqrt(100 / its largest logit) after a step (QK-clip); a lower "
    "learning rate delays it.",
)
ENTROPY_COLLAPSE = Rule(
    id="attention.entropy-collapse",
    threshold=COLLAPSED,
    threshold_source="identity: a query that gives all but 1 % of its weight to one of 64 to 4096 keys, the rest "
    "evenly to the others, has 0.023 to 0.017 of the largest entropy, with 3 % it has 0.062 to 0.046; "
    "measured: in healthy runs of small language models it stays above 0.3",
    source="zhai2023",
    cause="The logits of a layer have grown until each query looks at a single key; the loss then jumps or stays.",
    remedy="Normalize queries and keys (QK-norm), reparametrize the projections by their spectral norm "
    "(normscope.weights), or lower the learning rate and lengthen its warmup.",
)
OUTPUT_LOGITS = Rule(
    id="attention.output-logits",
    threshold=DRIFT,
    threshold_source="identity: bfloat16 numbers from 64 on lie 0.5 apart, so a logit is off by up to 0.25 and a "
    "probability by up to 28 %; a uniform guess over 1000 to 100000 classes has log Z of 7 to 12",
    source="wortsman2023",
    cause="The loss sees differences of logits alone, so their common level, log Z, drifts.",
    remedy="Add a z-loss: 1e-4 * torch.logsumexp(logits, -1).square().mean(); weight decay on the output layer helps.",
)


def logits_grow(record: Record) -> list[Finding]:
    """Judge whether attention logits are large and still rising.

    Args:
        record: record of one run.

    Returns:
        One finding, none where the model does not attend.
    """
    seen, ceilings = _late(metrics.logits(record)), _late(metrics.ceilings(record))
    if not len(ceilings):
        return []
    gains = _late(metrics.from_gains(record))
    if not len(seen):
        return _bounded(record, ceilings)
    site, top = str(seen.index[0]), float(seen.iloc[0])
    beyond = seen[seen > LOGIT]
    rising = [name for name in beyond.index if metrics.is_rising(metrics.logits(record)[name])]
    site, top = (rising[0], float(seen[rising[0]])) if rising else (site, top)
    head = metrics.heads(record, site, "logit")
    evidence: dict[str, float | int | str | list[float]] = {
        "logit": top,
        "first": float(metrics.logits(record)[site].dropna().iloc[0]),
        "ceiling": float(ceilings.get(site, math.nan)),
        "layers_beyond": len(beyond),
        "layers": len(seen),
    }
    if len(head):
        evidence |= {"head": int(np.argmax(head)), "heads_beyond": int((head > LOGIT).sum()), "heads": len(head)}
    if site in gains:
        evidence["ceiling_of_gains"] = float(gains[site])
    evidence = {name: value for name, value in evidence.items() if value == value}
    allowed = f"; the gains of its QK-norm allow {gains[site]:.3g}" if site in gains else ""
    said = f"{_named(site)}: the largest attention logit is {top:.3g} (threshold {LOGIT:g})"
    if not len(beyond):
        return LOGITS_GROW.ok(f"{said}, of {count(len(seen), 'layer')}{allowed}.", evidence)
    where = f" in head {evidence['head']}" if "head" in evidence else ""
    moved = f"and rising, from {evidence['first']:.3g}" if rising else "but not rising"
    return LOGITS_GROW.found(
        Verdict.WARNING if rising else Verdict.NOTE,
        f"{said}{where}, {moved}{allowed}; beyond it at {len(beyond)} of {count(len(seen), 'layer')}.",
        sites=rising or [str(name) for name in beyond.index],
        step=tables.onset(metrics.logits(record)[site].dropna() > LOGIT),
        evidence=evidence,
        cause=None if rising else "Some heads look at single keys, as in many trained models.",
        remedy=None
        if rising
        else "Nothing as long as it stays so and the loss falls; in half precision keep the softmax in float32.",
    )


def _bounded(record: Record, ceilings: pd.Series) -> list[Finding]:
    """Conclude from what queries and keys allow, where no score was seen."""
    site, top = str(ceilings.index[0]), float(ceilings.iloc[0])
    said = f"{_named(site)}: queries and keys allow attention logits up to {top:.3g} (threshold {LOGIT:g})"
    evidence = {"ceiling": top, "layers": len(ceilings)}
    rising = metrics.is_rising(metrics.ceilings(record)[site])
    if top <= LOGIT or not rising:
        return LOGITS_GROW.ok(f"{said}; the scores themselves were not seen.", evidence)
    return LOGITS_GROW.found(
        Verdict.NOTE,
        f"{said}, and rising; the scores themselves, which may be far below, were not seen.",
        sites=[str(name) for name in ceilings.index[ceilings > LOGIT]],
        evidence=evidence,
        cause="Queries and keys grow; a kernel that keeps no scores to look at computes their product.",
        remedy="Look at the scores themselves: run a few steps with torch.nn.functional.scaled_dot_product_attention.",
    )


def entropy_collapse(record: Record) -> list[Finding]:
    """Judge whether the heads of a layer come to look at single keys.

    Args:
        record: record of one run.

    Returns:
        One finding, none where no attention weights were seen.
    """
    frame = metrics.entropies(record)
    late = _late(frame)[::-1]
    if not len(late):
        return []
    start = frame.apply(lambda column: column.dropna().head(metrics.START).max())
    low = late[late < COLLAPSED]
    fallen = [str(name) for name in low.index if low[name] < FALLEN * start[name]]
    site = fallen[0] if fallen else str(late.index[0])
    value = float(late[site])
    evidence = {"entropy": value, "first": float(start[site]), "layers_beyond": len(fallen), "layers": len(late)}
    said = f"{_named(site)}: the median head has {value:.2g} of the largest entropy (threshold {COLLAPSED:g})"
    if not fallen:
        return ENTROPY_COLLAPSE.ok(f"{said}, of {count(len(late), 'layer')} the lowest.", evidence)
    solved = training.learned(record)
    return ENTROPY_COLLAPSE.found(
        Verdict.NOTE if solved else Verdict.WARNING,
        f"{said}, where it was {start[site]:.2g}: most queries look at one key; so at {len(fallen)} of "
        f"{count(len(late), 'layer')}.",
        sites=fallen,
        step=tables.onset(frame[site].dropna() < COLLAPSED),
        evidence=evidence,
        cause="The task is learned, and its heads have found the keys they need." if solved else None,
        remedy="Nothing, if sharp attention is what the task asks for." if solved else None,
    )


def output_logits(record: Record) -> list[Finding]:
    """Judge whether the level of the output's logits drifts.

    Args:
        record: record of one run.

    Returns:
        One finding, none where the model does not attend, or log Z was not seen, or the run ends broken.
    """
    series = metrics.log_z(record)
    if len(series) < metrics.START or run.ending(record) is not None:
        return []
    first, late = float(series.iloc[0]), float(tables.late(series).median())
    site, norm_first, norm_late = metrics.output_layer(record)
    evidence = {"log_z": late, "first": first, "norm": norm_late, "norm_first": norm_first}
    evidence = {name: value for name, value in evidence.items() if math.isfinite(value)}
    said = f"log Z of the output is {late:.3g} (threshold {DRIFT:g}), and was {first:.3g}"
    grown = f"; the norm of {site} went from {norm_first:.3g} to {norm_late:.3g}" if site else ""
    if abs(late) <= DRIFT:
        return OUTPUT_LOGITS.ok(f"{said}{grown}.", evidence)
    drifting = metrics.is_rising(series.abs())
    half = _dtype(record) in ("bfloat16", "float16")
    return OUTPUT_LOGITS.found(
        Verdict.WARNING if drifting and half else Verdict.NOTE,
        f"{said}{', and still moving away' if drifting else ''}{grown}.",
        sites=[site] if site else ["/logits"],
        step=tables.onset(series.abs() > DRIFT),
        evidence=evidence,
    )


def _named(site: str) -> str:
    return tables.module_of(site) or "the model"


def _dtype(record: Record) -> str:
    frame = record.sites.reindex(columns=["site", "dtype"])
    found = frame.loc[frame["site"] == "/logits", "dtype"]
    return str(found.iloc[-1]) if len(found) else ""


def _late(frame: pd.DataFrame) -> pd.Series:
    """Return the late medians by site, the largest first."""
    medians = tables.late_medians(frame).set_index("site")["value"]
    return medians.dropna().sort_values(ascending=False, kind="stable")
