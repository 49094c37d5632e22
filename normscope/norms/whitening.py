"""Whitening with a gradient written by hand: the batch is never transposed, and each pass over it does one product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from normscope.norms.average import by_hand
from normscope.norms.part import Stats
from normscope.norms.whiten import Whiten

# entries of x that are worked on together, two megabytes of float32 for each thread
_CACHED = 2**19


def suits(z: Tensor, operation: object) -> bool:
    """Tell whether `whiten` may stand in for an operation: plain whitening, seen by reverse-mode autograd alone."""
    return type(operation) is Whiten and not operation.moment and by_hand(z)


def whiten(
    z: Tensor, operation: Whiten, gain: Tensor | None = None, bias: Tensor | None = None, *, examples: bool = False
) -> tuple[Tensor, Stats]:
    """Return gain W (z - mean) + bias and the statistics, which carry no gradient.

    With M = gain W and C the sum of g (z - mean)^T, where g is the gradient of the result, the gradient of z is
    M^T g - mean of M^T g + D (z - mean), D = (dSigma + dSigma^T) / n, with dSigma from gain C by the root's gradient.

    Args:
        z: `[areas, features, *samples]`.
        operation: how to whiten.
        gain: as z, with one entry along each axis where it does not vary; None for 1.
        bias: the same, None for 0.
        examples: the first sample axis is that of the examples, outermost in memory.

    Returns:
        A tensor of the shape of z, and the statistics of the operation.
    """
    batched = examples and z.ndim > 3
    order = [2, 0, 1, *range(3, z.ndim)] if batched else list(range(z.ndim))
    x, gain, bias = (v if v is None else _five(v.permute(order), batched) for v in (z, gain, bias))
    gain, bias = (v if v is None else v[0, ..., 0].expand(z.shape[0], -1, -1) for v in (gain, bias))
    y, *stats = _whiten(x, gain, bias, operation)
    back = [order.index(axis) for axis in range(z.ndim)]
    named = dict(zip(("mean", "covariance", "sigma", "matrix"), stats, strict=True))
    return y.reshape([z.shape[axis] for axis in order]).permute(back), named


def _five(x: Tensor, batched: bool) -> Tensor:
    """Insert axes so that the order is examples, areas, features, channels of a row, space."""
    x = x if batched else x.unsqueeze(0)
    return x if x.ndim == 5 else x.unsqueeze(3)


def _composed(x: Tensor, gain: Tensor | None, bias: Tensor | None, operation: Whiten) -> Tensor:
    """Return the same by operations that autograd differentiates any number of times."""
    z = x.permute(1, 2, 0, 3, 4).flatten(2)
    y = operation.apply(z, operation.measure(z)).reshape(*z.shape[:2], len(x), *x.shape[3:]).permute(2, 0, 1, 3, 4)
    y = y if gain is None else y * gain.unsqueeze(-1)
    return y if bias is None else y + bias.unsqueeze(-1)


def _batched(matrix: Tensor, number: int) -> Tensor:
    """Repeat `[areas, ...]` for each example: `[examples * areas, ...]`."""
    return matrix.expand(number, *matrix.shape).reshape(-1, *matrix.shape[1:])


def _chunks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield examples and areas to work on together: on a CPU as many as its cache holds."""
    axis = 0 if len(x) > 1 else 1
    each = max(x.numel() // max(x.shape[axis], 1), 1)
    step = max(_CACHED * torch.get_num_threads() // each, 1) if x.device.type == "cpu" else x.shape[axis]
    for start in range(0, x.shape[axis], max(step, 1)):
        part = slice(start, start + step)
        yield (part, slice(None)) if axis == 0 else (slice(None), part)


class _Scratch:
    """Memory for parts of a tensor, one at a time: `[examples * areas, F, K, L]`."""

    def __init__(self, x: Tensor) -> None:
        self.buffer = x.new_empty(0)

    def like(self, part: Tensor) -> Tensor:
        if self.buffer.numel() < part.numel():
            self.buffer = part.new_empty(part.numel())
        return self.buffer[: part.numel()].view(part.shape)

    def centered(self, part: Tensor, mean: Tensor) -> Tensor:
        return torch.sub(part, mean[..., None, None], out=self.like(part)).flatten(0, 1)

    def scaled(self, part: Tensor, gain: Tensor | None) -> Tensor:
        if gain is None:
            return part.contiguous().flatten(0, 1)
        return torch.mul(part, gain.unsqueeze(-1), out=self.like(part)).flatten(0, 1)


def _products(rows: Tensor, others: Tensor, number: int) -> Tensor:
    """Return the sum over examples of rows others^T: `[areas, F, F]` from `[examples * areas, F, L]`."""
    product = rows @ others.mT
    return product.reshape(number, -1, *product.shape[1:]).sum(0)


class _Whiten(torch.autograd.Function):
    """Inputs: x `[R, A, F, K, L]`, statistics over R, K and L; gain and bias `[A, F, K]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor | None, bias: Tensor | None, operation: Whiten
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        count = len(x) * x.shape[3] * x.shape[4]
        factor = 1 / (count - 1) if operation.unbiased else 1 / count
        mean = x.mean((0, 3, 4))
        covariance = x.new_zeros(*mean.shape, x.shape[2])
        scratch = _Scratch(x)
        for place in _chunks(x):
            rows = scratch.centered(x[place], mean[place[1]]).flatten(2)
            covariance[place[1]] += _products(rows, rows, len(x[place]))
        covariance *= factor
        with torch.enable_grad():
            leaf = covariance.detach().requires_grad_()
            sigma = operation.regularized(leaf)
            root = operation.matrix(sigma)
        matrix = root.detach()
        y = x.new_empty(x.shape)
        for place in _chunks(x):
            rows, area = scratch.centered(x[place], mean[place[1]]).flatten(2), place[1]
            torch.bmm(_batched(matrix[area], len(x[place])), rows, out=y[place].flatten(0, 1).flatten(2))
            if gain is not None:
                y[place].mul_(gain[area].unsqueeze(-1))
            if bias is not None:
                y[place].add_(bias[area].unsqueeze(-1))
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
        channels = range(x.shape[3])
        cross = x.new_zeros(len(channels), *matrix.shape)
        total = x.new_zeros(*mean.shape, len(channels))
        scratch, second = _Scratch(x), _Scratch(x)
        for place in _chunks(x):
            rows, slopes = scratch.centered(x[place], mean[place[1]]), grad[place].flatten(0, 1)
            total[place[1]] += grad[place].sum((0, 4))
            for k in channels:
                cross[k, place[1]] += _products(slopes[:, :, k], rows[:, :, k], len(x[place]))
        wide = 1.0 if gain is None else gain
        grad_root = cross.sum(0) if gain is None else (cross * gain.movedim(-1, 0).unsqueeze(-1)).sum(0)
        (grad_covariance,) = torch.autograd.grad(ctx.root, ctx.leaf, grad_root, retain_graph=True)
        spread = (grad_covariance + grad_covariance.mT) * ctx.factor
        shift = (matrix.mT @ (total * wide).sum(-1, keepdim=True)).unsqueeze(-1) / -ctx.count
        grad_x = x.new_empty(x.shape)
        for place in _chunks(x):
            number, area, out = len(x[place]), place[1], grad_x[place].flatten(0, 1).flatten(2)
            slopes = second.scaled(grad[place], None if gain is None else gain[area])
            torch.bmm(_batched(matrix[area].mT, number), slopes.flatten(2), out=out)
            out.baddbmm_(_batched(spread[area], number), scratch.centered(x[place], mean[area]).flatten(2))
            grad_x[place].add_(shift[area])
        grad_gain = None if gain is None else (cross * matrix).sum(-1).movedim(0, -1)
        return grad_x, grad_gain, None if bias is None else total, None


_whiten: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = _Whiten.apply
