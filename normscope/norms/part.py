"""What every part of a normalization shares: a constructor call as its repr, and declared properties."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from normscope.core.errors import ArgumentError, unknown_name

Stats = dict[str, Tensor]

CONDITIONS = ("", "labels", "style", "map", "domain", "graph", "other")


class Part:
    """Base of area, operation, recovery and population: frozen dataclasses that hold settings and no tensors."""

    def __repr__(self) -> str:
        """Write the constructor call; what stands at its default is left out."""
        shown = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        )
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class Traits:
    """Declared properties of a layer: the laws that hold for it, and what its tests and tables need to know.

    Attributes:
        crosses_batch: in training the output of one example depends on the others.
        stateful: evaluation uses stored statistics, so that it differs from training.
        centers: over each area the mean is 0 before the recovery.
        scales: over each area the variance (or the mean square, if it does not center) is 1 before the recovery.
        whitens: over each area the covariance of the features is the identity before the recovery.
        shift_invariant: adding a constant to the input leaves the output as it was (statistics of the input in use).
        scale_invariant: a positive factor on the input leaves the output as it was, up to eps.
        true_gradient: backward is the gradient of forward; False where a method detaches or controls it on purpose.
        twice_differentiable: the backward pass can be differentiated.
        random: two training passes over the same input differ.
        ranks: numbers of dimensions of an input that the layer takes.
        channels_last: channels are on the last axis instead of axis 1.
        condition: what forward takes besides the input, one of `CONDITIONS`; "" for nothing.
    """

    crosses_batch: bool = False
    stateful: bool = False
    centers: bool = False
    scales: bool = False
    whitens: bool = False
    shift_invariant: bool = False
    scale_invariant: bool = False
    true_gradient: bool = True
    twice_differentiable: bool = True
    random: bool = False
    ranks: tuple[int, ...] = (2, 3, 4, 5)
    channels_last: bool = False
    condition: str = ""

    def __post_init__(self) -> None:
        """Refuse an unknown condition with an ArgumentError."""
        if self.condition not in CONDITIONS:
            raise unknown_name("condition", self.condition, CONDITIONS)


def require(value: object, name: str, options: Iterable[Any]) -> None:
    """Refuse a value of the argument `name` that is not among the options with an ArgumentError."""
    if value not in (known := list(options)):
        raise unknown_name(name, value, map(str, known))


def positive(value: float, name: str, why: str = "constant channels would be divided by zero") -> None:
    """Refuse a number that is not above zero.

    Args:
        value: the value received.
        name: name of the argument.
        why: what would go wrong.

    Raises:
        ArgumentError: it is zero, negative or not a number.
    """
    if not value > 0:
        raise ArgumentError(f"{name}={value!r} must be above 0: {why}; try {name}=1e-05.")


def divide(num_features: int, groups: int) -> int:
    """Return the number of channels in each group.

    Args:
        num_features: number of channels.
        groups: number of groups.

    Returns:
        num_features / groups.

    Raises:
        ArgumentError: groups is not a divisor.

    >>> divide(12, 4)
    3
    """
    if groups < 1 or num_features % groups:
        close = [g for g in range(1, num_features + 1) if num_features % g == 0]
        raise ArgumentError(f"groups={groups} does not divide num_features={num_features}; divisors: {close}.")
    return num_features // groups


def known_features(num_features: int | None, part: object) -> int:
    """Return the number of channels.

    Args:
        num_features: number of channels.
        part: who needs it.

    Returns:
        The same number.

    Raises:
        ArgumentError: it is missing.
    """
    if num_features is None:
        raise ArgumentError(f"num_features is missing: {part!r} needs the number of channels.")
    return num_features
