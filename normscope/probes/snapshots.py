"""Snapshots: what is measured on the held batches of a problem while training waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from normscope.linalg.problem import Problem
from normscope.norms.recognize import NormParts
from normscope.probes import invariance, noise, noise_scale, population
from normscope.probes.summary import Row


class Held(NamedTuple):
    """What a snapshot may look at.

    Attributes:
        problem: model, loss and held batches.
        norms: normalization layers of the model, by name.
        named: watched parameters, by name.
        batch: samples in the last forward pass of training, 0 where there was none.
    """

    problem: Problem
    norms: Mapping[str, NormParts]
    named: Mapping[str, nn.Parameter]
    batch: int


Measure = Callable[[Held], Mapping[str, Sequence[Row]]]

# probe -> what it measures: rows by phase
SNAPSHOTS: Mapping[str, Measure] = {
    "invariance": lambda held: invariance.measure(held.problem, held.norms, held.named),
    "noise": lambda held: noise.measure(held.problem, held.norms, held.batch),
    "noise-scale": lambda held: noise_scale.measure(held.problem, held.norms, held.batch),
    "population": lambda held: population.measure(held.problem, held.norms),
}
ENDS = frozenset({"invariance"})  # measured at the first sampled step and at the end alone: it hardly changes
