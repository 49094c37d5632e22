"""Population statistics: which statistics a layer uses in training and in evaluation, and how it comes by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.area import Area
from normscope.norms.operation import Operation
from normscope.norms.part import Part, Stats, known_features


def keep(host: nn.Module, **initial: Tensor) -> None:
    """Register buffers running_<name>, and num_batches_tracked.

    Args:
        host: the layer.
        **initial: name to initial value.
    """
    for name, value in initial.items():
        host.register_buffer(f"running_{name}", value)
    host.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))


@torch.no_grad()
def track(host: Any, momentum: float | None, **new: Tensor) -> None:
    """Average new values into the buffers running_<name> and count the batch.

    Args:
        host: the layer.
        momentum: weight of the new values, None for the plain average of all batches.
        **new: name to value, of as many entries as the buffer.
    """
    host.num_batches_tracked.add_(1)
    weight = 1.0 / float(host.num_batches_tracked) if momentum is None else momentum
    for name, value in new.items():
        stored = getattr(host, f"running_{name}")
        stored.lerp_(value.detach().reshape(stored.shape).to(stored.dtype), weight)


def valid_momentum(momentum: float | None) -> None:
    """Refuse a momentum out of range.

    Args:
        momentum: weight of the newest batch.

    Raises:
        ArgumentError: it is neither None nor between 0 and 1.
    """
    if momentum is not None and not 0 <= momentum <= 1:
        raise ArgumentError(
            f"momentum={momentum!r} must be between 0 and 1, or None for a plain average; "
            "it is the weight of the newest batch."
        )


@dataclass(frozen=True, repr=False)
class Population(Part):
    """Base of the populations: `install` puts buffers on the layer, `choose` returns the statistics to use.

    Attributes:
        stateful: evaluation uses stored statistics.
    """

    stateful: ClassVar[bool] = False

    def install(self, host: nn.Module, area: Area, operation: Operation, num_features: int | None) -> None:
        """Register buffers.

        Args:
            host: the layer.
            area: its area.
            operation: its operation.
            num_features: number of channels.
        """

    def choose(self, host: Any, z: Tensor) -> Stats:
        """Return the statistics to normalize with; in training also store what is to be stored.

        Args:
            host: the layer.
            z: the reordered input.

        Returns:
            Statistics for the operation.
        """
        measured: Stats = host.measure(z)
        return measured


@dataclass(frozen=True, repr=False)
class Current(Population):
    """The statistics of the input at hand, in training and in evaluation."""


@dataclass(frozen=True, repr=False)
class Running(Population):
    """Batch statistics in training, moving averages in evaluation: stored <- (1 - momentum) stored + momentum new.

    Buffers are called running_mean, running_var, ... and num_batches_tracked, as in torch. Statistics of areas that
    vary with the batch are averaged over the areas.

    Attributes:
        momentum: weight of the newest batch, None for the plain average of all batches.
        track: names of the statistics to store, () for what the operation tracks.
        unbiased: store the unbiased variance.
        zero: stored statistics start from 0, as in some published code.
        first: the first batch replaces the initial values.
    """

    momentum: float | None = 0.1
    track: tuple[str, ...] = ()
    unbiased: bool = True
    zero: bool = False
    first: bool = False
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a momentum out of range with an ArgumentError."""
        valid_momentum(self.momentum)

    def names(self, operation: Operation) -> tuple[str, ...]:
        """Return the names of the stored statistics."""
        return self.track or operation.tracked

    def install(self, host: nn.Module, area: Area, operation: Operation, num_features: int | None) -> None:
        """Register a buffer for each stored statistic and the count of batches."""
        shape = area.rows(known_features(num_features, self))
        starts = {name: operation.initial(name, *shape) for name in self.names(operation)}
        if self.zero:
            starts = {name: torch.zeros_like(start) for name, start in starts.items()}
        keep(host, **{name: start if start.ndim == 3 else start.flatten() for name, start in starts.items()})

    def choose(self, host: Any, z: Tensor) -> Stats:
        """Return batch statistics in training, after storing them, and stored ones in evaluation."""
        if not host.training:
            return self.stored(host, z)
        measured: Stats = host.measure(z)
        self.update(host, z, measured)
        return measured

    def stored(self, host: Any, z: Tensor) -> Stats:
        """Return the stored statistics, one area or as many as there are."""
        found = {name: getattr(host, f"running_{name}") for name in self.names(host.operation)}
        wide = {name: v.to(torch.promote_types(v.dtype, z.dtype)) for name, v in found.items()}
        return {name: v if v.ndim == 3 else v.reshape(-1, z.shape[1]) for name, v in wide.items()}

    def update(self, host: Any, z: Tensor, measured: Stats) -> None:
        """Average new statistics into the stored ones."""
        detached = {name: value.detach() for name, value in measured.items()}
        count = host.average.count(z) if self.unbiased else None
        new = {name: host.operation.quantity(name, detached, count) for name in self.names(host.operation)}
        if not host.area.fixed:
            new = {name: value.mean(0) for name, value in new.items()}
        first = self.first and int(host.num_batches_tracked) == 0
        track(host, 1.0 if first else self.momentum, **new)
