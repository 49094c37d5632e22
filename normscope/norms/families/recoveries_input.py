"""Recoveries whose scale and shift are predicted from the input of the layer itself."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.area import Batch, Group, spatial
from normscope.norms.families.recoveries_moments import moments
from normscope.norms.layer import Norm
from normscope.norms.operation import Standardize
from normscope.norms.part import known_features, positive, require
from normscope.norms.population import Running
from normscope.norms.recovery import Affine, Pair, Recovery


def positions(x: Tensor, axis: int) -> Tensor:
    """Reorder to `(N, C, L)`, whatever the channel axis."""
    return spatial(x if axis == 1 else x.movedim(-1, 1))


def several(count: int, x: Tensor, part: object) -> None:
    """Refuse a variance of a single sample.

    Args:
        count: number of samples.
        x: the input.
        part: who needs the variance.

    Raises:
        ArgumentError: there are fewer than two.
    """
    if count < 2:
        raise ArgumentError(f"x of shape {tuple(x.shape)} has too few samples, {count}, for the variance in {part!r}.")


@dataclass(frozen=True, repr=False)
class InstanceEnhancement(Recovery):
    """Scale by a gain that each example gates: y * weight * sigmoid(a mean(x) + b) + bias, mean of x over space.

    Attributes:
        gate: initial b; a starts from 0, so that the gate does not depend on the example at first.
    """

    gate: float = -1.0
    pointwise: ClassVar[bool] = False

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register weight and bias, gate_weight (a) and gate_bias (b), all `(C,)`."""
        count = known_features(num_features, self)
        Affine().install(host, count)
        host.register_parameter("gate_weight", nn.Parameter(torch.zeros(count)))
        host.register_parameter("gate_bias", nn.Parameter(torch.full((count,), self.gate)))

    def coefficients(self, host: Any, x: Tensor, axis: int, condition: Any) -> Pair | None:
        """Scale by the gated gain and shift."""
        gate = torch.sigmoid(positions(x, axis).mean(2) * host.gate_weight + host.gate_bias)
        return host.weight * gate, host.bias


@dataclass(frozen=True, repr=False)
class InstanceMeta(Recovery):
    """Predict scale and shift from mean and variance of groups of channels of each example.

    scale = sigmoid(W2 relu(W1 var)) + weight, shift = tanh(W3 relu(W1 mean)) + bias; each prediction holds for the
    channels of its group, weight and bias are per channel.

    Attributes:
        keys: number of groups whose statistics are used.
        hidden: number of hidden units.
        unbiased: the variance divides by n - 1.
        crossed: predict the scale from the mean and the shift from the variance (associate normalization).
    """

    keys: int
    hidden: int
    unbiased: bool = True
    crossed: bool = False
    pointwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse less than one hidden unit with an ArgumentError."""
        positive(self.hidden, "hidden", "nothing would be predicted")

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register weight and bias `(C,)` and the layers embed (W1), to_scale (W2), to_shift (W3) without bias."""
        count = known_features(num_features, self)
        Group(self.keys).rows(count)
        Affine().install(host, count)
        host.add_module("embed", nn.Linear(self.keys, self.hidden, bias=False))
        host.add_module("to_scale", nn.Linear(self.hidden, self.keys, bias=False))
        host.add_module("to_shift", nn.Linear(self.hidden, self.keys, bias=False))

    def coefficients(self, host: Any, x: Tensor, axis: int, condition: Any) -> Pair | None:
        """Predict scale and shift and use them."""
        z = Group(self.keys).split(x if axis == 1 else x.movedim(-1, 1)).flatten(2)
        if self.unbiased:
            several(z.shape[2], x, self)
        mean, var = moments(z, self.unbiased)
        first, second = (mean, var) if self.crossed else (var, mean)
        size = host.num_features // self.keys
        scale = torch.sigmoid(host.to_scale(torch.relu(host.embed(first))))
        shift = torch.tanh(host.to_shift(torch.relu(host.embed(second))))
        scale = scale.repeat_interleave(size, 1) + host.weight
        shift = shift.repeat_interleave(size, 1) + host.bias
        return scale, shift


class HardSigmoid(nn.Module):
    """Clip x / 6 + 1/2 to [0, 1]; torch's own has a constant of single precision and no second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        """Return relu6(x + 3) / 6."""
        return (x + 3).clamp(0, 6) / 6


# name: number of linear layers, batch normalization after each, the function at the end
ATTENTIONS: dict[str, tuple[int, bool, type[nn.Module]]] = {
    "bn-hsigmoid": (1, True, HardSigmoid),
    "bn-sigmoid": (1, True, nn.Sigmoid),
    "bn-softmax": (1, True, nn.Softmax),
    "two-bn-hsigmoid": (2, True, HardSigmoid),
    "sigmoid": (1, False, nn.Sigmoid),
    "hsigmoid": (1, False, HardSigmoid),
    "two-sigmoid": (2, False, nn.Sigmoid),
}


def attention(name: str, num_features: int, mixtures: int) -> nn.Sequential:
    """Return the layers that weigh the mixtures.

    Args:
        name: one of `ATTENTIONS`.
        num_features: number of inputs.
        mixtures: number of outputs.

    Returns:
        The layers; between two linear layers stands a ReLU.
    """
    depth, normalized, function = ATTENTIONS[name]
    sizes = [num_features, *([2 * mixtures] if depth == 2 else []), mixtures]
    layers: list[nn.Module] = []
    for size, after in pairwise(sizes):
        layers += [nn.ReLU()] if layers else []
        layers.append(nn.Linear(size, after, bias=not normalized))
        layers += [Norm(Batch(), Standardize(), Affine(), Running(), num_features=after)] if normalized else []
    layers.append(nn.Softmax(1) if function is nn.Softmax else function())
    return nn.Sequential(*layers)


@dataclass(frozen=True, repr=False)
class Attentive(Recovery):
    """Mix several scales and shifts by attention: sum_k a_k (weight_k y + bias_k).

    a = attention(mean(x) / sqrt(var(x) + 1e-3)), mean and unbiased variance of each channel over space.

    Attributes:
        mixtures: number of scales and shifts.
        kind: the layers of the attention, one of `ATTENTIONS`; those with "bn" take batch statistics.
    """

    mixtures: int = 10
    kind: str = "bn-hsigmoid"
    pointwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse an unknown attention with an ArgumentError."""
        require(self.kind, "attention", ATTENTIONS)

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register weight ~ N(1, 0.1) and bias ~ N(0, 0.1), both `(mixtures, C)`, and the attention."""
        count = known_features(num_features, self)
        host.register_parameter("weight", nn.Parameter(1 + 0.1 * torch.randn(self.mixtures, count)))
        host.register_parameter("bias", nn.Parameter(0.1 * torch.randn(self.mixtures, count)))
        host.add_module("attention", attention(self.kind, count, self.mixtures))

    def coefficients(self, host: Any, x: Tensor, axis: int, condition: Any) -> Pair | None:
        """Weigh the mixtures and use their sum."""
        z = positions(x, axis)
        several(z.shape[2], x, self)
        mean, var = moments(z, unbiased=True)
        weights = host.attention(mean * (var + 1e-3).rsqrt())
        return weights @ host.weight, weights @ host.bias


@dataclass(frozen=True, repr=False)
class Utterance(Recovery):
    """Predict scale and shift from a summary of each sequence: a = mean over positions of tanh(W s + b).

    scale = V a + 1, shift = U a; V and U start from 0 and have a bias, so that training starts from plain layer
    normalization. The sequence s is the input, or with `features` another one that forward gets.

    Attributes:
        size: number of units of the summary.
        features: number of channels of the other sequence `(N, L, features)`, 0 for the input itself.
    """

    size: int = 64
    features: int = 0

    @property
    def condition(self) -> str:  # type: ignore[override]
        """A sequence, if one is summed up beside the input."""
        return "other" if self.features else ""

    @property
    def pointwise(self) -> bool:  # type: ignore[override]
        """The summary of the input depends on its scale."""
        return self.features > 0

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register the layers summary (W), to_scale (V) and to_shift (U)."""
        count = known_features(num_features, self)
        host.add_module("summary", nn.Linear(self.features or count, self.size))
        for name, start in (("to_scale", 1.0), ("to_shift", 0.0)):
            layer = nn.Linear(self.size, count)
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, start)
            host.add_module(name, layer)

    def coefficients(self, host: Any, x: Tensor, axis: int, condition: Any) -> Pair | None:
        """Scale and shift by the summary of the sequence."""
        sequence = positions(x, axis).mT
        if self.features:
            if not isinstance(condition, Tensor) or condition.shape[-1] != self.features:
                found = tuple(condition.shape) if isinstance(condition, Tensor) else condition
                raise ArgumentError(
                    f"condition={found!r}: {self!r} needs a sequence (N, L, {self.features}); call layer(x, sequence)."
                )
            sequence = condition.to(x.dtype)
        a = torch.tanh(host.summary(sequence)).mean(1)
        return host.to_scale(a), host.to_shift(a)
