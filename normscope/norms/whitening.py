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
    x = _five(z.permute(order), batched)
    gain, bias = (v if v is None else _five(v.permute(order), batched) for v in (gain, bias))
    if all(v is None or v.shape[3] == 1 for v in (gain, bias)):
        x = x.flatten(3).unsqueeze(3)
    gain, bias = (v if v is None else v[0, ..., 0].expand(x.shape[1:4]) for v in (gain, bias))
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
        scaled = part if gain is None else torch.mul(part, gain.unsqueeze(-1), out=self.like(part))
        return scaled.flatten(0, 1)


def _products(rows: Tensor, others: Tensor, number: int) -> Tensor:
    """Return the sum over examples of rows others^T: `[areas, F, F]` from `[examples * areas, F, L]`."""
    product = rows @ others.mT
    return product.reshape(number, -1, *product.shape[1:]).sum(0)


def _folded(matrix: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return gain W where all channels of a row have one gain; else W, and the gain to apply apart."""
    return (matrix, gain) if gain is None or gain.shape[2] > 1 else (matrix * gain, None)


def _map(out: Tensor, matrix: Tensor, rows: Tensor, place: tuple[slice, slice]) -> Tensor:
    """Write matrix times rows `[examples * areas, F, K, L]` into a part of out, and return that part."""
    part = out[place].flatten(0, 1).flatten(2)
    return torch.bmm(_batched(matrix[place[1]], len(out[place])), rows.flatten(2), out=part)


class _Whiten(torch.autograd.Function):
    """Inputs: x `[R, A, F, K, L]`, statistics over R, K and L; gain and bias `[A, F, K]`.

    Products that are linear in x take the mean from what they give; sums of products take it from x, not to cancel.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor | None, bias: Tensor | None, operation: Whiten
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        count = len(x) * x.shape[3] * x.shape[4]
        factor = 1 / (count - 1) if operation.unbiased else 1 / count
        mean = x.mean(4).mean((0, 3))
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
        wide, after = _folded(matrix, gain)
        shift = wide @ -mean.unsqueeze(-1)
        shift = shift if after is None else shift * after
        shift = (shift if bias is None else shift + bias).unsqueeze(-1)
        y = x.new_empty(x.shape)
        for place in _chunks(x):
            _map(y, wide, x[place].flatten(0, 1), place)
            if after is not None:
                y[place].mul_(after[place[1]].unsqueeze(-1))
            y[place].add_(shift[place[1]])
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
        scratch = _Scratch(x)
        for place in _chunks(x):
            rows, slopes = scratch.centered(x[place], mean[place[1]]), grad[place].flatten(0, 1)
            total[place[1]] += grad[place].sum(4).sum(0)
            for k in channels:
                cross[k, place[1]] += _products(slopes[:, :, k], rows[:, :, k], len(x[place]))
        grad_root = cross.sum(0) if gain is None else (cross * gain.movedim(-1, 0).unsqueeze(-1)).sum(0)
        (grad_covariance,) = torch.autograd.grad(ctx.root, ctx.leaf, grad_root, retain_graph=True)
        spread = (grad_covariance + grad_covariance.mT) * ctx.factor
        wide, before = _folded(matrix, gain)
        weighted = total if before is None else total * before
        shift = wide.mT @ weighted.sum(-1, keepdim=True) / -ctx.count - spread @ mean.unsqueeze(-1)
        grad_x = x.new_empty(x.shape)
        for place in _chunks(x):
            out = _map(
                grad_x, wide.mT, scratch.scaled(grad[place], None if before is None else before[place[1]]), place
            )
            out.baddbmm_(_batched(spread[place[1]], len(x[place])), x[place].flatten(0, 1).flatten(2))
            grad_x[place].add_(shift[place[1]].unsqueeze(-1))
        grad_gain = None if gain is None else (cross * matrix).sum(-1).movedim(0, -1)
        return grad_x, grad_gain, None if bias is None else total, None


_whiten: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = _Whiten.apply
