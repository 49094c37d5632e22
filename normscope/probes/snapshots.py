"""Snapshots: what is measured on the held batches of a problem while training waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from normscope.linalg.problem import Problem
from normscope.norms.recognize import NormParts
from normscope.probes import curvature, invariance, noise, noise_scale, population
from normscope.probes.summary import Row


class Held(NamedTuple):
    """What a snapshot may look at.

    Attributes:
        problem: model, loss and held batches.
        norms: normalization layers of the model, by name.
        named: watched parameters, by name.
        batch: samples in the last forward pass of training, 0 where there was none.
        trained: samples in all forward passes of training so far.
        ends: whether this is the first snapshot of the run, or the last.
        optimizers: the optimizers of the run.
    """

    problem: Problem
    norms: Mapping[str, NormParts]
    named: Mapping[str, nn.Parameter]
    batch: int
    trained: int = 0
    ends: bool = True
    optimizers: Sequence[torch.optim.Optimizer] = ()


Measure = Callable[[Held], Mapping[str, Sequence[Row]]]

# probe -> what it measures: rows by phase
SNAPSHOTS: Mapping[str, Measure] = {
    "curvature": lambda held: curvature.measure(
        held.problem, held.optimizers, curvature.Work(held.batch, held.trained, held.ends)
    ),
    "invariance": lambda held: invariance.measure(held.problem, held.norms, held.named),
    "noise": lambda held: noise.measure(held.problem, held.norms, held.batch),
    "noise-scale": lambda held: noise_scale.measure(held.problem, held.norms, held.batch),
    "population": lambda held: population.measure(held.problem, held.norms),
}
ENDS = frozenset({"invariance"})  # measured at the first sampled step and at the end alone: it hardly changes
RARE = frozenset({"curvature"})  # measured there and at a few steps between, ever further apart: it costs much
