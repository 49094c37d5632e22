"""Estimators of the statistics that evaluation uses, and a population that is constant for the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.affine import scale_shift
from normscope.norms.area import Area, Batch, BatchGroup, Instance
from normscope.norms.average import LOCAL
from normscope.norms.layer import Norm, Normalization, in_float
from normscope.norms.operation import Operation
from normscope.norms.part import Stats, Traits, divide, positive
from normscope.norms.population import Running, keep, track, valid_momentum
from normscope.norms.recovery import Affine


@dataclass(frozen=True, repr=False)
class Estimated(Running):
    """Stored statistics of earlier batches, in training too, constants for the gradient; each batch is then added."""

    def choose(self, host: Any, z: Tensor) -> Stats:
        """Return the stored statistics; in training then average those of the input into them."""
        # copies: the gradient needs them as they were
        used = {name: value.clone() for name, value in self.stored(host, z).items()}
        if host.training:
            with torch.no_grad():
                self.update(host, z, host.measure(z.detach()))
        return used


class PopulationNorm(Norm):
    """A composition whose population is `Estimated`: no example of a batch depends on another."""

    @property
    def traits(self) -> Traits:
        """Those of a linear map that changes from batch to batch."""
        return replace(super().traits, crosses_batch=False, shift_invariant=False, scale_invariant=False)


@dataclass(frozen=True, repr=False)
class Pooled(Running):
    """Batch statistics in training; evaluation takes mean and variance of all samples since the start together.

    With n samples so far and m new ones: mean += m / (n + m) delta; var is the biased variance, with the term
    n m / (n + m)^2 delta^2 between batches, delta the difference of the means. `recalibrate` does this for trained
    weights.
    """

    def install(self, host: nn.Module, area: Area, operation: Operation, num_features: int | None) -> None:
        """Register running_mean, running_var and running_count."""
        super().install(host, area, operation, num_features)
        host.register_buffer("running_count", torch.zeros(1))

    def update(self, host: Any, z: Tensor, measured: Stats) -> None:
        """Put the samples of a batch to those before."""
        new = float(host.average.count(z))
        share = new / (float(host.running_count) + new)
        delta = measured["mean"].detach() - host.running_mean.reshape(measured["mean"].shape)
        between = (1 - share) * delta.square()
        track(host, share, mean=measured["mean"], var=measured["var"].detach() + between)
        host.running_count += new


class ExampleWeightedNorm(Normalization):
    """Batch, ghost batch or group normalization whose evaluation also weighs in the example's own statistics.

    Stored are E[x] and E[x^2] of each channel. Evaluation combines (1 - weight) stored + weight own for both moments;
    the variance is the combined E[x^2] - E[x]^2.

    Args:
        num_features: number of channels.
        weight_eval: weight of the example's own moments in evaluation.
        groups: groups of channels, None for one channel each.
        examples: examples that share statistics in training, None for the whole batch.
        eps: added to the variance.
        momentum: weight of the newest batch.
        affine: weight and bias for each channel.
    """

    running_square: Tensor

    def __init__(
        self,
        num_features: int,
        weight_eval: float = 0.5,
        groups: int | None = None,
        examples: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
    ) -> None:
        """Register parameters and moments.

        Raises:
            ArgumentError: weight_eval is not between 0 and 1.
        """
        super().__init__()
        positive(eps, "eps")
        valid_momentum(momentum)
        if not 0 <= weight_eval <= 1:
            raise ArgumentError(f"weight_eval={weight_eval!r} must be between 0 (stored moments) and 1 (own moments).")
        divide(num_features, groups or num_features)
        self.num_features, self.weight_eval, self.groups, self.examples = num_features, weight_eval, groups, examples
        self.eps, self.momentum, self.affine = eps, momentum, affine
        Affine(affine, affine).install(self, num_features)
        keep(self, mean=torch.zeros(num_features), square=torch.ones(num_features))

    @property
    def traits(self) -> Traits:
        """Those of batch normalization."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True, ranks=(3, 4, 5))

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.

        Returns:
            The same shape.
        """
        area = BatchGroup(self.groups or self.num_features, self.examples if self.training else 1)
        z = area.split(x)
        mean, var = self.average.moments(z) if self.training else self._combined(z)
        if self.training:
            self._track(x)
        inverse = (var + self.eps).rsqrt()
        scale, shift = area.spread(inverse, x), area.spread(-mean * inverse, x)
        weight, bias = Affine().gain(self)
        y = scale_shift(x, scale, shift)
        return y if weight is None or bias is None else scale_shift(y, weight.unsqueeze(0), bias.unsqueeze(0))

    def _combined(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = self.average.moments(z)
        size = self.num_features // z.shape[1]
        stored = (b.to(z.dtype).reshape(-1, size).mean(1) for b in (self.running_mean, self.running_square))
        first, second = (
            torch.lerp(old.expand_as(own), own, self.weight_eval)
            for old, own in zip(stored, (mean, var + mean.square()), strict=True)
        )
        return first, (second - first.square()).clamp_min(0)

    @torch.no_grad()
    def _track(self, x: Tensor) -> None:
        z = Batch().split(x.detach())
        mean, var = self.average.moments(z)
        track(self, self.momentum, mean=mean, square=var + mean.square())


class _Auxiliary(torch.autograd.Function):
    """Pass y on, and let a loss of its own be minimized by the same backward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())


_auxiliary: Callable[..., Tensor] = _Auxiliary.apply


class EvalNorm(Normalization):
    """EvalNorm: batch normalization whose evaluation mixes stored and own statistics with learned weights.

    mean = a own + (1 - a) stored, var = b own + (1 - b) stored, a = sigmoid(mean_mix), b = sigmoid(var_mix). Training
    is batch normalization; there a and b alone minimize the mean square between what evaluation would give and the
    output, by the same backward pass, without an effect on anything else.

    Args:
        num_features: number of channels.
        eps: added to the variance.
        momentum: weight of the newest batch.
        affine: weight and bias for each channel.
        start: initial weight of the own statistics.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        start: float = 0.1,
    ) -> None:
        """Register parameters and statistics.

        Raises:
            ArgumentError: start is not strictly between 0 and 1.
        """
        super().__init__()
        positive(eps, "eps")
        valid_momentum(momentum)
        if not 0 < start < 1:
            raise ArgumentError(f"start={start!r} must be strictly between 0 and 1: a sigmoid never reaches them.")
        self.num_features, self.eps, self.momentum, self.affine, self.start = num_features, eps, momentum, affine, start
        Affine(affine, affine).install(self, num_features)
        initial = torch.tensor(start).logit()
        self.mean_mix, self.var_mix = nn.Parameter(initial.clone()), nn.Parameter(initial.clone())
        keep(self, mean=torch.zeros(num_features), var=torch.ones(num_features))

    @property
    def traits(self) -> Traits:
        """Those of batch normalization; the two weights have a gradient of their own."""
        return Traits(
            crosses_batch=True,
            stateful=True,
            shift_invariant=True,
            scale_invariant=True,
            true_gradient=False,
            ranks=(3, 4, 5),
        )

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.

        Returns:
            The same shape.

        Raises:
            ArgumentError: a channel has a single sample in training.
        """
        if not self.training:
            return self._recovered(self.evaluated(x))
        z = Batch().split(x)
        mean, var = self.average.moments(z)
        count = self.average.count(z)
        if count == 1:
            raise ArgumentError("x has one sample for each channel, too few samples for batch statistics.")
        track(self, self.momentum, mean=mean, var=var * (count / (count - 1)))
        inverse = (var + self.eps).rsqrt()
        y = scale_shift(x, inverse, -mean * inverse)
        return self._recovered(_auxiliary(y, self._loss(x.detach(), inverse.detach(), -(mean * inverse).detach())))

    def _loss(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return the mean square of the difference to scale x + shift, from the moments of x."""
        own_mean, own_var = LOCAL.moments(Instance().split(x))
        factor, offset = self._map(own_mean, own_var)
        slope, rest = factor - scale, offset - shift
        return (slope.square() * own_var + (slope * own_mean + rest).square()).mean()

    def evaluated(self, x: Tensor) -> Tensor:
        """Normalize by the mixed statistics, without weight and bias."""
        return scale_shift(x, *self._map(*LOCAL.moments(Instance().split(x))))

    def _map(self, own_mean: Tensor, own_var: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and shift `(N, C)` by the mixed statistics."""
        a, b = self.mean_mix.sigmoid().to(own_mean.dtype), self.var_mix.sigmoid().to(own_mean.dtype)
        mean = a * own_mean + (1 - a) * self.running_mean.to(own_mean.dtype).clone()
        var = b * own_var + (1 - b) * self.running_var.to(own_mean.dtype).clone()
        inverse = (var + self.eps).rsqrt()
        return inverse, -mean * inverse

    def _recovered(self, y: Tensor) -> Tensor:
        if self.weight is None or self.bias is None:
            return y
        return scale_shift(y, self.weight.unsqueeze(0), self.bias.unsqueeze(0))
