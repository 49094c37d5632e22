"""Products of rotations of pairs of coordinates: Givens, and the layers of efficient unitary networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.norms.part import require
from normscope.weights.parametrization import Drawn, Layout, gram_deviation, require_square

Pairs = list[list[tuple[int, int]]]


def round_robin(n: int) -> Pairs:
    """Return rounds of disjoint pairs in which each pair of 0 to n - 1 stands once.

    Args:
        n: number of coordinates; an odd one leaves one out in each round.

    Returns:
        Rounds of pairs.

    >>> round_robin(4)
    [[(0, 3), (1, 2)], [(0, 2), (3, 1)], [(0, 1), (2, 3)]]
    """
    players = [*range(n), *([-1] if n % 2 else [])]
    half = len(players) // 2
    rounds = []
    for _ in range(len(players) - 1):
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append([pair for pair in pairs if -1 not in pair])
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def neighbors(n: int, capacity: int) -> Pairs:
    """Return layers of neighboring pairs, (0, 1), (2, 3), ... and (1, 2), (3, 4), ... in turn.

    Args:
        n: number of coordinates, even.
        capacity: number of layers.

    Returns:
        Layers of pairs.
    """
    return [[(i, i + 1) for i in range(layer % 2, n - 1, 2)] for layer in range(capacity)]


def butterflies(n: int) -> Pairs:
    """Return the log2(n) layers of a fast Fourier transform: pairs n / 2, n / 4, ..., 1 apart.

    Args:
        n: number of coordinates, a power of 2.

    Returns:
        Layers of pairs.

    >>> butterflies(4)
    [[(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    """
    strides = [n >> k for k in range(1, n.bit_length())]
    return [[(b + i, b + i + s) for i in range(s) for b in range(0, n, 2 * s)] for s in strides]


class Rotations(Drawn):
    """Product of layers of rotations (a, b) -> (cos a - sin b, sin a + cos b) of disjoint pairs; the first acts first.

    Args:
        layout: of the weight.
        weight: example, square.
        pairs: layers of disjoint pairs.
    """

    pairs: Tensor

    def __init__(self, layout: Layout, weight: Tensor, pairs: Pairs) -> None:
        """Hold the pairs."""
        super().__init__(layout)
        self.size = len(weight)
        self.counts = [len(layer) for layer in pairs]
        flat = [pair for layer in pairs for pair in layer]
        self.register_buffer("pairs", torch.tensor(flat, device=weight.device).reshape(-1, 2))

    def draw(self, weight: Tensor) -> Tensor:
        """Return angles from U(-pi, pi), those of the first layer first."""
        return weight.new_empty(len(self.pairs)).uniform_(-math.pi, math.pi)

    def forward(self, theta: Tensor) -> Tensor:
        """Return the product."""
        rows = torch.eye(self.size, dtype=theta.dtype, device=theta.device)
        cosines, sines = theta.cos()[:, None], theta.sin()[:, None]
        layers = (torch.split(part, self.counts) for part in (self.pairs, cosines, sines))
        for pairs, c, s in zip(*layers, strict=True):
            first, second = pairs.unbind(1)
            a, b = rows[first], rows[second]
            rows = rows.index_copy(0, first, c * a - s * b).index_copy(0, second, s * a + c * b)
        return rows

    def deviation(self, rows: Tensor) -> Tensor:
        """An orthogonal matrix."""
        return gram_deviation(rows)


def givens(layout: Layout, weight: Tensor, *, layers: int | None = None) -> Rotations:
    """Make a product of Givens rotations in which each pair of coordinates is rotated once.

    Args:
        layout: of the weight.
        weight: example, square.
        layers: number of layers of disjoint pairs; None for all.

    Returns:
        The parametrization.

    Raises:
        ArgumentError: there are not so many layers.
    """
    pairs = round_robin(require_square(weight, "givens"))
    if layers is not None and not 1 <= layers <= len(pairs):
        raise ArgumentError(f"layers={layers!r} must be from 1 to {len(pairs)}, or None for all.")
    return Rotations(layout, weight, pairs[:layers])


def gated(layout: Layout, weight: Tensor, *, capacity: int = 2, style: str = "tunable") -> Rotations:
    """Make the rotations of gated orthogonal recurrent units; `GatedOrthogonalCell` has the gates.

    Args:
        layout: of the weight.
        weight: example, square and of even size.
        capacity: number of layers of the "tunable" style.
        style: "tunable", layers of neighboring pairs, or "fft", log2(n) layers of pairs n / 2 to 1 apart.

    Returns:
        The parametrization.

    Raises:
        ArgumentError: size, capacity or style cannot work.
    """
    require(style, "style", ("tunable", "fft"))
    n = require_square(weight, "gated-orthogonal-recurrent", even=True)
    if style == "fft":
        if n & (n - 1):
            raise ArgumentError(f"style='fft' needs a size that is a power of 2, not {n}; try style='tunable'.")
        return Rotations(layout, weight, butterflies(n))
    if capacity < 1:
        raise ArgumentError(f"capacity={capacity!r} must be at least 1, the number of layers; the default is 2.")
    return Rotations(layout, weight, neighbors(n, capacity))
