"""Normalized representation recovery: what gives a normalized activation back its freedom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.affine import scale_shift
from normscope.norms.part import Part, known_features

Pair = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, repr=False)
class Recovery(Part):
    """Base of the recoveries: `install` puts parameters on the layer, `apply` uses them.

    Attributes:
        condition: what forward takes besides the input, "" for nothing.
        pointwise: the output of an entry depends on the input through its normalized value alone.
    """

    condition: ClassVar[str] = ""
    pointwise: ClassVar[bool] = True

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register parameters or submodules.

        Args:
            host: the layer.
            num_features: number of channels.
        """

    def apply(self, host: Any, y: Tensor, x: Tensor, axis: int, condition: Any) -> Tensor:
        """Recover.

        Args:
            host: the layer that carries the parameters.
            y: the normalized activation, of the shape of x.
            x: the input of the layer.
            axis: the channel axis, 1 or -1.
            condition: what forward got besides the input.

        Returns:
            The output of the layer.
        """
        pair = self.coefficients(host, x, axis, condition)
        return y if pair is None else scaled(y, *pair, axis)

    def coefficients(self, host: Any, x: Tensor, axis: int, condition: Any) -> Pair | None:
        """Return scale and shift, `(C,)` or `(N, C)`, of a recovery y * scale + shift; None for any other.

        Args:
            host: the layer that carries the parameters.
            x: the input of the layer.
            axis: the channel axis, 1 or -1.
            condition: what forward got besides the input.

        Returns:
            Scale, None for 1, and shift, None for 0.
        """
        return None


@dataclass(frozen=True, repr=False)
class Bare(Recovery):
    """Leave the normalized values as they are."""

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register weight and bias as None, as torch's layers without them do."""
        host.register_parameter("weight", None)
        host.register_parameter("bias", None)


def channels(v: Tensor, y: Tensor, axis: int) -> Tensor:
    """Shape a value per channel `(C,)` or `(N, C)` so that it broadcasts against y."""
    if axis == -1:
        return v if v.ndim == 1 else v.reshape(v.shape[0], *(1,) * (y.ndim - 2), v.shape[1])
    return v.reshape(*v.shape, *(1,) * (y.ndim - 2))


def scaled(y: Tensor, scale: Tensor | None, shift: Tensor | None, axis: int) -> Tensor:
    """Return y * scale + shift, values `(C,)` or `(N, C)`, None for 1 and 0."""
    if axis == 1:
        return scale_shift(y, *(v if v is None else v.reshape(-1, y.shape[1]) for v in (scale, shift)))
    y = y if scale is None else y * channels(scale, y, axis)
    return y if shift is None else y + channels(shift, y, axis)


@dataclass(frozen=True, repr=False)
class Affine(Recovery):
    """Scale and shift each channel: y * (offset + weight) + bias.

    Attributes:
        scale: there is a weight.
        shift: there is a bias.
        init: initial weight.
        offset: added to the weight; 1 with init 0 is the zero-centered weight of some language models.
        shape: one weight for each entry of this trailing shape instead of each channel, as in torch's LayerNorm.
    """

    scale: bool = True
    shift: bool = True
    init: float = 1.0
    offset: float = 0.0
    shape: tuple[int, ...] = ()

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register weight and bias, None where there is none."""
        shape = self.shape or (known_features(num_features, self),)
        host.register_parameter("weight", nn.Parameter(torch.full(shape, self.init)) if self.scale else None)
        host.register_parameter("bias", nn.Parameter(torch.zeros(shape)) if self.shift else None)

    def gain(self, host: Any) -> tuple[Tensor | None, Tensor | None]:
        """Return offset + weight, and bias; None where there is none."""
        weight = host.weight
        return (weight + self.offset if weight is not None and self.offset else weight), host.bias

    def apply(self, host: Any, y: Tensor, x: Tensor, axis: int, condition: Any) -> Tensor:
        """Scale and shift."""
        weight, bias = self.gain(host)
        if not self.shape:
            return scaled(y, weight, bias, axis)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def coefficients(self, host: Any, x: Tensor, axis: int, condition: Any) -> Pair | None:
        """Return weight and bias of the channels."""
        return None if self.shape else self.gain(host)


@dataclass(frozen=True, repr=False)
class Coloring(Recovery):
    """Mix the channels linearly: y_i = sum_j M_ij y_j + bias_i, M initially the identity.

    Attributes:
        groups: the matrix is block diagonal with this many blocks.
        shift: there is a bias.
    """

    groups: int = 1
    shift: bool = True

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register weight `(C, C / groups)` and bias `(C,)`."""
        count = known_features(num_features, self)
        size = count // self.groups
        host.register_parameter("weight", nn.Parameter(torch.eye(size).repeat(self.groups, 1)))
        host.register_parameter("bias", nn.Parameter(torch.zeros(count)) if self.shift else None)

    def apply(self, host: Any, y: Tensor, x: Tensor, axis: int, condition: Any) -> Tensor:
        """Mix the channels."""
        y = mixed(host.weight, y, axis, self.groups)
        return y if host.bias is None else y + channels(host.bias, y, axis)


def mixed(weight: Tensor, y: Tensor, axis: int, groups: int = 1) -> Tensor:
    """Multiply the channels by a matrix `(C, C / groups)`, or by one for each example `(N, C, C / groups)`."""
    z = y if axis == 1 else y.movedim(-1, 1)
    size = weight.shape[-1]
    flat = z.reshape(z.shape[0], groups, size, -1)
    out = (weight.reshape(-1, groups, size, size) @ flat).reshape(z.shape)
    return out if axis == 1 else out.movedim(1, -1)


@dataclass(frozen=True, repr=False)
class Conditional(Recovery):
    """Scale and shift each channel by the class of the example: y * (offset + weight[class]) + bias[class].

    Attributes:
        classes: number of classes.
        init: initial weight.
        offset: added to the weight.
    """

    classes: int
    init: float = 1.0
    offset: float = 0.0
    condition: ClassVar[str] = "labels"

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register weight and bias `(classes, C)`."""
        shape = (self.classes, known_features(num_features, self))
        host.register_parameter("weight", nn.Parameter(torch.full(shape, self.init)))
        host.register_parameter("bias", nn.Parameter(torch.zeros(shape)))

    def coefficients(self, host: Any, x: Tensor, axis: int, condition: Any) -> Pair | None:
        """Return weight and bias of the class.

        Args:
            host: the layer.
            x: the input.
            axis: the channel axis.
            condition: labels `(N,)`, or weights over the classes `(N, classes)` that mix them.

        Returns:
            Scale and shift.

        Raises:
            ArgumentError: no labels were given.
        """
        if not isinstance(condition, Tensor):
            raise ArgumentError(f"condition={condition!r}: {self!r} needs the labels (N,); call layer(x, labels).")
        if condition.is_floating_point():
            weight, bias = condition @ host.weight, condition @ host.bias
        else:
            weight, bias = host.weight[condition], host.bias[condition]
        return weight + self.offset, bias
