"""Diagnostics: Record -> Finding, a plain function each; `DIAGNOSTICS` lists them all. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from normscope.core.errors import ArgumentError, brief
from normscope.core.finding import Finding, Verdict, worst_first
from normscope.core.record import Record
from normscope.core.table import Findings
from normscope.diagnostics import (
    attention,
    conditioning,
    curvature,
    mismatch,
    noise,
    optimizer,
    precision,
    propagation,
    rest,
    run,
    scale,
    spikes,
    structure,
    training,
)
from normscope.diagnostics.causes import grouped
from normscope.metrics import tables

Diagnostic = Callable[[Record], list[Finding]]

# each takes the record of one run; the id of its findings is "<module>.<function>", with hyphens
DIAGNOSTICS: tuple[Diagnostic, ...] = (
    run.no_data,
    run.diverged,
    run.probe_failed,
    run.unmeasured,
    run.compiled,
    run.skipped_steps,
    run.no_normalization,
    spikes.overflow,
    spikes.outside,
    spikes.schedule,
    spikes.attention,
    spikes.second_moment,
    spikes.data,
    spikes.instability,
    spikes.undecided,
    training.uncleared_gradients,
    training.learning_rate,
    training.untrained,
    training.clipping,
    training.input_scale,
    training.initial_loss,
    training.stuck_weights,
    training.decay,
    precision.adam_eps,
    precision.loss_scale,
    propagation.signal_exploding,
    propagation.signal_vanishing,
    propagation.gradient_exploding,
    propagation.gradient_vanishing,
    propagation.dead_units,
    propagation.saturated_units,
    propagation.non_finite,
    propagation.outlier_channels,
    propagation.massive_activations,
    propagation.eps_dominates,
    attention.logits_grow,
    attention.entropy_collapse,
    attention.output_logits,
    conditioning.ill_conditioned_inputs,
    conditioning.ill_conditioned_gradients,
    conditioning.curvature_dominated,
    conditioning.rank_collapse,
    curvature.edge_of_stability,
    curvature.outliers,
    curvature.trace_dominated,
    curvature.negative,
    scale.invariance,
    scale.effective_rate,
    scale.equilibrium,
    scale.decay,
    scale.gain_decay,
    scale.bias_before_norm,
    scale.gain_collapse,
    noise.small_batch,
    noise.whitening_batch,
    noise.batches_not_random,
    noise.gradient_noise,
    mismatch.running_statistics,
    mismatch.train_eval_gap,
    mismatch.never_updated,
    mismatch.momentum,
    mismatch.updated_twice,
    mismatch.evaluation_mode,
    mismatch.tiny_variance,
    structure.forward_fails,
    structure.few_values,
    structure.dropout_before_norm,
    structure.never_reached,
    structure.missing_norm,
    structure.shared_norm,
    structure.eps,
    structure.mixed_kinds,
    structure.zero_gains,
    structure.frozen_gains,
    structure.unsynchronized,
    optimizer.missing_parameters,
    optimizer.parameter_twice,
    optimizer.eps,
    optimizer.decay_lost,
    optimizer.gains_stuck,
)


# what takes their place in the record of a lint, in which nothing was trained
AT_REST: tuple[Diagnostic, ...] = (
    run.no_normalization,
    rest.bias_before_norm,
    rest.gain_decay,
    rest.decay,
    rest.small_batch,
    rest.whitening_batch,
    rest.momentum,
    rest.evaluation_mode,
    *(judge for judge in DIAGNOSTICS if judge.__module__ in (structure.__name__, optimizer.__name__)),
)


def diagnose(record: Record, also: Iterable[Diagnostic] = ()) -> Findings:
    """Judge a record by every diagnostic, each run by itself.

    Args:
        record: record of one or several runs.
        also: diagnostics of your own: functions of the record of one run that return a list of findings.

    Returns:
        Findings, worst first: one or none of each diagnostic a run. One that raised is an undecided finding. The list
        prints as a table.

    Raises:
        ArgumentError: if it is no record.
    """
    if not isinstance(record, Record):
        raise ArgumentError(
            f"record={brief(record)} must be a normscope.Record, as normscope.load('runs/a') or scope.record() returns."
        )
    also, found = tuple(also), []
    for single in tables.split(record):
        name = single.names[0] if single.names else ""
        at_rest = bool(single.runs) and "lint" in single.runs[0]
        judging = (*(AT_REST if at_rest else DIAGNOSTICS), *also)
        judged = [finding for diagnostic in judging for finding in _judge(diagnostic, single)]
        found += [replace(finding, run=name) for finding in grouped(judged)]
    return Findings(worst_first(found))


def id_of(diagnostic: Diagnostic) -> str:
    """Return the id of a diagnostic's findings.

    >>> id_of(propagation.dead_units)
    'propagation.dead-units'
    """
    return f"{diagnostic.__module__.rpartition('.')[2]}.{diagnostic.__name__.replace('_', '-')}"


def _judge(diagnostic: Diagnostic, record: Record) -> list[Finding]:
    try:
        with np.errstate(all="ignore"):  # a diverged run holds infinities
            return diagnostic(record)
    except Exception as error:  # one broken diagnostic must not hide the others
        return [
            Finding(
                id=id_of(diagnostic),
                verdict=Verdict.UNDECIDED,
                message=f"This diagnostic failed on this record: {type(error).__name__}: {error}",
                cause="A bug in the diagnostic, or a record that it did not expect.",
                remedy="If it is one of normscope, please report it with the record; the other findings stand.",
                source="huang2020",
            )
        ]
