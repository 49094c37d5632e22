"""Recoveries whose scale and shift come from outside: a style, a class, a vector, a map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope.core.errors import ArgumentError
from normscope.norms.area import spatial
from normscope.norms.families.recoveries_moments import moments
from normscope.norms.part import divide, known_features
from normscope.norms.recovery import Affine, Conditional, Pair, Recovery, channels, mixed


def needed(condition: Any, part: object, what: str) -> Tensor:
    """Return the condition as a tensor.

    Args:
        condition: what forward got besides the input.
        part: who needs it.
        what: what it is, for the message.

    Returns:
        The condition.

    Raises:
        ArgumentError: it is no tensor.
    """
    if not isinstance(condition, Tensor):
        raise ArgumentError(f"condition={condition!r}: {part!r} needs {what}; call layer(x, condition).")
    return condition


def scale_and_shift(condition: Any, count: int, part: object) -> tuple[Tensor, Tensor]:
    """Return scale and shift `(N, C)` from a pair, or from `(N, 2C)` that holds the scales first.

    Args:
        condition: the pair or the tensor.
        count: number of channels.
        part: who needs it.

    Returns:
        Scale and shift.

    Raises:
        ArgumentError: the condition is neither.
    """
    if isinstance(condition, tuple | list) and len(condition) == 2:
        first, second = condition
        return first.reshape(-1, count), second.reshape(-1, count)
    if isinstance(condition, Tensor) and condition.ndim == 2 and condition.shape[1] == 2 * count:
        return condition[:, :count], condition[:, count:]
    found = tuple(condition.shape) if isinstance(condition, Tensor) else condition
    raise ArgumentError(
        f"condition={found!r}: {part!r} needs a style of shape (N, {2 * count}), scales then shifts, or a pair of them."
    )


@dataclass(frozen=True, repr=False)
class Injected(Recovery):
    """Scale and shift each channel by what forward gets: y * scale + shift, from `(N, 2C)` or a pair."""

    condition: ClassVar[str] = "style"

    def coefficients(self, host: Any, x: Tensor, axis: int, condition: Any) -> Pair | None:
        """Scale and shift."""
        scale, shift = scale_and_shift(condition, x.shape[axis], self)
        return scale.to(x.dtype), shift.to(x.dtype)


@dataclass(frozen=True, repr=False)
class StyleStatistics(Injected):
    """Give each channel the mean and the standard deviation of a style: y * sd(s) + mean(s).

    The style is an activation `(N, C, *)`, or `(N, 2C)` with standard deviations and means at hand.

    Attributes:
        eps: added to the unbiased variance of the style.
    """

    eps: float = 1e-5

    def coefficients(self, host: Any, x: Tensor, axis: int, condition: Any) -> Pair | None:
        """Scale and shift by the statistics of the style."""
        if not isinstance(condition, Tensor) or condition.ndim == 2:
            return super().coefficients(host, x, axis, condition)
        if condition.shape[1] != x.shape[1]:
            raise ArgumentError(
                f"condition has shape {tuple(condition.shape)}: {self!r} needs a style with {x.shape[1]} channels."
            )
        mean, var = moments(spatial(condition.to(x.dtype)), unbiased=True)
        return super().coefficients(host, x, axis, ((var + self.eps).sqrt(), mean))


class EqualizedLinear(nn.Module):
    """A linear layer whose weights are of unit variance and multiplied by sqrt(2 / size) when used."""

    def __init__(self, size: int, outputs: int) -> None:
        """Register weight ~ N(0, 1) and bias."""
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, size)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, size)` to `(N, outputs)`."""
        return F.linear(x, self.weight * math.sqrt(2 / self.weight.shape[1]), self.bias)


@dataclass(frozen=True, repr=False)
class Modulated(Recovery):
    """Predict scale and shift from a vector for each example: y * (1 + V h) + U h, h the vector or hidden units of it.

    Attributes:
        size: length of the vector.
        hidden: number of hidden units relu(W v + b) between, 0 for none.
        shared: scale and shift share the hidden units.
        shift: V and U have a bias; the 1 is then its initial value.
        std: standard deviation of initial weights, 0 to start from the plain normalization.
        equalized: weights of unit variance that are scaled when used, as in style-based generators; std is not used.
        silu: h = silu(vector), as in diffusion transformers.
    """

    size: int
    hidden: int = 0
    shared: bool = True
    shift: bool = True
    std: float = 0.02
    equalized: bool = False
    silu: bool = False
    condition: ClassVar[str] = "style"

    def _linear(self, size: int, outputs: int, start: float, bias: bool = True) -> nn.Module:
        layer = EqualizedLinear(size, outputs) if self.equalized else nn.Linear(size, outputs, bias)
        if not self.equalized:
            nn.init.normal_(layer.weight, std=self.std)
        if isinstance(layer.bias, Tensor):
            nn.init.constant_(layer.bias, start)
        return layer

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register the layers trunk (if hidden units are shared), to_scale and to_shift."""
        count = known_features(num_features, self)
        trunk = self.hidden and self.shared
        if trunk:
            host.add_module("trunk", nn.Sequential(self._hidden(), nn.ReLU()))
        for name, start in (("to_scale", 1.0), ("to_shift", 0.0)):
            layer = self._linear(self.hidden or self.size, count, start, self.shift)
            if self.hidden and not self.shared:
                layer = nn.Sequential(self._hidden(), nn.ReLU(), layer)
            host.add_module(name, layer)

    def _hidden(self) -> nn.Module:
        # weights of 0 in two layers would never move
        layer = nn.Linear(self.size, self.hidden)
        if self.std:
            nn.init.normal_(layer.weight, std=self.std)
            nn.init.zeros_(layer.bias)
        return layer

    def coefficients(self, host: Any, x: Tensor, axis: int, condition: Any) -> Pair | None:
        """Scale and shift by the vector `(N, size)`."""
        v = needed(condition, self, f"a vector of length {self.size} for each example").to(x.dtype)
        v = F.silu(v) if self.silu else v
        v = host.trunk(v) if self.hidden and self.shared else v
        scale = host.to_scale(v) if self.shift else 1 + host.to_scale(v)
        return scale, host.to_shift(v)


@dataclass(frozen=True, repr=False)
class Sandwich(Conditional):
    """Scale and shift for all classes, then for each class: class_weight[c] * (weight y + bias) + class_bias[c].

    Attributes:
        std: standard deviation of the initial weights of the classes.
    """

    std: float = 0.02

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register weight, bias `(C,)`, class_weight ~ N(1, std) and class_bias `(classes, C)`."""
        count = known_features(num_features, self)
        Affine().install(host, count)
        noise = self.std * torch.randn(self.classes, count)
        host.register_parameter("class_weight", nn.Parameter(self.init + noise))
        host.register_parameter("class_bias", nn.Parameter(torch.zeros(self.classes, count)))

    def coefficients(self, host: Any, x: Tensor, axis: int, condition: Any) -> Pair | None:
        """Scale and shift by labels `(N,)`, or by weights over the classes `(N, classes)`."""
        labels = needed(condition, self, "labels (N,)")
        mixing = labels.to(x.dtype) if labels.is_floating_point() else F.one_hot(labels, self.classes).to(x.dtype)
        gain = mixing @ host.class_weight + self.offset
        return gain * host.weight, gain * host.bias + mixing @ host.class_bias


@dataclass(frozen=True, repr=False)
class SpatiallyAdaptive(Recovery):
    """Predict scale and shift at each position from a map: y * (1 + gain(h)) + shift(h), h = relu(conv(map)).

    The map `(N, labels, H', W')` is resized to the size of the input by its nearest entries.

    Attributes:
        labels: number of channels of the map.
        hidden: number of channels between.
        kernel: size of the three convolutions, odd.
    """

    labels: int
    hidden: int = 128
    kernel: int = 3
    condition: ClassVar[str] = "map"

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register the convolutions map_hidden, map_gain and map_shift."""
        count = known_features(num_features, self)
        padding = self.kernel // 2
        host.add_module("map_hidden", nn.Conv2d(self.labels, self.hidden, self.kernel, padding=padding))
        host.add_module("map_gain", nn.Conv2d(self.hidden, count, self.kernel, padding=padding))
        host.add_module("map_shift", nn.Conv2d(self.hidden, count, self.kernel, padding=padding))

    def apply(self, host: Any, y: Tensor, x: Tensor, axis: int, condition: Any) -> Tensor:
        """Scale and shift by the map."""
        given = needed(condition, self, f"a map (N, {self.labels}, H, W)")
        if y.ndim != 4 or given.ndim != 4 or given.shape[1] != self.labels:
            raise ArgumentError(
                f"condition of shape {tuple(given.shape)} with x of shape {tuple(y.shape)}: {self!r} needs images "
                f"(N, C, H, W) and maps (N, {self.labels}, H, W)."
            )
        resized = F.interpolate(given.to(y.dtype), size=y.shape[2:], mode="nearest")
        h = torch.relu(host.map_hidden(resized))
        out: Tensor = y * (1 + host.map_gain(h)) + host.map_shift(h)
        return out


@dataclass(frozen=True, repr=False)
class DynamicConvolution(Recovery):
    """Convolve each example with a filter predicted from its style vector: conv(y, W(v)) + b(v).

    At first the filter of every style is near the identity.

    Attributes:
        size: length of the vector.
        kernel: size of the filter, odd; above 1 the input must be a map.
        groups: the filter connects channels within so many groups.
        std: standard deviation of the initial weights of the prediction.
    """

    size: int
    kernel: int = 1
    groups: int = 1
    std: float = 0.02
    condition: ClassVar[str] = "style"

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register the layers to_filter and to_shift."""
        count = known_features(num_features, self)
        width = divide(count, self.groups)
        start = torch.zeros(count, width, self.kernel**2)
        start[torch.arange(count), torch.arange(count) % width, self.kernel**2 // 2] = 1
        to_filter, to_shift = nn.Linear(self.size, start.numel()), nn.Linear(self.size, count)
        for layer, bias in ((to_filter, start.flatten()), (to_shift, torch.zeros(count))):
            nn.init.normal_(layer.weight, std=self.std)
            with torch.no_grad():
                layer.bias.copy_(bias)
        host.add_module("to_filter", to_filter)
        host.add_module("to_shift", to_shift)

    def apply(self, host: Any, y: Tensor, x: Tensor, axis: int, condition: Any) -> Tensor:
        """Convolve by the style `(N, size)`."""
        v = needed(condition, self, f"a style vector of length {self.size} for each example").to(y.dtype)
        count = y.shape[axis]
        filters = host.to_filter(v).reshape(y.shape[0], count, count // self.groups, self.kernel**2)
        shift = channels(host.to_shift(v), y, axis)
        if self.kernel == 1:
            return mixed(filters.squeeze(-1), y, axis, self.groups) + shift
        if y.ndim != 4 or axis != 1:
            raise ArgumentError(f"x of shape {tuple(y.shape)}: {self!r} needs images (N, C, H, W); or use kernel=1.")
        kernels = filters.reshape(-1, count // self.groups, self.kernel, self.kernel)
        out = F.conv2d(y.reshape(1, -1, *y.shape[2:]), kernels, padding=self.kernel // 2, groups=len(y) * self.groups)
        return out.reshape(y.shape) + shift
