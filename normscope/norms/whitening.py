"""Whitening with a gradient written by hand: the batch is never transposed, and each pass over it does one product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normscope.norms.part import Stats
from normscope.norms.whiten import Whiten


def suits(z: Tensor, operation: object) -> bool:
    """Tell whether `whiten` may stand in for an operation: plain whitening, seen by reverse-mode autograd alone."""
    if type(operation) is not Whiten or operation.moment:
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    return unpack(z).tangent is None


def whiten(z: Tensor, operation: Whiten, gain: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Stats]:
    """Return gain (W (z - mean)) + bias and the statistics, which carry no gradient.

    With M = gain W and the cross product C = sum of g (z - mean)^T, the gradient of z is
    M^T g + D (z - mean) - mean of M^T g, D = (dSigma + dSigma^T) / n, dSigma from gain C by the gradient of the root.

    Args:
        z: `[areas, features, *samples]`.
        operation: how to whiten.
        gain: `[areas, features]`, None for 1.
        bias: `[areas, features]`, None for 0.

    Returns:
        A tensor of the shape of z, and the statistics of the operation.
    """
    merged = z.flatten(2) if z.is_contiguous() else z
    outer = merged.ndim - 3
    x = merged.permute(*range(2, 2 + outer), 0, 1, merged.ndim - 1)
    y, mean, covariance, sigma, matrix = _whiten(x, gain, bias, operation)
    back = y.permute(outer, outer + 1, *range(outer), outer + 2).reshape(z.shape)
    return back, {"mean": mean, "covariance": covariance, "sigma": sigma, "matrix": matrix}


def _product(matrix: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """Return matrix x + bias for `[areas, F, F]`, `[..., areas, F, L]` and `[areas, F, 1]`, in one pass."""
    flat = x.reshape(-1, *x.shape[-2:])
    wide = matrix.expand(*x.shape[:-2], -1, -1).reshape(len(flat), *matrix.shape[-2:])
    added = bias.expand(*x.shape[:-2], -1, -1).reshape(len(flat), -1, 1)
    return torch.baddbmm(added, wide, flat).reshape(x.shape)


def _composed(x: Tensor, gain: Tensor | None, bias: Tensor | None, operation: Whiten) -> Tensor:
    """Return the same by operations that autograd differentiates any number of times."""
    outer = x.ndim - 3
    z = x.permute(outer, outer + 1, *range(outer), outer + 2)
    y = operation.apply(z, operation.measure(z)).permute(*range(2, 2 + outer), 0, 1, z.ndim - 1)
    y = y if gain is None else y * gain.unsqueeze(-1)
    return y if bias is None else y + bias.unsqueeze(-1)


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor | None, bias: Tensor | None, operation: Whiten
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        outer = tuple(range(x.ndim - 3))
        count = x.shape[:-3].numel() * x.shape[-1]
        mean = x.mean((*outer, x.ndim - 1), keepdim=True)
        centered = x - mean
        gram = centered @ centered.mT
        factor = 1 / (count - 1) if operation.unbiased else 1 / count
        covariance = (gram.sum(outer) if outer else gram) * factor
        with torch.enable_grad():
            leaf = covariance.detach().requires_grad_()
            sigma = operation.regularized(leaf)
            root = operation.matrix(sigma)
        matrix = root.detach()
        scaled = matrix if gain is None else matrix * gain.unsqueeze(-1)
        added = centered.new_zeros(()).expand(*scaled.shape[:2], 1) if bias is None else bias.unsqueeze(-1)
        y = _product(scaled, centered, added)
        mean = mean.reshape(scaled.shape[:2])
        ctx.save_for_backward(x, gain, bias, mean, matrix)
        ctx.operation, ctx.leaf, ctx.root, ctx.factor, ctx.count = operation, leaf, root, factor, count
        statistics = (mean.clone(), covariance, sigma.detach(), matrix.clone())
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, gain, bias, mean, matrix = ctx.saved_tensors
        if torch.is_grad_enabled():
            given = [v for v in (x, gain, bias) if v is not None]
            found = iter(torch.autograd.grad(_composed(x, gain, bias, ctx.operation), given, grad, create_graph=True))
            return next(found), gain if gain is None else next(found), bias if bias is None else next(found), None
        outer = tuple(range(x.ndim - 3))
        centered = x - mean.unsqueeze(-1)
        cross = grad @ centered.mT
        cross = cross.sum(outer) if outer else cross
        total = grad.sum((*outer, x.ndim - 1))
        scaled = matrix if gain is None else matrix * gain.unsqueeze(-1)
        grad_root = cross if gain is None else cross * gain.unsqueeze(-1)
        (grad_covariance,) = torch.autograd.grad(ctx.root, ctx.leaf, grad_root, retain_graph=True)
        spread = (grad_covariance + grad_covariance.mT) * ctx.factor
        shift = -(scaled.mT @ total.unsqueeze(-1)) / ctx.count
        grad_x = _product(scaled.mT, grad, shift).reshape(-1, *x.shape[-2:])
        wide = spread.expand(*x.shape[:-2], -1, -1).reshape(len(grad_x), *spread.shape[-2:])
        grad_x.baddbmm_(wide, centered.reshape(grad_x.shape))
        grad_gain = None if gain is None else (cross * matrix).sum(-1)
        return grad_x.reshape(x.shape), grad_gain, None if bias is None else total, None


_whiten: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = _Whiten.apply
