"""What every normalization of weights is: a map from raw tensors to the weight that a layer uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normscope.core.errors import ArgumentError

# what a positive factor on the raw weight may be of, so that the weight in use stays as it was
INVARIANCES = ("row", "tensor", "none")


@dataclass(frozen=True)
class Layout:
    """How a layer's weight is read as a matrix `(out, fan_in)`, a row for each output unit.

    Attributes:
        transposed: number of groups of a transposed convolution, whose weight is `(in, out / groups, *)`; 0 for others.
        conv: whether the layer is a convolution.
        kernel: number of taps of the kernel, 1 for a linear layer.
        groups: number of groups of a convolution.
    """

    transposed: int = 0
    conv: bool = False
    kernel: int = 1
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """Return the layout of a module's weight."""
        if not isinstance(module, _ConvNd):
            return cls()
        transposed = module.groups if isinstance(module, _ConvTransposeNd) else 0
        return cls(transposed, conv=True, kernel=math.prod(module.kernel_size), groups=module.groups)

    @property
    def dim(self) -> int:
        """The dimension of the weight that counts output units."""
        return 1 if self.transposed else 0

    def rows(self, weight: Tensor) -> Tensor:
        """Return a weight `(out, in, *)` as a matrix `(out, fan_in)`."""
        if not self.transposed:
            return weight.reshape(weight.shape[0], -1)
        groups, outputs = self.transposed, weight.shape[1]
        return weight.reshape(groups, -1, outputs, self.kernel).transpose(1, 2).reshape(groups * outputs, -1)

    def kernels(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the kernel `(out, in, *)` of each group; a matrix is a kernel of one tap."""
        kernel = weight if weight.ndim > 2 else weight[..., None]
        return tuple(k.transpose(0, 1) if self.transposed else k for k in kernel.chunk(self.groups))

    def back(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Return a matrix `(out, fan_in)` in the shape of the weight."""
        if not self.transposed:
            return rows.reshape(shape)
        groups, outputs = self.transposed, shape[1]
        return rows.reshape(groups, outputs, -1, self.kernel).transpose(1, 2).reshape(shape)


class Parametrization(nn.Module):
    """Base: `forward` maps raw tensors to the weight in use, `right_inverse` a weight to raw tensors.

    Attributes:
        invariance: "row", "tensor" or "none": a positive factor on each row (output unit) of the raw weight, or on the
            whole of it, leaves the weight in use as it was, up to eps.
        tolerance: largest deviation of a weight on the manifold, unless told otherwise: more than rounding where a
            method's eps or iteration leaves more.
    """

    invariance: str = "none"
    tolerance: float = 1e-6

    def __init__(self, layout: Layout) -> None:
        """Hold the layout."""
        super().__init__()
        self.layout = layout

    def right_inverse(self, weight: Tensor) -> Any:
        """Return raw tensors for a weight; the weight itself unless a method says otherwise."""
        return weight

    def retract(self, *raw: Tensor) -> tuple[Tensor, ...] | None:
        """Return what replaces the raw tensors after an optimizer's step; None where nothing is to be done."""
        return None

    def deviation(self, rows: Tensor) -> Tensor:
        """Return how far a matrix `(out, fan_in)` is from what this method makes; 0 on the manifold."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it makes.")

    @torch.no_grad()
    def in_manifold(self, weight: Tensor, tol: float | None = None) -> bool:
        """Tell whether a weight, in the shape of the layer's, is one that this method makes.

        Args:
            weight: the weight in use.
            tol: the largest deviation that passes; None for the method's `tolerance`.

        Returns:
            True if the deviation is at most `tol`; a weight with NaN or infinity is never in the manifold.
        """
        if not weight.isfinite().all():
            return False
        return bool(self.deviation(self.layout.rows(weight)) <= (self.tolerance if tol is None else tol))


class RowMap(Parametrization):
    """Base of methods that map the matrix `(out, fan_in)` of one raw tensor, of the weight's own shape."""

    def map(self, rows: Tensor) -> Tensor:
        """Return the matrix in use."""
        raise NotImplementedError

    def forward(self, raw: Tensor) -> Tensor:
        """Return the weight in use."""
        if raw.ndim == 2:
            return self.map(raw)
        return self.layout.back(self.map(self.layout.rows(raw)), raw.shape)


class Drawn(Parametrization):
    """Base of methods whose raw tensors cannot make every weight of the manifold: they start from a draw.

    Registered, the published initialization is drawn; later the weight cannot be assigned.
    """

    def __init__(self, layout: Layout) -> None:
        """Nothing is drawn yet."""
        super().__init__(layout)
        self.drawn = False

    def draw(self, weight: Tensor) -> Any:
        """Return raw tensors from the published initialization, for a weight of this shape."""
        raise NotImplementedError

    def right_inverse(self, weight: Tensor) -> Any:
        """Draw the raw tensors, once.

        Args:
            weight: of the shape, dtype and device wanted; its values are not used.

        Returns:
            The raw tensors.

        Raises:
            ArgumentError: the weight is assigned later on.
        """
        if self.drawn:
            raise ArgumentError(
                f"a weight under {type(self).__name__} cannot be assigned: its parameters do not make every matrix; "
                "set the originals in module.parametrizations, or weights.remove(model) first."
            )
        self.drawn = True
        return self.draw(weight)


def gram_deviation(rows: Tensor, scale: float = 1.0) -> Tensor:
    """Return the largest entry of |W W^T / scale^2 - I|, of the smaller of the two Gram matrices.

    Args:
        rows: matrices `[..., n, k]`.
        scale: length that rows (or columns) should have.

    Returns:
        A scalar.
    """
    gram = smaller_gram(rows / scale)
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax()


def smaller_gram(rows: Tensor) -> Tensor:
    """Return W W^T or W^T W, the smaller one."""
    return rows @ rows.mT if rows.shape[-2] <= rows.shape[-1] else rows.mT @ rows


def require_square(weight: Tensor, name: str, even: bool = False) -> int:
    """Return the size of a square matrix.

    Args:
        weight: the matrix.
        name: name of the method.
        even: whether the size must be even.

    Returns:
        The size.

    Raises:
        ArgumentError: it is not square, or of an odd size.
    """
    shape = tuple(weight.shape)
    if len(shape) != 2 or shape[0] != shape[1] or (even and shape[0] % 2):
        kind = "square matrix of even size" if even else "square matrix"
        raise ArgumentError(
            f"name={name!r} needs a {kind}, as weight_hh of an RNNCell, but this weight is {shape}; choose layers with "
            "where=..."
        )
    return shape[0]
