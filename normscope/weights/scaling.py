"""Methods that center and scale each output unit's weights on their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from normscope.norms.part import positive, require
from normscope.weights.parametrization import Layout, Parametrization, RowMap


def length_deviation(rows: Tensor) -> Tensor:
    """Return how far the length of a row is from 1 at most."""
    off: Tensor = (torch.linalg.vector_norm(rows, dim=1) - 1).abs().amax()
    return off


class _FusedRows(torch.autograd.Function):
    """w = g v / |v| for each row by torch's fused kernels; the gradient is written out where it is differentiated."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, v: Tensor) -> Tensor:
        """Scale the rows."""
        g, v = g.contiguous(), v.contiguous()
        w, length = torch._weight_norm_interface(v, g)
        ctx.save_for_backward(g, v, length)
        return w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return dg = <dw, v / |v|> and dv = g / |v| (dw - dg v / |v|)."""
        g, v, length = ctx.saved_tensors
        grad = grads[0].contiguous()
        if not torch.is_grad_enabled():
            dv, dg = torch.ops.aten._weight_norm_interface_backward.default(grad, v, g, length, 0)
            return dg, dv
        dims = tuple(range(1, v.ndim))
        length = torch.linalg.vector_norm(v, dim=dims, keepdim=True)
        unit = v / length
        dg = (grad * unit).sum(dims, keepdim=True)
        return dg, g / length * (grad - dg * unit)


def _eager() -> bool:
    """Tell whether fused kernels may run: a compiler, torch.func and forward mode see the product instead."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return forward_ad._current_level < 0


class WeightNorm(Parametrization):
    """Weight normalization: w = g v / |v|, a length g for each output unit, or one for the tensor.

    Raw tensors and their names are those of torch.nn.utils.parametrizations.weight_norm, so that states fit both; its
    second derivative for lengths of rows is wrong (torch 2.13), so only its kernels are taken.

    Args:
        layout: of the weight.
        weight: example.
        per: "row" or "tensor", what has a length.
    """

    def __init__(self, layout: Layout, weight: Tensor, per: str = "row") -> None:
        """Choose the dimensions of a length."""
        require(per, "per", ("row", "tensor"))
        super().__init__(layout)
        self.invariance, self.dim = per, layout.dim
        self.dims = None if per == "tensor" else tuple(d for d in range(weight.ndim) if d != layout.dim)

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """Return the weight in use."""
        if self.dims and _eager():
            if not (torch.is_grad_enabled() and (g.requires_grad or v.requires_grad)):
                return torch._weight_norm(v, g, self.dim)
            if self.dim == 0 and v.dtype in (torch.float32, torch.float64):
                fused: Tensor = _FusedRows.apply(g, v)  # type: ignore[no-untyped-call]
                return fused
        scaled: Tensor = v * (g / torch.linalg.vector_norm(v, dim=self.dims, keepdim=self.dims is not None))
        return scaled

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return lengths and the weight."""
        return torch.linalg.vector_norm(weight, dim=self.dims, keepdim=self.dims is not None), weight

    def deviation(self, rows: Tensor) -> Tensor:
        """Every finite weight is one of its."""
        return rows.new_zeros(())


class Centered(RowMap):
    """Centered weight normalization: w = s (v - mean(v)) / (|v - mean(v)| + eps), for each output unit.

    Args:
        layout: of the weight.
        weight: example.
        scale: s, at first.
        learnable: whether each unit has its own s, a parameter.
        center: subtract the mean.
        eps: added to the length.
    """

    invariance = "row"
    tolerance = 1e-3

    def __init__(
        self,
        layout: Layout,
        weight: Tensor,
        scale: float = 1.414,
        learnable: bool = False,
        center: bool = True,
        eps: float = 1e-5,
    ) -> None:
        """Register the scale."""
        super().__init__(layout)
        positive(scale, "scale", "the weight would vanish")
        self.center, self.eps = center, eps
        value = torch.full_like(layout.rows(weight.detach())[:, :1], scale)
        if learnable:
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value)

    def map(self, rows: Tensor) -> Tensor:
        """Center and scale each row."""
        centered = rows - rows.mean(1, keepdim=True) if self.center else rows
        length = torch.linalg.vector_norm(centered, dim=1, keepdim=True)
        scaled: Tensor = centered * (self.scale / (length + self.eps))
        return scaled

    def deviation(self, rows: Tensor) -> Tensor:
        """Rows have length s, short of it by eps / |v|, and mean 0 if centered."""
        off = length_deviation(rows / self.scale)
        return torch.maximum(off, rows.mean(1).abs().amax()) if self.center else off


class Unit(RowMap):
    """Rows of length 1: w = v / max(|v|, eps); the weight's part of cosine normalization.

    Args:
        layout: of the weight.
        eps: least length that is divided by.
    """

    invariance = "row"

    def __init__(self, layout: Layout, weight: Tensor, eps: float = 1e-8) -> None:
        """Hold eps."""
        super().__init__(layout)
        positive(eps, "eps", "a weight of zeros would be divided by zero")
        self.eps = eps

    def map(self, rows: Tensor) -> Tensor:
        """Scale each row to length 1."""
        return nn.functional.normalize(rows, dim=1, eps=self.eps)

    def deviation(self, rows: Tensor) -> Tensor:
        """Rows have length 1."""
        return length_deviation(rows)


class Projected(Parametrization):
    """Projection: the weight in use is the raw weight, which `retract` sets back to rows of length 1 after a step.

    The gradient is the plain one; its projection on the tangent space is the optimizer's part.
    """

    def __init__(self, layout: Layout, weight: Tensor) -> None:
        """Hold the layout."""
        super().__init__(layout)

    def forward(self, raw: Tensor) -> Tensor:
        """Return the weight as it is."""
        return raw

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the weight with rows of length 1."""
        rows = self.layout.rows(weight)
        return self.layout.back(nn.functional.normalize(rows, dim=1), weight.shape)

    def retract(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """Set each row back to length 1."""
        return (self.right_inverse(raw[0]),)

    def deviation(self, rows: Tensor) -> Tensor:
        """Rows have length 1."""
        return length_deviation(rows)


class CenteredOnly(RowMap):
    """Centered weights of moving-average batch normalization: w = v - mean(v), for each output unit."""

    def __init__(self, layout: Layout, weight: Tensor) -> None:
        """Hold the layout."""
        super().__init__(layout)

    def map(self, rows: Tensor) -> Tensor:
        """Center each row."""
        return rows - rows.mean(1, keepdim=True)

    def deviation(self, rows: Tensor) -> Tensor:
        """Rows have mean 0."""
        return rows.mean(1).abs().amax()


class Standardized(RowMap):
    """Weight standardization: w = (v - mean(v)) / (sd(v) + eps), for each output unit.

    Args:
        layout: of the weight.
        weight: example.
        unbiased: divide squares by fan_in - 1 instead of fan_in.
        inside: add eps to the variance instead of to the deviation.
        eps: keeps constant rows finite.
    """

    invariance = "row"
    tolerance = 1e-3

    def __init__(
        self, layout: Layout, weight: Tensor, unbiased: bool = True, inside: bool = False, eps: float = 1e-5
    ) -> None:
        """Hold the settings."""
        super().__init__(layout)
        positive(eps, "eps", "a constant row would be divided by zero")
        self.unbiased, self.inside, self.eps = unbiased, inside, eps

    def map(self, rows: Tensor) -> Tensor:
        """Standardize each row."""
        var, mean = torch.var_mean(rows, 1, correction=int(self.unbiased), keepdim=True)
        if self.inside:
            return (rows - mean) * (var + self.eps).rsqrt()
        # the root of an exact zero has no gradient
        return (rows - mean) / (var.clamp_min(torch.finfo(var.dtype).tiny).sqrt() + self.eps)

    def deviation(self, rows: Tensor) -> Tensor:
        """Rows have mean 0 and deviation 1, short of it by eps / sd(v)."""
        var, mean = torch.var_mean(rows, 1, correction=int(self.unbiased))
        return torch.maximum(mean.abs().amax(), (var.sqrt() - 1).abs().amax())


class ScaledStandardized(RowMap):
    """Scaled weight standardization: w = gain (v - mean(v)) / sqrt(max(fan_in var(v), eps)), for each output unit.

    Args:
        layout: of the weight.
        weight: example.
        gamma: factor for the nonlinearity, as 1.71396 for ReLU.
        unbiased: divide squares by fan_in - 1 instead of fan_in.
        added: sqrt(fan_in (var + eps)) instead of the floor.
        eps: floor of the scaled variance, or what is added to the variance.
    """

    invariance = "row"
    tolerance = 1e-3

    def __init__(
        self,
        layout: Layout,
        weight: Tensor,
        gamma: float = 1.0,
        unbiased: bool = False,
        added: bool = False,
        eps: float = 1e-4,
    ) -> None:
        """Register a gain of 1 for each unit."""
        super().__init__(layout)
        positive(eps, "eps", "a constant row would be divided by zero")
        self.gamma, self.unbiased, self.added, self.eps = gamma, unbiased, added, eps
        self.gain = nn.Parameter(torch.ones_like(layout.rows(weight.detach())[:, :1]))

    def map(self, rows: Tensor) -> Tensor:
        """Standardize each row to variance 1 / fan_in."""
        var, mean = torch.var_mean(rows, 1, correction=int(self.unbiased), keepdim=True)
        square = (var + self.eps) * rows.shape[1] if self.added else (var * rows.shape[1]).clamp_min(self.eps)
        return (rows - mean) * (square.rsqrt() * self.gain * self.gamma)

    def deviation(self, rows: Tensor) -> Tensor:
        """Rows have mean 0, and the root of the scaled variance is |gain gamma|."""
        var, mean = torch.var_mean(rows, 1, correction=int(self.unbiased))
        off = (var * rows.shape[1]).sqrt() - (self.gain[:, 0] * self.gamma).abs()
        return torch.maximum(mean.abs().amax(), off.abs().amax())
