"""Normalization area partitioning: which entries of an activation share statistics.

An area reorders an activation into `[areas, features, *samples]`: statistics are taken over the samples,
correlations over the features. `split` and `merge` do so without copying; `view` and `inverse` flatten the samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.norms.part import Part, divide, require

CHANNELS = ("auto", "first", "last")


@dataclass(frozen=True, repr=False)
class Area(Part):
    """Base of the areas; its subclasses say what they cross and what their rows are.

    Attributes:
        crosses_batch: an area holds several examples.
        fixed: the number of areas does not depend on the batch, so that each can have statistics of its own.
        per_channel: each row (area, feature) belongs to one channel.
    """

    crosses_batch: ClassVar[bool] = False
    fixed: ClassVar[bool] = False
    per_channel: ClassVar[bool] = False
    ranks: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)

    def axis(self, x: Tensor, num_features: int | None) -> int:
        """Return the channel axis of an input, 1 or -1.

        Args:
            x: the input.
            num_features: number of channels, None where the layer does not know.

        Returns:
            The axis; an input without that many channels is an ArgumentError.
        """
        return checked_axis(x, num_features, (1,))

    def rows(self, num_features: int) -> tuple[int, int]:
        """Return how many areas and features have statistics of their own; areas that vary count as one."""
        raise NotImplementedError

    def samples(self, x: Tensor, axis: int = 1) -> int:
        """Return the number of samples of each row."""
        return self.split(x, axis).shape[2:].numel()

    def split(self, x: Tensor, axis: int = 1) -> Tensor:
        """Reorder `(N, C, *)` into `[areas, features, *samples]`, several sample axes, without copying."""
        raise NotImplementedError

    def merge(self, z: Tensor, x: Tensor, axis: int = 1) -> Tensor:
        """Undo `split`; x gives the shape."""
        raise NotImplementedError

    def spread(self, stat: Tensor, x: Tensor, axis: int = 1) -> Tensor | None:
        """Give a statistic `[areas, features]` to each channel: `(1, C)` or `(N, C)`; None where it varies in space."""
        return None

    @property
    def stored(self) -> Area:
        """The area in which stored statistics are used: any batch fits."""
        return self

    def view(self, x: Tensor, axis: int = 1) -> Tensor:
        """Reorder an activation into `[areas, features, samples]`.

        Args:
            x: the activation.
            axis: the channel axis.

        Returns:
            The reordered activation.

        >>> import torch
        >>> Batch().view(torch.zeros(4, 8, 5, 5)).shape
        torch.Size([1, 8, 100])
        """
        return self.split(x, axis).flatten(2)

    def inverse(self, z: Tensor, x: Tensor, axis: int = 1) -> Tensor:
        """Undo `view`.

        Args:
            z: `[areas, features, samples]`.
            x: a tensor of the shape to return to.
            axis: the channel axis.

        Returns:
            A tensor of the shape of x.
        """
        return self.merge(z.reshape(self.split(x, axis).shape), x, axis)


def checked_axis(x: Tensor, num_features: int | None, axes: tuple[int, ...]) -> int:
    """Return the first of the axes that has the right number of channels.

    Args:
        x: the input.
        num_features: number of channels, None to take the first axis.
        axes: candidates, the preferred one first.

    Returns:
        The axis.

    Raises:
        ArgumentError: the input has fewer than two dimensions, or none of the axes fits.
    """
    if x.ndim < 2:
        raise ArgumentError(f"x has shape {tuple(x.shape)}; a normalization needs at least (N, C).")
    for axis in axes:
        if num_features is None or x.shape[axis] == num_features:
            return axis
    raise ArgumentError(
        f"x has shape {tuple(x.shape)}, with num_features={num_features} expected on axis "
        f"{' or '.join(map(str, axes))}; build the layer for {x.shape[axes[0]]} channels, or move the channel axis."
    )


def spatial(x: Tensor) -> Tensor:
    """Flatten `(N, C, *)` to `(N, C, L)`, L = 1 without further axes; no copy in the usual memory formats."""
    return x.unsqueeze(-1) if x.ndim == 2 else x if x.ndim == 3 else x.flatten(2)


@dataclass(frozen=True, repr=False)
class Batch(Area):
    """Each channel over batch and space (batch normalization); whitening works within groups of consecutive channels.

    `[groups, C / groups, N, L]`, with channels last `[groups, C / groups, N * L]`.

    Attributes:
        groups: number of groups of channels.
        channels: "first" (N, C, *) or "last" (N, *, C).
    """

    groups: int = 1
    channels: str = "first"
    crosses_batch: ClassVar[bool] = True
    fixed: ClassVar[bool] = True
    per_channel: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse an unknown layout with an ArgumentError."""
        require(self.channels, "channels", ("first", "last"))

    def axis(self, x: Tensor, num_features: int | None) -> int:
        """Return 1 or -1, by `channels`."""
        return checked_axis(x, num_features, (1 if self.channels == "first" else -1,))

    def rows(self, num_features: int) -> tuple[int, int]:
        """Return the groups and their channels."""
        return self.groups, divide(num_features, self.groups)

    def samples(self, x: Tensor, axis: int = 1) -> int:
        """Return the number of samples of each row."""
        return x.numel() // x.shape[axis]

    def split(self, x: Tensor, axis: int = 1) -> Tensor:
        """Reorder to `[groups, C / groups, N, L]` or `[groups, C / groups, N * L]`."""
        size = divide(x.shape[axis], self.groups)
        if axis == -1:
            return x.reshape(x.shape[:-1].numel(), self.groups, size).permute(1, 2, 0)
        z = spatial(x)
        return z.reshape(z.shape[0], self.groups, size, z.shape[2]).permute(1, 2, 0, 3)

    def merge(self, z: Tensor, x: Tensor, axis: int = 1) -> Tensor:
        """Undo `split`."""
        return z.permute((2, 0, 1) if axis == -1 else (2, 0, 1, 3)).reshape(x.shape)

    def spread(self, stat: Tensor, x: Tensor, axis: int = 1) -> Tensor | None:
        """Return `(1, C)` for channels first."""
        return stat.reshape(1, -1) if axis == 1 else None


@dataclass(frozen=True, repr=False)
class BatchGroup(Area):
    """Groups of channels pooled over consecutive examples: ghost batches, batch-group normalization, pooled groups.

    `[N / examples, groups, examples, C / groups, L]`.

    Attributes:
        groups: number of groups of channels; each group is one row, its channels are samples.
        examples: examples of one area, capped to the batch; None for the whole batch.
        interleaved: channel c belongs to group c mod groups, instead of consecutive channels.
    """

    groups: int
    examples: int | None = None
    interleaved: bool = False
    crosses_batch: ClassVar[bool] = True

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        """Whether one area takes the whole batch."""
        return self.examples is None

    @property
    def stored(self) -> Area:
        """The whole batch in one area."""
        return replace(self, examples=None)

    def rows(self, num_features: int) -> tuple[int, int]:
        """Return one area and the groups."""
        divide(num_features, self.groups)
        return 1, self.groups

    def split(self, x: Tensor, axis: int = 1) -> Tensor:
        """Reorder to `[N / examples, groups, examples, C / groups, L]`.

        Args:
            x: `(N, C, *)`.
            axis: 1.

        Returns:
            A view of x.

        Raises:
            ArgumentError: the batch is no multiple of `examples`.
        """
        n, c = x.shape[:2]
        examples = min(self.examples or n, n)
        if examples and n % examples:
            raise ArgumentError(f"examples={examples} does not divide the batch of {n}; choose a divisor of the batch.")
        size = divide(c, self.groups)
        areas = n // examples if examples else 0
        if self.interleaved:
            return spatial(x).reshape(areas, examples, size, self.groups, -1).permute(0, 3, 1, 2, 4)
        return spatial(x).reshape(areas, examples, self.groups, size, -1).permute(0, 2, 1, 3, 4)

    def merge(self, z: Tensor, x: Tensor, axis: int = 1) -> Tensor:
        """Undo `split`."""
        order = (0, 2, 3, 1, 4) if self.interleaved else (0, 2, 1, 3, 4)
        return z.permute(order).reshape(x.shape)

    def spread(self, stat: Tensor, x: Tensor, axis: int = 1) -> Tensor | None:
        """Return `(N, C)`, or `(1, C)` where one area takes the whole batch."""
        size = x.shape[1] // self.groups
        wide = stat.repeat(1, size) if self.interleaved else stat.repeat_interleave(size, 1)
        return wide if len(stat) == 1 else wide.repeat_interleave(len(x) // len(stat), 0)


@dataclass(frozen=True, repr=False)
class Instance(Area):
    """Each channel of each example over space: `[N, C, L]`."""

    per_channel: ClassVar[bool] = True

    def rows(self, num_features: int) -> tuple[int, int]:
        """Return one area and the channels."""
        return 1, num_features

    def samples(self, x: Tensor, axis: int = 1) -> int:
        """Return the number of samples of each row."""
        return x.shape[2:].numel()

    def split(self, x: Tensor, axis: int = 1) -> Tensor:
        """Reorder to `[N, C, L]`."""
        return spatial(x)

    def merge(self, z: Tensor, x: Tensor, axis: int = 1) -> Tensor:
        """Undo `split`."""
        return z.reshape(x.shape)

    def spread(self, stat: Tensor, x: Tensor, axis: int = 1) -> Tensor | None:
        """Return `(N, C)`, or `(1, C)` for stored statistics."""
        return stat


@dataclass(frozen=True, repr=False)
class Group(Area):
    """Groups of consecutive channels of each example over space: `[N, groups, C / groups, L]`.

    The groups are the features: whitening removes the correlation between groups (group whitening).

    Attributes:
        groups: number of groups.
    """

    groups: int = 32

    def rows(self, num_features: int) -> tuple[int, int]:
        """Return one area and the groups."""
        divide(num_features, self.groups)
        return 1, self.groups

    def samples(self, x: Tensor, axis: int = 1) -> int:
        """Return the number of samples of each row."""
        return x.shape[2:].numel() * (x.shape[1] // self.groups)

    def split(self, x: Tensor, axis: int = 1) -> Tensor:
        """Reorder to `[N, groups, C / groups, L]`."""
        n, c = x.shape[:2]
        return spatial(x).reshape(n, self.groups, divide(c, self.groups), -1)

    def merge(self, z: Tensor, x: Tensor, axis: int = 1) -> Tensor:
        """Undo `split`."""
        return z.reshape(x.shape)

    def spread(self, stat: Tensor, x: Tensor, axis: int = 1) -> Tensor | None:
        """Return `(N, C)`, or `(1, C)` for stored statistics."""
        return stat.repeat_interleave(x.shape[1] // self.groups, 1)


@dataclass(frozen=True, repr=False)
class InstanceGroup(Area):
    """Each channel of each example over space, whitened within groups of channels: `[N * groups, C / groups, L]`.

    Attributes:
        groups: number of groups of channels.
    """

    groups: int = 1

    def rows(self, num_features: int) -> tuple[int, int]:
        """Return one area and the channels of a group."""
        return 1, divide(num_features, self.groups)

    def samples(self, x: Tensor, axis: int = 1) -> int:
        """Return the number of samples of each row."""
        return x.shape[2:].numel()

    def split(self, x: Tensor, axis: int = 1) -> Tensor:
        """Reorder to `[N * groups, C / groups, L]`."""
        n, c = x.shape[:2]
        return spatial(x).reshape(n * self.groups, divide(c, self.groups), -1)

    def merge(self, z: Tensor, x: Tensor, axis: int = 1) -> Tensor:
        """Undo `split`."""
        return z.reshape(x.shape)


@dataclass(frozen=True, repr=False)
class _Anywhere(Area):
    """Base of the areas that take channels on axis 1 or on the last axis.

    Attributes:
        channels: "first" (N, C, *), "last" (N, *, C), or "auto": last for three dimensions, else first, and the other
            one where only that has the right number of channels.
    """

    channels: str = "auto"

    def __post_init__(self) -> None:
        """Refuse an unknown layout with an ArgumentError."""
        require(self.channels, "channels", CHANNELS)

    def axis(self, x: Tensor, num_features: int | None) -> int:
        """Return 1 or -1, by the rule of `channels`."""
        if x.ndim == 2 or self.channels == "first":
            return checked_axis(x, num_features, (1,))
        if self.channels == "last":
            return checked_axis(x, num_features, (-1,))
        return checked_axis(x, num_features, (-1, 1) if x.ndim == 3 else (1, -1))

    def rows(self, num_features: int) -> tuple[int, int]:
        """Return one area and one feature."""
        return 1, 1


@dataclass(frozen=True, repr=False)
class Layer(_Anywhere):
    """All of an example with channels first, each token with channels last: `[N, 1, C, L]` or `[N * L, 1, C]`.

    Attributes:
        dims: number of trailing dimensions of an area, as in torch's normalized_shape; 0 to go by the layout.
    """

    dims: int = 0

    def axis(self, x: Tensor, num_features: int | None) -> int:
        """Return 1 or -1; with `dims` the last axis, whatever it holds."""
        return -1 if self.dims else super().axis(x, num_features)

    def samples(self, x: Tensor, axis: int = 1) -> int:
        """Return the number of samples of each row."""
        return x.shape[1 if axis == 1 and not self.dims else x.ndim - (self.dims or 1) :].numel()

    def split(self, x: Tensor, axis: int = 1) -> Tensor:
        """Reorder to `[N, 1, C, L]`, `[N * L, 1, C]` or `[rest, 1, dims]`."""
        if axis == 1 and not self.dims:
            return spatial(x).unsqueeze(1)
        area = x.shape[x.ndim - (self.dims or 1) :].numel()
        return x.reshape(-1, 1, area) if area else x.reshape(0, 1, 0)

    def merge(self, z: Tensor, x: Tensor, axis: int = 1) -> Tensor:
        """Undo `split`."""
        return z.reshape(x.shape)

    def spread(self, stat: Tensor, x: Tensor, axis: int = 1) -> Tensor | None:
        """Return `(N, C)` for channels first."""
        return stat.expand(-1, x.shape[1]) if axis == 1 and not self.dims else None


@dataclass(frozen=True, repr=False)
class Position(_Anywhere):
    """The channels of each position of each example: `[N, L, C]`, the positions in the place of features."""

    def samples(self, x: Tensor, axis: int = 1) -> int:
        """Return the number of samples of each row."""
        return x.shape[axis]

    def split(self, x: Tensor, axis: int = 1) -> Tensor:
        """Reorder to `[N, L, C]`."""
        return spatial(x).transpose(1, 2) if axis == 1 else x.reshape(-1, 1, x.shape[-1])

    def merge(self, z: Tensor, x: Tensor, axis: int = 1) -> Tensor:
        """Undo `split`."""
        return (z.transpose(1, 2) if axis == 1 else z).reshape(x.shape)
