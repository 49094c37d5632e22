"""Curvature: sharpness against the edge of stability, outliers, negative curvature, and how layers share the trace."""

from __future__ import annotations

import numpy as np
import pandas as pd

from normscope.core.estimate import Estimate, Status
from normscope.core.record import Record
from normscope.metrics import scale, tables

PHASE, SITE = "batch", "/output"
RESOLVED = 0.3  # residual over value from which an eigenvalue counts as not found
STATS = (
    "held_loss",
    "samples",
    "gradient_norm",
    "sharpness",
    "sharpness_residual",
    "smallest",
    "smallest_residual",
    "k",
    "kth",
    "kth_residual",
    "energy",
    "preconditioned",
    "preconditioned_residual",
    "lr",
    "loss_low",
    "loss_high",
    "change_low",
    "change_high",
    "smoothness",
    "trace",
    "trace_error",
    "products",
)
_VARIANCE = 1e-5  # of the kernel of a density, times the width of the spectrum but at least 1
_MARGIN = 5.0  # kernel widths beyond the extreme nodes


def stability_edge(rule: str, momentum: float = 0.0, *, nesterov: bool = False, dampening: float = 0.0) -> float:
    """Return learning rate times sharpness at which an optimizer begins to oscillate without end on a quadratic.

    With momentum b: 2 + 2 b for SGD, over 1 - dampening; (2 + 2 b) / (1 + 2 b) with Nesterov's; (2 + 2 b) / (1 - b) for
    Adam, whose sharpness is that of P^-1 H.

    Args:
        rule: "SGD", "Adam" or "AdamW".
        momentum: b, beta_1 of Adam.
        nesterov: whether SGD's momentum is Nesterov's.
        dampening: of SGD's momentum.

    Returns:
        The edge; NaN for another rule. Sources: cohen2021 (SGD), cohen2022 (Adam).

    >>> [round(stability_edge(rule, 0.9), 6) for rule in ("SGD", "AdamW", "Muon")]
    [3.8, 38.0, nan]
    """
    if rule == "SGD" and nesterov:
        return (2 + 2 * momentum) / (1 + 2 * momentum)
    if rule == "SGD":
        return (2 + 2 * momentum) / (1 - (dampening if momentum else 0.0))
    return (2 + 2 * momentum) / (1 - momentum) if rule in ("Adam", "AdamW") else float("nan")


@tables.once
def snapshots(record: Record) -> pd.DataFrame:
    """Return what was measured of the whole model, a row a snapshot.

    Args:
        record: record of one run.

    Returns:
        Indexed by step, with the columns `STATS`; NaN where something was not measured.
    """
    found = {name: tables.table(record, name, slot="output", phase=PHASE).get(SITE) for name in STATS}
    frame = pd.DataFrame({name: column for name, column in found.items() if column is not None})
    return frame.reindex(columns=list(STATS)).dropna(subset=["held_loss"]).astype(float)


def stability(record: Record) -> pd.DataFrame:
    """Return the sharpness that counts for the optimizer, and where its edge of stability lies.

    Args:
        record: record of one run.

    Returns:
        Indexed by step: sharpness, of P^-1 H where the optimizer scales its gradient by P, else of H; residual, the
        distance within which an eigenvalue lies; edge, `stability_edge` over the learning rate; ratio of the two;
        held_loss. Edge and ratio are NaN where the rule is unknown.
    """
    frame = snapshots(record)
    edges = [_edge(record, step, rate) for step, rate in zip(frame.index.tolist(), frame["lr"], strict=True)]
    scaled = frame["preconditioned"].notna()
    value = frame["preconditioned"].where(scaled, frame["sharpness"])
    residual = frame["preconditioned_residual"].where(scaled, frame["sharpness_residual"])
    edge = pd.Series(edges, index=frame.index, dtype=float)
    columns = {"sharpness": value, "residual": residual, "edge": edge, "ratio": value / edge}
    return pd.DataFrame(columns | {"held_loss": frame["held_loss"]})


def snapshot(record: Record, step: int) -> dict[str, float]:
    """Return one row of `snapshots`."""
    frame = snapshots(record)
    return dict(zip(frame.columns, frame.loc[step].to_numpy(float), strict=True))


def outlier_ratio(record: Record) -> pd.Series:
    """Return zeta = lambda_1 / lambda_K by step, NaN where lambda_K was not resolved. Source: ghorbani2019."""
    frame = snapshots(record)
    known = (frame["kth"] > 0) & (frame["kth_residual"] <= RESOLVED * frame["kth"]) & (frame["k"] > 1)
    return (frame["sharpness"] / frame["kth"]).where(known)


def spectra(record: Record) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return the spectrum by step: nodes and their weights, of sum 1."""
    nodes, weights = (
        {
            int(step): values.astype(float)
            for item in record.channels
            if (item.site, item.phase, item.role, item.stat) == (SITE, PHASE, "value", stat)
            for step, values in zip(item.steps, item.values, strict=True)
        }
        for stat in ("nodes", "weights")
    )
    return {step: (nodes[step], weights[step]) for step in nodes if step in weights}


def negative_mass(record: Record) -> pd.Series:
    """Return the share of the spectrum's absolute mass below zero, by step: sum |lambda| over lambda < 0, of all."""
    found = {}
    for step, (nodes, weights) in spectra(record).items():
        mass = np.abs(nodes) * weights
        found[step] = float(mass[nodes < 0].sum() / mass.sum()) if mass.sum() > 0 else np.nan
    return pd.Series(found, dtype=float).rename_axis("step")


def density(
    nodes: np.ndarray, weights: np.ndarray, points: int = 400, variance: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return a spectrum smoothed by a Gaussian kernel. Source: ghorbani2019.

    Args:
        nodes: [n] where the mass lies.
        weights: [n] how much.
        points: of the grid.
        variance: of the kernel; 1e-5 max(1, width of the spectrum) by default.

    Returns:
        The grid, which holds every node, and the density on it.
    """
    variance = _VARIANCE * max(1.0, float(np.ptp(nodes))) if variance is None else variance
    margin = _MARGIN * variance**0.5
    grid = np.sort(np.concatenate([np.linspace(nodes.min() - margin, nodes.max() + margin, points), nodes]))
    squares = np.square(grid[:, None] - nodes) / variance
    return grid, np.exp(-0.5 * squares) @ weights / (2 * np.pi * variance) ** 0.5


def trace(record: Record) -> Estimate:
    """Return the trace of the Hessian at the last snapshot, with its standard error over random vectors."""
    frame = snapshots(record).dropna(subset=["trace"])
    if not len(frame):
        return Estimate.missing(Status.NOT_RECORDED, "hutchinson1989")
    last = frame.iloc[-1]
    return Estimate(float(last["trace"]), float(last["trace_error"]), source="hutchinson1989")


def layer_traces(record: Record) -> pd.DataFrame:
    """Return the trace of each module's block of the Hessian: a row a snapshot, a column a module."""
    values = tables.table(record, "trace", slot="*", phase=PHASE).drop(columns=SITE, errors="ignore")
    return values.T.groupby([tables.module_of(str(site)) for site in values], sort=False).sum(min_count=1).T


def balance(record: Record) -> pd.DataFrame:
    """Return how modules share the trace at the last snapshot.

    Args:
        record: record of one run.

    Returns:
        Indexed by module: trace; error, the sum of those of its parameters, an upper bound; share, |trace| over the sum
        of all. Empty where nothing was measured.
    """
    traces = layer_traces(record).tail(1)
    if not len(traces):
        return pd.DataFrame(columns=["trace", "error", "share"], dtype=float)
    errors = tables.table(record, "trace_error", slot="*", phase=PHASE).drop(columns=SITE, errors="ignore").tail(1)
    bound = errors.T.groupby([tables.module_of(str(site)) for site in errors], sort=False).sum().T.iloc[-1]
    last = traces.iloc[-1]
    total = last.abs().sum()
    share = last.abs() / total if total > 0 else last * np.nan
    return pd.DataFrame({"trace": last, "error": bound.reindex(last.index), "share": share})


def _edge(record: Record, step: int, rate: float) -> float:
    """Return the sharpness at the edge of stability: of the one rule that all groups of the step follow."""
    groups = record.context.reindex(columns=["step", "optimizer", "lr", "momentum"])
    groups = groups[(groups["step"] == step) & groups["optimizer"].notna()]
    rules = {str(name).partition(" ")[0] for name in groups["optimizer"]}
    if len(rules) != 1 or not rate > 0:
        return float("nan")
    momentum = groups.sort_values("lr", ascending=False)["momentum"].fillna(0.0).iloc[0]
    facts = scale.parameters(record)
    dampening = float(facts["dampening"].max()) if len(facts) else 0.0
    nesterov = bool(facts["nesterov"].any())
    return stability_edge(rules.pop(), float(momentum), nesterov=nesterov, dampening=dampening) / rate
