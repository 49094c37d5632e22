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
from normscope.norms.operation import Standardize
from normscope.norms.part import Traits, divide
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
