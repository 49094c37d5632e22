"""Factors: which layers have their input and output gradient measured at which step, and what became of them.

All are measured at the first sampled step, so that the state at initialization is known at one moment, and then in
turns: each about every `PERIOD` steps, but at most a `FEWEST`-th of them at one sampled step. Eigenvalues are taken in
the background, so what a step left is returned at a later one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from normscope.core.schedule import keeps_arrays
from normscope.core.site import Site
from normscope.probes import covariance, layout
from normscope.probes.background import Background
from normscope.probes.summary import Row

PERIOD = 50  # steps from one measurement of a layer to the next
FEWEST = 5  # turns at least, where few steps are sampled: so no step pays for more than a fifth of the layers
MOST_HELD = 1 << 24  # bytes of states beyond which layers wait for their turn, at the first of the sampled steps
MOST_CORRELATED = 256  # features of which correlations are kept, on request

MOST_LAST = 10_000  # rows whose arrays wait for the end of the run; the oldest are given up

Found = tuple[int, Row]
Taken = tuple[int, list[tuple[str, Row | Exception]]]  # a step, and of each site its row or why there is none


class Factors:
    """Measures linear and convolutional layers in turns.

    Args:
        every: how often steps are sampled.
        mean: whether the loss is a mean over the batch, whose 1/N is undone in gradients.
        correlations: whether the correlations of inputs are kept with their eigenvalues.
        patches: whether the patches that convolutions see are measured beside their inputs.
        most: bytes of states, about, that the first sampled step may hold; all layers are measured at it otherwise.
    """

    def __init__(
        self, every: int, mean: bool, correlations: bool, patches: bool = False, most: float = math.inf
    ) -> None:
        """Start with nothing measured; see the class."""
        self._most, self._held = most, 0
        self._turns = max(FEWEST, math.ceil(PERIOD / every))
        self._mean, self._correlations, self._patches = mean, correlations, patches
        self._turn: dict[str, int] = {}
        self._now: int | None = None
        self._expected: set[str] = set()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._latest: dict[tuple[str, str], Found] = {}
        self._jobs: Background[Taken] = Background()
        self._fresh = False  # whether the last job is of this step

    def begin(self, sample: int) -> None:
        """Begin the n-th sampled step."""
        self._now = sample % self._turns if sample else None
        self._expected = set()
        self._fresh = False

    def wants(self, name: str, module: nn.Module) -> bool:
        """Tell whether a layer is measured at this step."""
        if not covariance.is_measured(module):
            return False
        turn = self._turn.setdefault(name, len(self._turn) % self._turns)
        return turn == self._now if self._now is not None else self._held < self._most

    def patches_of(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Return the state of the patches of a convolution's input, None where they are not measured."""
        if not self._patches or not covariance.has_patches(module):
            return None
        return covariance.observe(covariance.patches(cast(_ConvNd, module), x.detach()), -1)

    def expect(self, where: Site, width: int) -> None:
        """Note that the gradient of an output is measured at this step, and the features of the input.

        What both may hold is counted by these, not by the samples, so that all ranks come to the same.
        """
        self._expected.add(str(where))
        self._held += 2 * 4 * min(width, covariance.WIDEST) ** 2

    def expects(self, site: str) -> bool:
        """Tell whether the gradient of an output is measured at this step."""
        return site in self._expected

    def submit(
        self, step: int, found: Iterable[tuple[str, str, np.ndarray]], batch: float | None, scale: float
    ) -> None:
        """Take the eigenvalues of what a step has left, in one job, so that its rows come together.

        Args:
            step: the step.
            found: (site, role, state on the host).
            batch: samples of the step, of which the loss is the mean; None where unknown: then all rows are samples.
            scale: loss scale by which gradients are divided.
        """
        states = [(site, role, state.astype(np.float32, copy=False)) for site, role, state in found]
        self._fresh = True
        self._jobs.submit(self._now, partial(self._take, step, states, batch, scale))

    def collect(self, on_failure: Callable[[str, Exception], None], settle: bool) -> list[Found]:
        """Return what is finished: steps and rows; arrays are in the few that the schedule keeps.

        What this step has left is returned at a later one even if it is done, so that layouts do not depend on timing.

        Args:
            on_failure: called with a site and the error where eigenvalues could not be taken.
            settle: whether to wait for what is not finished.

        Returns:
            Steps and rows, in order.
        """
        if settle:
            self._jobs.settle()
        rows: list[Found] = []
        for _, future in self._jobs.finished(leave=int(self._fresh and not settle)):
            step, taken = future.result()
            for site, row in taken:
                if isinstance(row, Exception):
                    on_failure(site, row)
                else:
                    rows.append((step, self._scheduled(step, row)))
        return rows

    def _scheduled(self, step: int, row: Row) -> Row:
        """Return a row, without arrays unless the schedule keeps them; the last that it does not wait for `last`."""
        place = row.site, row.role
        keep = keeps_arrays(self._counts[place])
        self._counts[place] += 1
        self._latest.pop(place, None)
        if keep:
            return row
        self._latest[place] = step, row
        if len(self._latest) > MOST_LAST:
            del self._latest[next(iter(self._latest))]
        return row._replace(arrays={})

    def last(self) -> list[Found]:
        """Return, once, the last rows whose arrays were not kept."""
        found, self._latest = list(self._latest.values()), {}
        return found

    def _take(
        self, step: int, states: Sequence[tuple[str, str, np.ndarray]], batch: float | None, scale: float
    ) -> Taken:
        taken: list[tuple[str, Row | Exception]] = []
        for site, role, state in states:
            try:
                taken.append((site, self._row(site, role, state, batch, scale)))
            except Exception as error:  # one site must not hide the others
                taken.append((site, error))
        return step, taken

    def _row(self, site: str, role: str, state: np.ndarray, batch: float | None, scale: float) -> Row:
        factor, extra = 1.0, {}
        if role == "gradient":
            samples = float(batch or covariance.count(state))
            factor = (samples if self._mean else 1.0) / scale
            extra["batch"] = samples
        found = covariance.spectra(state, factor)
        arrays = dict(found.arrays)
        if self._correlations and role == "value" and covariance.holds_matrix(state, MOST_CORRELATED):
            arrays["correlation"] = covariance.correlation(state)
        scalars = found.scalars | extra
        return Row(site, role, tuple(scalars), np.fromiter(scalars.values(), float, len(scalars)), arrays)


def input_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Return the state of a layer's input, None where it is not a tensor of numbers."""
    return None if layout.why_unmeasured(x) else covariance.observe(x.detach(), axis_of(module, x))


def axis_of(module: nn.Module, x: torch.Tensor) -> int:
    """Return the feature axis of an input or output of a linear or convolutional layer."""
    axis = layout.own_axis(module)
    return -1 if axis is None or -axis > x.dim() else axis
