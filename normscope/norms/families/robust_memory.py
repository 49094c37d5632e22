"""Batch normalization over several recent batches: memorized statistics, and those of changed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.norms.families.mixtures_base import RunningNorm, deviation
from normscope.norms.layer import in_float
from normscope.norms.part import Traits, positive
from normscope.norms.population import track


class MemorizedNorm(RunningNorm):
    """Memorized batch normalization: the moments of recent batches are averaged, with weights that fall with age.

    mean = sum_i w_i mean_i, E[x^2] likewise, w_i proportional to decay^i for the batch i steps ago; the gradient flows
    through the newest. Double forward: call a second time with again=True after the step, which replaces the newest.

    Args:
        num_features: number of channels.
        memory: number of batches.
        decay: ratio of the weights of consecutive batches.
        eps: added to the variance.
        affine: weight and bias for each channel.
    """

    memory_mean: Tensor
    memory_square: Tensor

    def __init__(
        self, num_features: int, memory: int = 8, decay: float = 0.9, eps: float = 1e-5, affine: bool = True
    ) -> None:
        """Register weight, bias and the memory `(memory, C)`.

        Raises:
            ArgumentError: there is no memory.
        """
        super().__init__(num_features, eps, None, affine)
        positive(decay, "decay", "no batch would have a weight")
        if memory < 1:
            raise ArgumentError(f"memory={memory!r} must be at least 1, the batch at hand; try 8.")
        self.memory, self.decay = memory, decay
        self.register_buffer("memory_mean", torch.zeros(memory, num_features))
        self.register_buffer("memory_square", torch.ones(memory, num_features))

    @property
    def traits(self) -> Traits:
        """Those of batch normalization; the memory does not follow the input."""
        return Traits(crosses_batch=True, stateful=True)

    @in_float
    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.
            again: this batch was the last one too; its statistics take the place of the old ones.

        Returns:
            A tensor of the shape of x.
        """
        if not self.training:
            return self.normalized(x, *self.stored(self.split(x)))
        _, mean, var = self.moments(x)
        square = var + mean.square()
        self._remember(mean, square, again)
        mean, square = self._average(self.memory_mean, mean), self._average(self.memory_square, square)
        var = (square - mean.square()).clamp_min(0)
        self.running_mean.copy_(mean.detach().squeeze(0))
        self.running_var.copy_(var.detach().squeeze(0))
        return self.normalized(x, mean, var)

    @torch.no_grad()
    def _remember(self, mean: Tensor, square: Tensor, again: bool) -> None:
        if not again or int(self.num_batches_tracked) == 0:
            self.num_batches_tracked.add_(1)
            for memory in (self.memory_mean, self.memory_square):
                memory.copy_(memory.roll(1, 0))
        self.memory_mean[0] = mean
        self.memory_square[0] = square

    def _average(self, memory: Tensor, newest: Tensor) -> Tensor:
        """Return the average `[1, C]`, with the gradient of the newest."""
        count = min(int(self.num_batches_tracked), self.memory)
        weights = self.decay ** torch.arange(count, dtype=newest.dtype, device=newest.device)
        weights = weights / weights.sum()
        past = (weights[1:].unsqueeze(1) * memory[1:count].to(newest)).sum(0)
        return weights[0] * newest + past


class CrossIterationNorm(RunningNorm):
    """Cross-iteration batch normalization: past statistics are carried over to the present weights by a Taylor step.

    mean_tau(w_t) = mean_tau + rho <d mean_tau / dw, w_t - w_tau> for each filter, E[x^2] likewise; where the variance
    that results is at least 0, an entry joins the average with the present batch. y = weight (x - mean) / (sd + eps) +
    bias. Without history the variance is unbiased. The history is not part of the state: it starts anew after loading.

    Args:
        num_features: number of channels.
        memory: number of past batches, 0 for batch normalization as in the first epochs.
        rho: weight of the Taylor step.
        eps: added to the standard deviation, or to the variance.
        inside: eps is added to the variance.
        momentum: weight of the newest batch alone in the stored statistics, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        memory: int = 3,
        rho: float = 1.0,
        eps: float = 1e-5,
        inside: bool = False,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight, bias and the stored statistics.

        Raises:
            ArgumentError: memory is negative.
        """
        super().__init__(num_features, eps, momentum, affine)
        if memory < 0:
            raise ArgumentError(f"memory={memory!r} must be at least 0; the method uses 3 after 8 epochs of 0.")
        self.memory, self.rho, self.inside = memory, rho, inside
        self._past: list[tuple[Tensor, ...]] = []

    @property
    def traits(self) -> Traits:
        """Those of batch normalization; the past does not follow the input."""
        return Traits(crosses_batch=True, stateful=True, condition="other")

    @in_float
    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`, the output of the layer before.
            weight: the weight of that layer, `(C, ...)`, part of the graph of x; None leaves the Taylor step out.

        Returns:
            A tensor of the shape of x.
        """
        if not self.training:
            return self._divided(x, *self.stored(self.split(x)))
        z, mean, var = self.moments(x)
        unbiased = self.bessel(var, z)
        track(self, self.momentum, mean=mean, var=unbiased)
        if self.memory == 0:
            return self._divided(x, mean, unbiased)
        now = (mean, var + mean.square())
        mean, var = self._average(now, weight)
        self._remember(now, weight)
        return self._divided(x, mean, var)

    def _divided(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        factor = (var + self.eps).rsqrt() if self.inside else deviation(var, self.eps).reciprocal()
        return self.mapped(x, factor, -mean * factor)

    def _average(self, now: tuple[Tensor, Tensor], weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean and variance `[1, C]` over the present and what is valid of the past."""
        means, squares = [now[0]], [now[1]]
        valid = [torch.ones_like(now[0])]
        for old_mean, old_square, *rest in self._past:
            mean, square = old_mean, old_square
            if rest and weight is not None and rest[0].shape == weight.shape:
                step = (weight.detach() - rest[0]).flatten(1)
                mean = mean + self.rho * (rest[1].flatten(1) * step).sum(1)
                square = square + self.rho * (rest[2].flatten(1) * step).sum(1)
            means.append(mean)
            squares.append(square)
            valid.append((square - mean.square() >= 0).to(mean))
        use = torch.cat(valid)
        count = use.sum(0)
        mean = (torch.cat(means) * use).sum(0, keepdim=True) / count
        square = (torch.cat(squares) * use).sum(0, keepdim=True) / count
        return mean, (square - mean.square()).clamp_min(0)

    def _remember(self, now: tuple[Tensor, Tensor], weight: Tensor | None) -> None:
        entry: tuple[Tensor, ...] = tuple(value.detach() for value in now)
        if weight is not None and weight.requires_grad and now[0].requires_grad:
            slopes: list[Any] = [
                torch.autograd.grad(v.sum(), weight, retain_graph=True, allow_unused=True)[0] for v in now
            ]
            if all(slope is not None for slope in slopes):
                entry += (weight.detach().clone(), *slopes)
        self._past = [entry, *self._past][: self.memory]
