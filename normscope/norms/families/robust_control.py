"""Normalization by averages over time in forward and backward: online, moving average and power normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.norms.affine import row_sums, scale_shift
from normscope.norms.area import Batch
from normscope.norms.average import LOCAL, Average, rows
from normscope.norms.families.mixtures_base import ChannelNorm, kept
from normscope.norms.layer import in_float
from normscope.norms.part import Traits, divide, require
from normscope.norms.population import keep, track, valid_momentum
from normscope.norms.recovery import Affine


class OnlineNorm(ChannelNorm):
    """Online normalization: examples one after the other, each by the statistics of those before it.

    y_t = (x_t - mean) / sqrt(var + eps), then var <- a var + (1 - a) v_t + a (1 - a) (m_t - mean)^2 and mean <- mean +
    (1 - a) (m_t - mean), with m_t, v_t the moments of x_t over space. Backward controls the gradient in the same way:
    g' = g - (1 - b) v y, v <- v + E[g' y]; gx = g' / s - (1 - b) u, u <- u + E[gx]. A batch is so many steps.

    Args:
        num_features: number of channels.
        forward_decay: a.
        backward_decay: b.
        guard: after weight and bias, "clamp" to +-5, "layer" to divide by the example's root mean square, or "none".
        eps: added to the variance.
        affine: weight and bias for each channel.
    """

    control_mean: Tensor
    control_var: Tensor

    def __init__(
        self,
        num_features: int,
        forward_decay: float = 0.999,
        backward_decay: float = 0.99,
        guard: str = "clamp",
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        """Register weight, bias, the averages of forward and the accumulators u and v of backward."""
        super().__init__(num_features, eps, affine)
        require(guard, "guard", ("clamp", "layer", "none"))
        for name, decay in (("forward_decay", forward_decay), ("backward_decay", backward_decay)):
            _fraction(decay, name)
        self.forward_decay, self.backward_decay, self.guard = forward_decay, backward_decay, guard
        keep(self, mean=torch.zeros(num_features), var=torch.ones(num_features))
        self.register_buffer("control_mean", torch.zeros(num_features))
        self.register_buffer("control_var", torch.zeros(num_features))

    @property
    def traits(self) -> Traits:
        """An example sees those before it through the stored statistics alone, whatever the batch."""
        return Traits(stateful=True, true_gradient=False)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`, the examples in their order."""
        z = self.split(x).squeeze(0).transpose(0, 1)
        if self.training:
            mean, var = self._statistics(z)
            controls = (self.control_mean, self.control_var)
            y: Tensor = _online(z, mean, (var + self.eps).rsqrt(), 1 - self.backward_decay, *controls)
        else:
            factor = (kept(self.running_var, z) + self.eps).rsqrt().unsqueeze(0)
            y = scale_shift(x, factor, -kept(self.running_mean, z) * factor)
        return self._guarded(self.recover(y.reshape(x.shape), x))

    def _guarded(self, y: Tensor) -> Tensor:
        if self.guard == "clamp":
            return y.clamp(-5, 5)
        if self.guard == "none":
            return y
        return y * (y.square().flatten(1).mean(1) + self.eps).rsqrt().reshape(-1, *(1,) * (y.ndim - 1))

    @torch.no_grad()
    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance before each example `(N, C)` and store those after the last."""
        own, own_var = LOCAL.moments(z)
        a = self.forward_decay
        mean, var = kept(self.running_mean, z).clone(), kept(self.running_var, z).clone()
        means, variances = [], []
        for m, v in zip(own, own_var, strict=True):
            means.append(mean)
            variances.append(var)
            var = a * var + (1 - a) * v + a * (1 - a) * (m - mean).square()
            mean = mean + (1 - a) * (m - mean)
        track(self, 1.0, mean=mean, var=var)
        return torch.stack(means), torch.stack(variances)


def _fraction(value: float, name: str) -> None:
    if not 0 <= value < 1:
        raise ArgumentError(f"{name}={value!r} must be in [0, 1): it is the weight of the past; try 0.99.")


class _Online(torch.autograd.Function):
    """Standardize `(N, C, L)` by given statistics; backward removes the running components of the gradient."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, mean: Tensor, factor: Tensor, rate: float, control_mean: Tensor, control_var: Tensor
    ) -> Tensor:
        y = scale_shift(z, factor, -mean * factor)
        ctx.save_for_backward(y, factor)
        ctx.rate, ctx.controls = rate, (control_mean, control_var)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, factor = ctx.saved_tensors
        control_mean, control_var = ctx.controls
        rate, u, v = ctx.rate, control_mean.to(y), control_var.to(y)
        products, grads = (total / y.shape[2] for total in row_sums(grad, y))
        sums, spread = LOCAL.moments(y)
        squares = spread + sums.square()
        shifts, slopes = [], []
        # the recurrences need averages over space only
        for product, square, average, total, scale in zip(products, squares, grads, sums, factor, strict=True):
            slopes.append(rate * v)
            shifts.append(rate * u)
            u = u + (average - rate * v * total) * scale - rate * u
            v = v + product - rate * v * square
        with torch.no_grad():
            control_mean.copy_(u)
            control_var.copy_(v)
        gx = scale_shift(grad, factor, -torch.stack(shifts))
        return gx.addcmul_(y, (-torch.stack(slopes) * factor).unsqueeze(2)), None, None, None, None, None


_online: Callable[..., Tensor] = _Online.apply


class MovingAverageNorm(ChannelNorm):
    """Moving average batch normalization: mean squares over the last batches, in forward and in backward.

    y = weight r x / sqrt(square + eps) + bias, square = E[x^2] averaged over the last m batches after the warm-up, r =
    clip(sqrt(square + eps) / sqrt(stored + eps), 0.2, 5) after 1000 steps, else 1. Backward, with z the normalized
    input: gx = (g - z mean_m(E[g z])) / sqrt(square + eps). No mean is removed: center the weights of the layer before.

    Args:
        num_features: number of channels.
        batches: m.
        warmup: steps with the statistics of the batch alone.
        correction: steps after which r is used, if the warm-up is shorter.
        eps: added to the mean square.
        momentum: weight of the newest statistics in the stored ones, which evaluation uses.
        affine: weight and bias for each channel.
    """

    buffer_square: Tensor
    buffer_product: Tensor

    def __init__(
        self,
        num_features: int,
        batches: int = 16,
        warmup: int = 100,
        correction: int = 1000,
        eps: float = 1e-5,
        momentum: float | None = 0.02,
        affine: bool = True,
    ) -> None:
        """Register weight, bias, the stored mean square and the last batches `(m, C)`.

        Raises:
            ArgumentError: m is below 1.
        """
        super().__init__(num_features, eps, affine)
        valid_momentum(momentum)
        if batches < 1:
            raise ArgumentError(f"batches={batches!r} must be at least 1: how many batches are averaged; try 16.")
        self.batches, self.warmup, self.correction, self.momentum = batches, warmup, correction, momentum
        keep(self, var=torch.ones(num_features))
        self.register_buffer("buffer_square", torch.zeros(batches, num_features))
        self.register_buffer("buffer_product", torch.zeros(batches, num_features))

    @property
    def traits(self) -> Traits:
        """Those of batch normalization without its mean; backward averages over time."""
        return Traits(crosses_batch=True, stateful=True, true_gradient=False)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        z = self.split(x)
        stored = kept(self.running_var, z)
        if not self.training:
            return self.mapped(x, (stored + self.eps).rsqrt().unsqueeze(0), None)
        square = self.average.mean(z.detach().square()).squeeze(0)
        step = int(self.num_batches_tracked) + 1
        averaged = step > self.batches and step >= self.warmup
        self.buffer_square[step % self.batches] = square
        square = self.buffer_square.mean(0).to(z) if averaged else square
        ratio = ((square + self.eps) / (stored + self.eps)).sqrt().clamp(0.2, 5)
        r = ratio if step > max(self.correction, self.warmup) else torch.ones_like(ratio)
        memory = (self.buffer_product, step % self.batches, averaged)
        y: Tensor = _moving(z, (square + self.eps).rsqrt().unsqueeze(0), memory, self.average)
        track(self, self.momentum, var=square)
        return self.mapped(Batch().merge(y, x), r.unsqueeze(0), None)


class _Moving(torch.autograd.Function):
    """Multiply `[1, C, N, L]` by a factor; backward removes the component along the output, averaged over batches."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, factor: Tensor, memory: tuple[Tensor, int, bool], average: Average) -> Tensor:
        y = z * rows(factor, z)
        ctx.save_for_backward(y, factor)
        ctx.memory, ctx.average = memory, average
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, factor = ctx.saved_tensors
        stored, place, averaged = ctx.memory
        product = ctx.average.mean(grad * y)
        with torch.no_grad():
            stored[place] = product.squeeze(0)
        if averaged:
            product = stored.mean(0, keepdim=True).to(y)
        return (grad - y * rows(product, y)) * rows(factor, y), None, None, None


_moving: Callable[..., Tensor] = _Moving.apply


class PowerNorm(ChannelNorm):
    """PowerNorm: x / sqrt(phi + eps), phi a running mean square, with a running correction of the gradient.

    First each group of channels of each token is divided by its root mean square. phi is that of the batch for `warmup`
    steps, then the stored one. Backward: g~ = g - (1 - b) e z, e <- e + E[g~ z], gx = g~ / sqrt(phi_batch + eps).

    Args:
        num_features: number of channels.
        groups: number of groups of channels that are scaled first, 0 for none.
        warmup: steps with the statistics of the batch.
        backward_decay: b.
        channels: "last" (N, *, C) or "first" (N, C, *).
        eps: added to mean squares.
        momentum: weight of the newest batch in the stored phi.
        affine: weight and bias for each channel.
    """

    running_phi: Tensor
    control: Tensor

    def __init__(
        self,
        num_features: int,
        groups: int = 1,
        warmup: int = 10000,
        backward_decay: float = 0.9,
        channels: str = "last",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight, bias, phi and the accumulator e."""
        super().__init__(num_features, eps, affine)
        valid_momentum(momentum)
        require(channels, "channels", ("first", "last"))
        _fraction(backward_decay, "backward_decay")
        if groups:
            divide(num_features, groups)
        self.groups, self.warmup, self.backward_decay = groups, warmup, backward_decay
        self.channels, self.momentum = channels, momentum
        keep(self, phi=torch.ones(num_features))
        self.register_buffer("control", torch.zeros(num_features))

    @property
    def traits(self) -> Traits:
        """Those of batch normalization without its mean; backward is controlled."""
        return Traits(crosses_batch=True, stateful=True, true_gradient=False, channels_last=self.channels == "last")

    @in_float
    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, *, C)`, or `(N, C, *)` if channels are first.
            padding: True where a token is padding, of the shape of the tokens or transposed; phi leaves these out.

        Returns:
            A tensor of the shape of x.
        """
        area = Batch(channels=self.channels)
        axis = area.axis(x, self.num_features)
        z = area.split(self._scaled(x, axis), axis)
        stored = kept(self.running_phi, z).unsqueeze(0)
        if self.training:
            phi = self._phi(z, x, axis, padding)
            step = int(self.num_batches_tracked) + 1
            used = phi if step <= self.warmup else stored
            factors = (used + self.eps).rsqrt(), (phi + self.eps).rsqrt()
            y: Tensor = _power(z, *factors, 1 - self.backward_decay, self.control, self.average)
            self._store(phi, step)
        else:
            y = z * rows((stored + self.eps).rsqrt(), z)
        return Affine(self.affine, self.affine).apply(self, area.merge(y, x, axis), x, axis, None)

    def _scaled(self, x: Tensor, axis: int) -> Tensor:
        if not self.groups:
            return x
        tokens = x if axis == -1 else x.movedim(1, -1)
        groups = tokens.reshape(*tokens.shape[:-1], self.groups, -1)
        scaled = groups * (groups.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return scaled.reshape(tokens.shape) if axis == -1 else scaled.reshape(tokens.shape).movedim(-1, 1)

    @torch.no_grad()
    def _phi(self, z: Tensor, x: Tensor, axis: int, padding: Tensor | None) -> Tensor:
        """Return the mean square `[1, C]` without the padding."""
        if padding is None:
            return self.average.mean(z.square())
        shape = x.shape[:-1] if axis == -1 else (x.shape[0], *x.shape[2:])
        mask = padding if padding.shape == shape else padding.mT
        if mask.shape != shape:
            raise ArgumentError(f"padding has shape {tuple(padding.shape)}; the tokens of x have {tuple(shape)}.")
        keep_it = (~mask.bool()).to(z).reshape(1, 1, *z.shape[2:])
        return self.average.mean(z.square() * keep_it) / self.average.mean(keep_it)

    @torch.no_grad()
    def _store(self, phi: Tensor, step: int) -> None:
        if step < self.warmup:
            self.running_phi.lerp_(phi.squeeze(0).to(self.running_phi), 1 / step)
        track(self, self.momentum, phi=phi)


class _Power(torch.autograd.Function):
    """Multiply `[1, C, *samples]` by a factor; backward uses another one and removes a running component."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, used: Tensor, own: Tensor, rate: float, control: Tensor, average: Average
    ) -> Tensor:
        y = z * rows(used, z)
        ctx.save_for_backward(y, own)
        ctx.rate, ctx.control, ctx.average = rate, control, average
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, own = ctx.saved_tensors
        corrected = grad - rows(ctx.rate * ctx.control.to(y).unsqueeze(0), y) * y
        with torch.no_grad():
            ctx.control.add_(ctx.average.mean(corrected * y).squeeze(0).to(ctx.control))
        return corrected * rows(own, y), None, None, None, None, None


_power: Callable[..., Tensor] = _Power.apply
