"""Batch normalization whose training statistics are more than those of the batch: blended, corrected or predicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.families.mixtures_base import ChannelNorm, RunningNorm, deviation, kept
from normscope.norms.layer import in_float
from normscope.norms.operation import safe_sqrt
from normscope.norms.part import Traits
from normscope.norms.population import keep, track, valid_momentum


class BlendedNorm(RunningNorm):
    """Batch normalization by moving averages in training too: mean_t = (1 - a_t) mean_(t-1) + a_t mean_batch.

    y = weight (x - mean_t) / sqrt(var_t + eps) + bias, the same for the variance. The gradient flows through the share
    a_t of the batch statistics, or, if `composed`, through all of them, as the optimization of a composition wants it.

    Args:
        num_features: number of channels.
        eps: added to the variance.
        momentum: a_t.
        power: a_t = t^-power instead, for a power above 0.
        composed: backward takes mean_t and var_t for functions of the batch alone.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        power: float = 0.0,
        composed: bool = False,
        affine: bool = True,
    ) -> None:
        """Register weight, bias and the averages."""
        super().__init__(num_features, eps, momentum, affine)
        self.power, self.composed = power, composed

    @property
    def traits(self) -> Traits:
        """Those of batch normalization; the stored part does not follow the input."""
        return Traits(crosses_batch=True, stateful=True, true_gradient=not self.composed)

    def rate(self, step: int, batch: int) -> float:
        """Return a_t, the weight of the batch.

        Args:
            step: t, from 1.
            batch: number of examples.

        Returns:
            The weight.
        """
        if self.power > 0 or self.momentum is None:
            return float(step ** -(self.power or 1.0))
        return self.momentum

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        if not self.training:
            return self.normalized(x, *self.stored(self.split(x)))
        z, mean, var = self.moments(x)
        examples = int(self.average.count(z)) // z.shape[3]
        rate = self.rate(int(self.num_batches_tracked) + 1, examples)
        mean, var = (self._blend(*pair, rate) for pair in zip(self.stored(z), (mean, var), strict=True))
        track(self, 1.0, mean=mean, var=var)
        return self.normalized(x, mean, var)

    def _blend(self, old: Tensor, new: Tensor, rate: float) -> Tensor:
        blended = torch.lerp(old, new, rate)
        return blended.detach() + new - new.detach() if self.composed else blended


class MomentumBatchNorm(BlendedNorm):
    """Momentum batch normalization: moving averages in training, with a momentum that fits the batch size.

    a_t = 1 - lambda_t, lambda_t = rho^(T / (T - 1) max(T - t, 0)) - rho^T, rho = min(N / ideal, 1)^(1 / ideal), for a
    batch of N examples: lambda grows to 1 - rho^T over the T steps, so that small batches borrow more from the past.

    Args:
        num_features: number of channels.
        ideal: batch size that needs no help.
        steps: T.
        eps: added to the variance.
        affine: weight and bias for each channel.
    """

    def __init__(
        self, num_features: int, ideal: int = 64, steps: int = 100, eps: float = 1e-5, affine: bool = True
    ) -> None:
        """Register weight, bias and the averages.

        Raises:
            ArgumentError: there are too few steps, or the ideal size is below 1.
        """
        super().__init__(num_features, eps, None, affine=affine)
        if steps < 2 or ideal < 1:
            raise ArgumentError(f"steps={steps!r} must be at least 2 and ideal={ideal!r} at least 1; try 100 and 64.")
        self.ideal, self.steps = ideal, steps

    def rate(self, step: int, batch: int) -> float:
        """Return 1 - lambda_t."""
        rho = min(batch / self.ideal, 1.0) ** (1 / self.ideal)
        t = self.steps
        rest: float = rho ** (t / (t - 1) * max(t - step, 0)) - rho**t
        return 1 - rest


class BatchRenorm(ChannelNorm):
    """Batch renormalization: y = weight ((x - mean) / s r + d) + bias, corrected towards stored statistics.

    s = sd + eps, r = clip(s / stored s, 1 / r_max, r_max), d = clip((mean - stored mean) / stored s, -d_max, d_max),
    both without gradient. The limits grow from 1 and 0 after `start` steps to r_max at r_end and d_max at d_end.

    Args:
        num_features: number of channels.
        eps: added to the standard deviation.
        momentum: weight of the newest batch in the stored mean and s.
        affine: weight and bias for each channel.
        r_max: largest scale correction.
        d_max: largest shift correction.
        start: steps of plain batch normalization.
        r_end: step at which the limit of r is r_max.
        d_end: step at which the limit of d is d_max.
    """

    running_std: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-3,
        momentum: float | None = 0.01,
        affine: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        start: int = 5000,
        r_end: int = 40000,
        d_end: int = 25000,
    ) -> None:
        """Register weight, bias and buffers.

        Raises:
            ArgumentError: the schedule does not grow.
        """
        super().__init__(num_features, eps, affine)
        valid_momentum(momentum)
        if not start < min(r_end, d_end):
            raise ArgumentError(f"start={start!r} must be below r_end={r_end!r} and d_end={d_end!r}.")
        self.momentum, self.r_max, self.d_max = momentum, r_max, d_max
        self.start, self.r_end, self.d_end = start, r_end, d_end
        keep(self, mean=torch.zeros(num_features), std=torch.ones(num_features))

    @property
    def traits(self) -> Traits:
        """Those of batch normalization; the corrections have no gradient."""
        return Traits(crosses_batch=True, stateful=True, true_gradient=False)

    def limits(self) -> tuple[float, float]:
        """Return the limits of r and d at this step."""
        step = float(self.num_batches_tracked) - self.start
        parts = [min(max(step / (end - self.start), 0.0), 1.0) for end in (self.r_end, self.d_end)]
        return 1 + (self.r_max - 1) * parts[0], self.d_max * parts[1]

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        if not self.training:
            z = self.split(x)
            mean, std = (kept(b, z).unsqueeze(0) for b in (self.running_mean, self.running_std))
            return self.mapped(x, std.reciprocal(), -mean / std)
        _, mean, var = self.moments(x)
        std = deviation(var, self.eps)
        r, d = self._corrections(mean.detach(), std.detach())
        track(self, self.momentum, mean=mean, std=std)
        return self.mapped(x, r / std, d - mean * r / std)

    def _corrections(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        r_limit, d_limit = self.limits()
        stored_mean, stored = kept(self.running_mean, mean), kept(self.running_std, mean)
        r = (std / stored).clamp(1 / r_limit, r_limit)
        return r, ((mean - stored_mean) / stored).clamp(-d_limit, d_limit)


class KalmanNorm(RunningNorm):
    """Kalman normalization: batch moments are filtered with a prediction from the moments of the layer before.

    mean = p mean_pre + (1 - p) mean_batch, var = p var_pre + (1 - p) var_batch + p (1 - p) (mean_batch - mean_pre)^2;
    the prediction is left aside where the average of var_pre / var_batch is 100 or more. Evaluation uses moving
    averages.

    Args:
        num_features: number of channels.
        p: weight of the prediction; 0.05 for large batches, up to 0.9 for tiny ones.
        eps: added to the variance.
        momentum: weight of the newest batch.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        p: float = 0.05,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight, bias and buffers.

        Raises:
            ArgumentError: p is not in [0, 1].
        """
        super().__init__(num_features, eps, momentum, affine)
        if not 0 <= p <= 1:
            raise ArgumentError(f"p={p!r} must be between 0 and 1: it is the weight of the prediction; try 0.05.")
        self.p = p

    @property
    def traits(self) -> Traits:
        """Those of batch normalization; the prediction does not follow the input."""
        return Traits(crosses_batch=True, stateful=True, condition="other")

    @in_float
    def forward(self, x: Tensor, prediction: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.
            prediction: mean and variance `(2, C)` that `predicted` returns; None for batch normalization.

        Returns:
            A tensor of the shape of x.
        """
        if not self.training:
            return self.normalized(x, *self.stored(self.split(x)))
        mean, var = self.filtered(x, prediction)
        track(self, self.momentum, mean=mean, var=var)
        return self.normalized(x, mean, var)

    def filtered(self, x: Tensor, prediction: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the filtered mean and variance `[1, C]`; nothing is stored."""
        _, mean, var = self.moments(x)
        if prediction is None:
            return mean, var
        mean_pre, var_pre = prediction.to(x.dtype).unsqueeze(1)
        ratio = (var_pre / var.clamp_min(torch.finfo(var.dtype).tiny)).detach().mean()
        p = self.p * (ratio < 100).to(x.dtype)
        pooled = p * var_pre + (1 - p) * var + p * (1 - p) * (mean - mean_pre).square()
        return p * mean_pre + (1 - p) * mean, pooled


def predicted(
    mean: Tensor,
    var: Tensor,
    step: nn.Module,
    samples: int = 64,
    size: tuple[int, ...] = (8, 8),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Predict the moments of the next layer: Gaussian samples of this layer's moments pass through what lies between.

    Args:
        mean: means of this layer's normalized channels `(C,)`.
        var: their variances.
        step: what lies between: activation and convolution.
        samples: number of samples.
        size: their spatial size, () for none.
        generator: of the random numbers.

    Returns:
        Mean and variance `(2, C')`.
    """
    shape = (samples, mean.numel(), *size)
    noise = torch.randn(shape, generator=generator, dtype=mean.dtype, device=mean.device)
    wide = (-1, *(1,) * len(size))
    out: Any = step(noise * safe_sqrt(var).reshape(wide) + mean.reshape(wide))
    dims = (0, *range(2, out.ndim))
    return torch.stack([out.mean(dims), out.var(dims, correction=0)])


class StochasticNorm(RunningNorm):
    """Stochastic normalization: each channel is normalized by the batch or, with probability p, by stored statistics.

    y = weight (s BN_batch(x) + (1 - s) BN_stored(x)) + bias, s drawn for each channel and step; what is stored counts
    as it was before the step.

    Args:
        num_features: number of channels.
        p: probability of the stored statistics.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        p: float = 0.5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight, bias and buffers.

        Raises:
            ArgumentError: p is no probability.
        """
        super().__init__(num_features, eps, momentum, affine)
        if not 0 <= p <= 1:
            raise ArgumentError(f"p={p!r} must be between 0 and 1: the probability of the stored statistics; try 0.5.")
        self.p = p

    @property
    def traits(self) -> Traits:
        """Those of batch normalization, at random."""
        return Traits(crosses_batch=True, stateful=True, random=True)

    @in_float
    def forward(self, x: Tensor, selection: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.
            selection: 1 for the batch, 0 for the stored statistics `(C,)`; drawn if not given.

        Returns:
            A tensor of the shape of x.
        """
        past = tuple(value.clone() for value in self.stored(self.split(x)))
        if not self.training:
            return self.normalized(x, *past)
        now = self.batch(x)
        if selection is None:
            selection = torch.rand(self.num_features, device=x.device) >= self.p
        mean, var = (torch.where(selection.bool(), new, old) for new, old in zip(now, past, strict=True))
        return self.normalized(x, mean, var)


class NoiseAwareNorm(RunningNorm):
    """Noise-aware batch normalization: the stored variance is that of inputs with the noise of the hardware added.

    The stored variance is the batch's plus noise^2 E[x^2], what independent noise of relative strength `noise` adds on
    average; training normalizes by the batch as it is.

    Args:
        num_features: number of channels.
        noise: standard deviation of the noise relative to the root mean square of its channel.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        noise: float = 0.1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight, bias and buffers.

        Raises:
            ArgumentError: the noise is negative.
        """
        super().__init__(num_features, eps, momentum, affine)
        if not noise >= 0:
            raise ArgumentError(f"noise={noise!r} must be at least 0, relative to the input's rms; try 0.1.")
        self.noise = noise

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        if not self.training:
            return self.normalized(x, *self.stored(self.split(x)))
        z, mean, var = self.moments(x)
        added = self.noise**2 * (var + mean.square())
        track(self, self.momentum, mean=mean, var=self.bessel(var, z) + added)
        return self.normalized(x, mean, var)
