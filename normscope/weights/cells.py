"""Recurrent cells for orthogonal and unitary weights, and the activations that go with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normscope.core.errors import unknown_name
from normscope.weights.layers import apply


def modrelu(x: Tensor, bias: Tensor, offset: float = 0.0) -> Tensor:
    """Shrink magnitudes: sign(x) relu(|x| + offset + b)."""
    return x.sign() * (x.abs() + (offset + bias)).relu()


def complex_modrelu(x: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Shrink the moduli of a state [Re, Im]: z relu(|z| + b) / (|z| + eps), b for each complex entry."""
    re, im = x.chunk(2, -1)
    # the root of an exact zero has no gradient
    modulus = (re.square() + im.square()).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
    scale = (modulus + bias).relu() / (modulus + eps)
    return x * torch.cat([scale, scale], -1)


class ShiftedReLU(nn.Module):
    """Shifted ReLU of isometric networks: relu(x - b) + b, b for each channel, -1 at first.

    Args:
        num_features: number of channels, on axis 1.
    """

    def __init__(self, num_features: int) -> None:
        """Register b."""
        super().__init__()
        self.bias = nn.Parameter(torch.full((num_features,), -1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Clip from below: max(x, b)."""
        b = self.bias.reshape(-1, *([1] * (x.ndim - 2)))
        return (x - b).relu() + b


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "modrelu": modrelu,
    "complex-modrelu": complex_modrelu,
    "absolute": lambda x, bias: (x + bias).abs(),
}


class OrthogonalCell(nn.Module):
    """Recurrent cell h' = f(U x + W h, b) with W under a method of `zoo`.

    Args:
        input_size: of x.
        hidden_size: of h; the state [Re, Im] of a unitary method has twice as many entries as complex units.
        weight: a name of `zoo`, as "scaled-cayley", "givens", "unitary".
        activation: f: "modrelu", "complex-modrelu" for a state [Re, Im], or "absolute" as with Givens rotations.
        **options: of the method.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        weight: str = "exponential",
        activation: str = "modrelu",
        **options: Any,
    ) -> None:
        """Register U, W and b."""
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        super().__init__()
        self.hidden_size, self.activation = hidden_size, activation
        self.weight_ih = nn.Parameter(nn.init.xavier_normal_(torch.empty(hidden_size, input_size)))
        self.weight_hh = nn.Parameter(nn.init.orthogonal_(torch.empty(hidden_size, hidden_size)))
        count = hidden_size // 2 if activation == "complex-modrelu" else hidden_size
        self.bias = nn.Parameter(torch.empty(count).uniform_(-0.01, 0.01))
        apply(self, weight, where="", parameter="weight_hh", **options)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """Return the next state `(N, hidden_size)` for an input `(N, input_size)`; a missing state is zero."""
        total = x @ self.weight_ih.mT
        if state is not None:
            total = total + state @ self.weight_hh.mT
        return ACTIVATIONS[self.activation](total, self.bias)


class GatedOrthogonalCell(nn.Module):
    """Gated orthogonal recurrent unit: gates of a GRU about an orthogonal recurrence.

    r, z = sigmoid(W x + U h + b); c = modrelu(V x + r * (Q h), b'); h' = z * h + (1 - z) * c, Q orthogonal.

    Args:
        input_size: of x.
        hidden_size: of h, even.
        capacity: number of layers of rotations of Q.
        style: "tunable" or "fft".
    """

    def __init__(self, input_size: int, hidden_size: int, capacity: int = 2, style: str = "tunable") -> None:
        """Register gates and rotations."""
        super().__init__()
        self.gates = nn.Linear(input_size + hidden_size, 2 * hidden_size)
        self.input = nn.Linear(input_size, hidden_size, bias=False)
        self.recurrent = nn.Linear(hidden_size, hidden_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        apply(self.recurrent, "gated-orthogonal-recurrent", nn.Linear, capacity=capacity, style=style)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """Return the next state `(N, hidden_size)` for an input `(N, input_size)`."""
        r, z = self.gates(torch.cat([x, state], -1)).sigmoid().chunk(2, -1)
        candidate = modrelu(self.input(x) + r * self.recurrent(state), self.bias, offset=1e-3)
        following: Tensor = z * state + (1 - z) * candidate
        return following
