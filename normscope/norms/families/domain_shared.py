"""Layers whose statistics come from two batches, from a task, or are predicted, perturbed or preserved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.affine import folded, scale_shift
from normscope.norms.area import Batch
from normscope.norms.average import LOCAL
from normscope.norms.families.mixtures_base import ChannelNorm, RunningNorm, enough, instances, kept, pooled
from normscope.norms.layer import Norm, Normalization, in_float
from normscope.norms.operation import Standardize, safe_sqrt
from normscope.norms.part import Traits, divide, positive
from normscope.norms.population import Running, keep, track, valid_momentum
from normscope.norms.recovery import Affine


class TransferableNorm(ChannelNorm):
    """TransNorm: source and target, the halves of a batch, have statistics of their own; similar channels count more.

    y = (1 + alpha) (weight (x - mean_d) / sqrt(var_d + eps) + bias), alpha_c = C p_c / sum p, p = 1 / (1 + |mean_s /
    sqrt(var_s + eps) - mean_t / sqrt(var_t + eps)|) with unbiased variances and without gradient. Evaluation uses the
    stored statistics of the target, and of both for alpha.

    Args:
        num_features: number of channels.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True) -> None:
        """Register weight, bias and the statistics `(2, C)` of source and target."""
        super().__init__(num_features, eps, affine)
        valid_momentum(momentum)
        self.momentum = momentum
        keep(self, mean=torch.zeros(2, num_features), var=torch.ones(2, num_features))

    @property
    def traits(self) -> Traits:
        """Alpha sees mean and deviation, and has no gradient."""
        return Traits(crosses_batch=True, stateful=True, scale_invariant=True, true_gradient=False)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`, in training the source in the first half and the target in the second.

        Args:
            x: the input.

        Returns:
            A tensor of the shape of x.

        Raises:
            ArgumentError: the batch has no halves.
        """
        if not self.training:
            z = self.split(x)
            mean, var = kept(self.running_mean, z), kept(self.running_var, z)
            return self._weighted(self.normalized(x, mean[1:], var[1:]), mean, var)
        if x.shape[0] % 2 or not len(x):
            raise ArgumentError(
                f"x of shape {tuple(x.shape)} has too few samples for halves: the batch must be even, the source first."
            )
        z = self.split(x[: len(x) // 2])
        enough(z.shape[2:].numel(), x)
        halves = zip(*(v.chunk(2) for v in LOCAL.moments(instances(x, self.num_features))), strict=True)
        found = [self.pooled(mean, var) for mean, var in halves]
        mean, var = (torch.cat(values) for values in zip(*found, strict=True))
        larger = self.bessel(var, z)
        track(self, self.momentum, mean=mean, var=larger)
        own = (value.repeat_interleave(len(x) // 2, 0) for value in (mean, var))
        return self._weighted(self.normalized(x, *own), mean.detach(), larger.detach())

    def _weighted(self, y: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        source, target = mean * (var + self.eps).rsqrt()
        p = (1 + (source - target).abs()).reciprocal()
        alpha: Tensor = self.num_features * p / p.sum()
        return scale_shift(y, (1 + alpha).unsqueeze(0), None)


class BorrowingNorm(RunningNorm):
    """Batch normalization by statistics of two batches: the input, with weight `share`, and another one.

    mean = share mean_x + (1 - share) mean_other, and the variance of the mixture of both. With share 0.5 and the next
    state-action pairs this is CrossNorm of reinforcement learning, with share 0 and unlabeled examples UBN.

    Args:
        num_features: number of channels.
        share: weight of the input's own statistics.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        share: float = 0.5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight, bias and the stored statistics.

        Raises:
            ArgumentError: share is not in [0, 1].
        """
        super().__init__(num_features, eps, momentum, affine)
        if not 0 <= share <= 1:
            raise ArgumentError(f"share={share!r} must be between 0 and 1: the weight of the input; try 0.5.")
        self.share = share

    @property
    def traits(self) -> Traits:
        """Those of batch normalization; the other batch does not follow the input."""
        return Traits(crosses_batch=True, stateful=True, condition="domain")

    @in_float
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Normalize `(N, C, *)` with the help of another batch `(M, C, *)`; by itself without."""
        if not self.training or other is None:
            return self.normalized(x, *self.batch(x))
        return self.normalized(x, *self._mixed(x, other.to(x.dtype), self.share))

    def _mixed(self, x: Tensor, other: Tensor, share: float) -> tuple[Tensor, Tensor]:
        weights, batches = (share, 1 - share), (x, other)
        found = [(w, *self.moments(b)) for w, b in zip(weights, batches, strict=True) if w > 0]
        mean = torch.stack([w * m for w, _, m, _ in found]).sum(0)
        var = torch.stack([w * (v + (m - mean).square()) for w, _, m, v in found]).sum(0)
        unbiased = torch.stack([w * (self.bessel(v, z) + (m - mean).square()) for w, z, m, v in found]).sum(0)
        track(self, self.momentum, mean=mean, var=unbiased)
        return mean, var


class AdversarialStatisticsNorm(Normalization):
    """Adversarial batch normalization: feature statistics moved, within bounds, to where the loss is largest.

    y = scale (x - mean) + shift mean, mean over the batch, scale and shift for each channel within [1 - bound, 1 +
    bound]; at 1 the layer does nothing. Ascend the loss with `attack()` after a backward pass, start anew with
    `reset()`.

    Args:
        num_features: number of channels.
        bound: largest relative change.
    """

    scale: nn.Parameter
    shift: nn.Parameter

    def __init__(self, num_features: int, bound: float = 1.1) -> None:
        """Register scale and shift."""
        super().__init__()
        positive(bound, "bound", "no statistics could be moved")
        self.num_features, self.bound = num_features, bound
        self.scale, self.shift = (nn.Parameter(torch.ones(num_features)) for _ in range(2))

    @property
    def traits(self) -> Traits:
        """The mean is that of the batch."""
        return Traits(crosses_batch=True)

    @torch.no_grad()
    def attack(self, step: float = 0.2) -> None:
        """Move scale and shift along the sign of their gradients, and clip them to the bound."""
        for delta in (self.scale, self.shift):
            if delta.grad is not None:
                delta.add_(step * delta.grad.sign()).clamp_(1 - self.bound, 1 + self.bound)
                delta.grad = None

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to scale and shift 1, which leave the input as it is."""
        self.scale.fill_(1)
        self.shift.fill_(1)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Move the statistics of `(N, C, *)`."""
        Batch().axis(x, self.num_features)
        z = Batch().split(x)
        mean = self.average.mean(z)
        return scale_shift(x, self.scale.unsqueeze(0), (self.shift - self.scale) * mean)


class DomainInvariantNorm(ChannelNorm):
    """Domain normalization of stereo networks: each channel over space, then each position to unit length.

    z = (x - mean_instance) / sqrt(var_instance + eps); y = weight z / sqrt(sum_c z^2 + eps) + bias.

    Args:
        num_features: number of channels.
        eps: added to the variance and to the squared length.
        affine: weight and bias for each channel.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        """Register weight and bias."""
        super().__init__(num_features, eps, affine)

    @property
    def traits(self) -> Traits:
        """Those of instance normalization."""
        return Traits(shift_invariant=True, scale_invariant=True, ranks=(3, 4, 5))

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        z = instances(x, self.num_features)
        enough(z.shape[2], x)
        mean, var = LOCAL.moments(z)
        factor = (var + self.eps).rsqrt()
        y = scale_shift(z, factor, -mean * factor)
        y = y * (y.square().sum(1, keepdim=True) + self.eps).rsqrt()
        return self.recover(y.reshape(x.shape), x)


class SeparableNorm(RunningNorm):
    """Separable batch normalization: batch statistics for all, several affine maps weighted by attention.

    y = sum_k a_k(x) (weight_k z + bias_k), z the normalized input, a = softmax of a linear map of the pooled input.

    Args:
        num_features: number of channels.
        maps: number of affine maps.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
    """

    def __init__(self, num_features: int, maps: int = 2, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        """Register weight and bias `(maps, C)`, the attention and the stored statistics."""
        super().__init__(num_features, eps, momentum, False)
        self.maps = maps
        self.weight = nn.Parameter(torch.ones(maps, num_features))
        self.bias = nn.Parameter(torch.zeros(maps, num_features))
        self.attention = nn.Linear(num_features, maps)

    @property
    def traits(self) -> Traits:
        """The attention sees shift and scale."""
        return Traits(crosses_batch=True, stateful=True)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        mean, var = self.batch(x)
        factor = (var + self.eps).rsqrt()
        part = self.attention(pooled(x)).softmax(1)
        return scale_shift(x, *folded(factor, -mean * factor, part @ self.weight, part @ self.bias))


class FineGrainedNorm(Normalization):
    """Fine-grained batch normalization: a 1x1 convolution whose partial sums are normalized before they are added.

    y = sum_p BN_p(W_p x_p), x_p the p-th part of the input channels. For evaluation it folds into one convolution.

    Args:
        num_features: number of channels.
        parts: number of parts of the input channels.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel and part.
    """

    mixing: nn.Parameter

    def __init__(
        self,
        num_features: int,
        parts: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register the convolution `(parts, C, C / parts)`, orthogonal at first, and make the normalization."""
        super().__init__()
        size = divide(num_features, parts)
        self.num_features, self.parts, self.eps, self.momentum, self.affine = num_features, parts, eps, momentum, affine
        self.mixing = nn.Parameter(torch.empty(parts, num_features, size))
        for matrix in self.mixing.detach():
            nn.init.orthogonal_(matrix)
        recovery = Affine(init=parts**-0.5) if affine else None
        self.normalization = Norm(
            Batch(), Standardize(eps), recovery, Running(momentum), num_features=parts * num_features
        )

    @property
    def traits(self) -> Traits:
        """Those of batch normalization."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalize `(N, C, *)`."""
        z = instances(x, self.num_features)
        sums = self.mixing @ z.reshape(z.shape[0], self.parts, -1, z.shape[2])
        y: Tensor = self.normalization(sums.flatten(1, 2)).reshape(sums.shape)
        return y.sum(1).reshape(x.shape)


class MetaNorm(RunningNorm):
    """MetaNorm: networks infer mean and variance from the examples of a support set, for its query set too.

    mean = average over the support of mu(pool(x)), log var = sigma(average of (pool(x) - mean)^2 and of the variances
    over space), mu and sigma small networks. Training takes the input for the support and stores what it infers.

    Args:
        num_features: number of channels.
        hidden: units of the networks.
        eps: added to the variance.
        affine: weight and bias for each channel.
    """

    def __init__(self, num_features: int, hidden: int = 64, eps: float = 1e-5, affine: bool = True) -> None:
        """Register weight, bias, the networks and the inferred statistics."""
        super().__init__(num_features, eps, None, affine)
        self.hidden = hidden
        self.mu, self.sigma = (
            nn.Sequential(nn.Linear(num_features, hidden), nn.ReLU(), nn.Linear(hidden, num_features)) for _ in range(2)
        )

    @property
    def traits(self) -> Traits:
        """The networks see shift and scale."""
        return Traits(crosses_batch=True, stateful=True)

    def infer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance `(C,)` inferred from examples `(N, C, *)`."""
        z = instances(x, self.num_features)
        pool, var = LOCAL.moments(z)
        mean = self.average.mean(self.mu(pool).mT.unsqueeze(0)).squeeze(0)
        spread = self.average.mean(((pool - mean).square() + var).mT.unsqueeze(0)).squeeze(0)
        return mean, self.sigma(spread.log1p()).exp()

    def divergence(self, support: Tensor, query: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence of what the query implies from what the support implies: a loss."""
        mean, var = self.infer(support)
        other, other_var = self.infer(query)
        ratio = (other_var + self.eps) / (var + self.eps)
        return 0.5 * (ratio + (mean - other).square() / (var + self.eps) - 1 - ratio.log()).sum()

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize a support set in training, a query set in evaluation, `(N, C, *)`."""
        if not self.training:
            return self.normalized(x, *self.stored(self.split(x)))
        mean, var = self.infer(x)
        track(self, 1.0, mean=mean, var=var)
        return self.normalized(x, mean.unsqueeze(0), var.unsqueeze(0))


class PopArt(Normalization):
    """Pop-Art: outputs on the scale of their targets, whose statistics change without changing the outputs.

    y = sigma (weight x + bias) + mean. `update(targets)` averages mean and mean square of the targets, sigma =
    sqrt(square - mean^2), and rescales weight and bias so that y stays what it was; compare `normalize(targets)` with
    (y - mean) / sigma in the loss.

    Args:
        num_features: number of outputs.
        momentum: weight of the newest targets.
        smallest: bound of sigma from below.
        largest: bound of sigma from above.
    """

    running_square: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 3e-4,
        smallest: float = 1e-4,
        largest: float = 1e6,
    ) -> None:
        """Register weight, bias and the moments of the targets."""
        super().__init__()
        positive(smallest, "smallest", "equal targets would be divided by zero")
        valid_momentum(momentum)
        self.num_features, self.momentum, self.smallest, self.largest = num_features, momentum, smallest, largest
        Affine().install(self, num_features)
        keep(self, mean=torch.zeros(num_features), square=torch.ones(num_features))

    @property
    def traits(self) -> Traits:
        """Forward is an affine map; only `update` stores."""
        return Traits()

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the targets `(C,)`."""
        return safe_sqrt(self.running_square - self.running_mean.square()).clamp(self.smallest, self.largest)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Bring `(N, C, *)` to the scale of the targets."""
        Batch().axis(x, self.num_features)
        wide = (-1, *(1,) * (x.ndim - 2))
        sigma, mean = kept(self.sigma, x).reshape(wide), kept(self.running_mean, x).reshape(wide)
        return sigma * Affine().apply(self, x, x, 1, None) + mean

    def normalize(self, targets: Tensor) -> Tensor:
        """Return (targets - mean) / sigma for targets `(N, C)`."""
        return (targets - self.running_mean) / self.sigma

    @torch.no_grad()
    def update(self, targets: Tensor) -> None:
        """Average the moments of targets `(N, C)`, not a number where there is none; outputs stay as they are.

        Args:
            targets: the targets.

        Raises:
            ArgumentError: they have another number of outputs.
        """
        if targets.ndim != 2 or targets.shape[1] != self.num_features:
            raise ArgumentError(f"targets has shape {tuple(targets.shape)}; expected (N, {self.num_features}).")
        old_mean, old = self.running_mean.clone(), self.sigma
        mean, square = targets.nanmean(0), targets.square().nanmean(0)
        missing = mean.isnan()
        track(
            self,
            self.momentum,
            mean=torch.where(missing, old_mean, mean),
            square=torch.where(missing, self.running_square, square),
        )
        weight, bias, new = self.weight, self.bias, self.sigma
        if weight is not None and bias is not None:
            weight.mul_(old / new)
            bias.mul_(old).add_(old_mean - self.running_mean).div_(new)
