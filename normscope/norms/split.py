"""Different normalizations for consecutive parts of the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.norms.layer import Norm, Normalization
from normscope.norms.part import Traits


class Split(Normalization):
    """Normalize consecutive parts of the channels, each by a layer of its own.

    Args:
        *parts: layers that know their number of channels.

    >>> from normscope.norms import Batch, Instance, Standardize
    >>> Split(Norm(Instance(), Standardize(), num_features=4), Norm(Batch(), Standardize(), num_features=4))
    Split(Norm(Instance(), Standardize(), num_features=4), Norm(Batch(), Standardize(), num_features=4))
    """

    def __init__(self, *parts: Norm) -> None:
        """Keep the layers as parts.0, parts.1, ..."""
        super().__init__()
        self.sizes = [known_size(part) for part in parts]
        self.num_features = sum(self.sizes)
        self.parts = torch.nn.ModuleList(parts)

    def extra_repr(self) -> str:
        """Write the layers."""
        return ", ".join(repr(part) for part in self.parts)

    @property
    def traits(self) -> Traits:
        """What all parts share; crossing and storing as soon as one part does."""
        found = [part.traits for part in self.parts if isinstance(part, Normalization)]
        return Traits(
            crosses_batch=any(t.crosses_batch for t in found),
            stateful=any(t.stateful for t in found),
            shift_invariant=all(t.shift_invariant for t in found),
            scale_invariant=all(t.scale_invariant for t in found),
            ranks=tuple(r for r in found[0].ranks if all(r in t.ranks for t in found)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        pieces = torch.split(x, self.sizes, 1)
        return torch.cat([part(piece) for part, piece in zip(self.parts, pieces, strict=True)], 1)


def known_size(part: Any) -> int:
    """Return a layer's number of channels.

    Args:
        part: the layer.

    Returns:
        Its number of channels.

    Raises:
        ArgumentError: it does not know.
    """
    size = getattr(part, "num_features", None)
    if not isinstance(size, int):
        raise ArgumentError(f"part={part!r} has no num_features; give it one, so that the channels can be divided.")
    return size


def in_groups(num_features: int, size: int, make: Callable[[int, int], Norm]) -> Normalization:
    """Make a layer with groups of `size` channels, a smaller last one by itself.

    Args:
        num_features: number of channels.
        size: channels of a group.
        make: makes a layer from number of channels and number of groups.

    Returns:
        One layer, or a Split of two.
    """
    size = min(size, num_features)
    whole, rest = divmod(num_features, size)
    first = make(whole * size, whole)
    return first if rest == 0 else Split(first, make(rest, 1))
