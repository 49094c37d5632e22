"""Layers that normalize several modes of a batch: by a learned gate for each example, or by a mixture of Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.affine import scale_shift
from normscope.norms.area import Batch
from normscope.norms.average import LOCAL
from normscope.norms.families.mixtures_base import ChannelNorm, RunningNorm, enough, instances, kept
from normscope.norms.layer import in_float
from normscope.norms.part import Traits
from normscope.norms.population import keep, track, valid_momentum


def _several(modes: int, name: str) -> None:
    if modes < 1:
        raise ArgumentError(f"{name}={modes!r} must be at least 1; 2 is usual.")


class ModeNorm(ChannelNorm):
    """Mode normalization: each example belongs to each of K modes by a learned gate, and is normalized in all.

    g = softmax(W pool(x) + b); mean_k and var_k average over the batch with weights g_k;
    y = weight sum_k g_k (x - mean_k) / sqrt(var_k + eps) + bias.

    Args:
        num_features: number of channels.
        modes: K.
        eps: added to the variance.
        momentum: weight of the newest batch in the stored mean and mean square of each mode.
        affine: weight and bias for each channel.
    """

    running_square: Tensor

    def __init__(
        self,
        num_features: int,
        modes: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight, bias, the gates and buffers `(K, C)` that start from 0."""
        super().__init__(num_features, eps, affine)
        _several(modes, "modes")
        valid_momentum(momentum)
        self.modes, self.momentum = modes, momentum
        self.gate = nn.Linear(num_features, modes)
        nn.init.normal_(self.gate.weight, 1 / modes, 0.01)
        nn.init.zeros_(self.gate.bias)
        keep(self, mean=torch.zeros(modes, num_features), square=torch.zeros(modes, num_features))

    @property
    def traits(self) -> Traits:
        """The gates see scale and shift of the input."""
        return Traits(crosses_batch=True, stateful=True)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        z = instances(x, self.num_features)
        gates = self.gate(z.mean(2)).softmax(1)
        mean, var = self._measure(z, gates, x) if self.training else self._stored(z)
        factor = (var + self.eps).rsqrt()
        return self.mapped(x, gates @ factor, -gates @ (mean * factor))

    def _measure(self, z: Tensor, gates: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance `(K, C)` and store them."""
        enough(z.shape[0] * z.shape[2], x)
        mean, var = LOCAL.moments(z)
        weights = gates.mT.unsqueeze(1)
        share = self.average.mean(gates.mT.unsqueeze(0)).mT.clamp_min(torch.finfo(z.dtype).tiny)
        whole = self.average.mean(weights * mean.mT) / share
        spread = var.mT + (mean.mT - whole.unsqueeze(2)).square()
        variance = self.average.mean(weights * spread) / share
        track(self, self.momentum, mean=whole, square=variance + whole.square())
        return whole, variance

    def _stored(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, square = kept(self.running_mean, z), kept(self.running_square, z)
        return mean, (square - mean.square()).clamp_min(0)


class MixtureNorm(ChannelNorm):
    """Mixture normalization: a mixture of K Gaussians is fitted to the batch, each position normalized in all.

    y = weight sum_k p(k | x) / sqrt(share_k) (x - mean_k) / sqrt(var_k + eps) + bias, moments weighted by p(k | x). The
    posteriors come from a few steps of EM, without gradient, from a split along the sum of the standardized channels.

    Args:
        num_features: number of channels.
        components: K.
        iterations: steps of EM.
        eps: added to the variances.
        momentum: weight of the newest batch.
        affine: weight and bias for each channel.
    """

    running_share: Tensor

    def __init__(
        self,
        num_features: int,
        components: int = 2,
        iterations: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight, bias and buffers `(K, C)` and `(K,)`."""
        super().__init__(num_features, eps, affine)
        _several(components, "components")
        valid_momentum(momentum)
        self.components, self.iterations, self.momentum = components, iterations, momentum
        shape = (components, num_features)
        keep(self, mean=torch.zeros(shape), var=torch.ones(shape), share=torch.full(shape[:1], 1 / components))

    @property
    def traits(self) -> Traits:
        """Backward takes the posteriors for constants."""
        return Traits(
            crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True, true_gradient=False
        )

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        z = self.split(x)
        points = z.flatten(2).squeeze(0)
        if self.training:
            enough(points.shape[1], x)
            center = self.average.mean(z).mT
            points = points - center
            posterior = self._fit(points)
            share, mean, var = self._weighted(points, points.square(), posterior)
            track(self, self.momentum, mean=mean + center.mT, var=var, share=share)
        else:
            share, mean, var = (kept(b, z) for b in (self.running_share, self.running_mean, self.running_var))
            posterior = self._posterior(points, points.square(), share, mean, var)
        factor = (var + self.eps).rsqrt()
        weights = posterior * share.detach().clamp_min(torch.finfo(z.dtype).eps).rsqrt().unsqueeze(1)
        y = points * (factor.mT @ weights) - (mean * factor).mT @ weights
        return self.recover(Batch().merge(y.reshape(z.shape), x), x)

    def _weighted(self, points: Tensor, squares: Tensor, posterior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return share `(K,)`, mean and variance `(K, C)` of points and squares `(C, M)` with posteriors `(K, M)`."""
        count = points.shape[1]
        share = self.average.over(posterior.sum(1), count)
        safe = share.clamp_min(torch.finfo(points.dtype).eps).unsqueeze(1)
        mean = self.average.over(posterior @ points.mT, count) / safe
        square = self.average.over(posterior @ squares.mT, count) / safe
        return share, mean, (square - mean.square()).clamp_min(0)

    @torch.no_grad()
    def _fit(self, points: Tensor) -> Tensor:
        """Return posteriors `(K, M)` of points `(C, M)` centered on their mean."""
        squares = points.square()
        spread = self.average.mean(squares.unsqueeze(0)).mT
        line = (points * (spread + self.eps).rsqrt()).sum(0)
        scale = self.average.mean(line.square().reshape(1, 1, -1)).sqrt().squeeze()
        probabilities = torch.arange(1, self.components).to(points) / self.components
        cuts = torch.special.ndtri(probabilities) * scale
        label = (line.unsqueeze(0) > cuts.unsqueeze(1)).sum(0)
        posterior = torch.nn.functional.one_hot(label, self.components).to(points).mT
        for _ in range(self.iterations):
            posterior = self._posterior(points, squares, *self._weighted(points, squares, posterior))
        return posterior

    @torch.no_grad()
    def _posterior(self, points: Tensor, squares: Tensor, share: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Return p(k | x) `(K, M)` for diagonal Gaussians."""
        spread = var + self.eps
        # sum of (x - m)^2 / s as products: no tensor of the size of the batch for each component
        slope = mean / spread
        distance = spread.reciprocal() @ squares - 2 * slope @ points + (slope * mean).sum(1, keepdim=True)
        log = (share.clamp_min(torch.finfo(points.dtype).tiny)).log() - 0.5 * spread.log().sum(1)
        return (log.unsqueeze(1) - 0.5 * distance).softmax(0)


class ExemplarNorm(RunningNorm):
    """Exemplar normalization: instance, layer and batch normalization, weighted for each example by what it looks like.

    y = sum_k a_k (weight_k (x - mean_k) / sqrt(var_k + eps) + bias_k), a softmax of a linear map of the correlations
    z_j . z_k, z_k = relu(linear((pool(x) - mean_k) / sqrt(var_k + eps))).

    Args:
        num_features: number of channels.
        reduction: channels per unit of z.
        eps: added to the variance.
        momentum: weight of the newest batch.
        affine: weight and bias for each channel and normalizer.
    """

    def __init__(
        self,
        num_features: int,
        reduction: int = 8,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register parameters and the stored batch statistics."""
        super().__init__(num_features, eps, momentum, affine)
        self.reduction = reduction
        self.weight = nn.Parameter(torch.ones(3, num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(3, num_features)) if affine else None
        hidden = max(num_features // reduction, 2)
        self.key, self.ratio = nn.Linear(num_features, hidden), nn.Linear(9, 3)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        z = instances(x, self.num_features)
        mean, var = self._moments(z, x)
        factor = (var + self.eps).rsqrt()
        key = self.key((z.mean(2).unsqueeze(1) - mean) * factor).relu()
        part = self.ratio((key @ key.mT).flatten(1)).softmax(1)
        scale = part.unsqueeze(2) * factor * (1 if self.weight is None else self.weight)
        shift = -(scale * mean).sum(1)
        shift = shift if self.bias is None else shift + part @ self.bias
        return scale_shift(x, scale.sum(1), shift)

    def _moments(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of instance, layer and batch `(N, 3, C)`."""
        mean, var = LOCAL.moments(z)
        whole = mean.mean(1, keepdim=True)
        whole_var = (var + (mean - whole).square()).mean(1, keepdim=True)
        batch, batch_var = self.batch(x, (mean, var))
        means = [mean, whole.expand_as(mean), batch.expand_as(mean)]
        variances = [var, whole_var.expand_as(var), batch_var.expand_as(var)]
        return torch.stack(means, 1), torch.stack(variances, 1)


class DynamicNorm(ChannelNorm):
    """Dynamic normalization: learned binary gates decide which channels and examples share statistics.

    mean = V M U and the same of the mean squares, M `(N, C)` the means of the instances, V and U averaging matrices: U
    a Kronecker product over the prime factors p of C of (1 - g) I + g 11^T / p, V the same with one gate for the batch.
    All gates 0 give instance normalization, all 1 batch and layer at once. Gates are steps of parameters, through which
    the gradient passes as if they were the identity.

    Args:
        num_features: number of channels.
        eps: added to the variance.
        momentum: weight of the newest batch.
        affine: weight and bias for each channel.
    """

    running_square: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register parameters and buffers; at first the batch shares statistics, channels do not."""
        super().__init__(num_features, eps, affine)
        valid_momentum(momentum)
        self.momentum = momentum
        self.primes = prime_factors(num_features)
        self.channel_gate = nn.Parameter(torch.full((len(self.primes),), -0.5))
        self.batch_gate = nn.Parameter(torch.full((1,), 0.5))
        keep(self, mean=torch.zeros(num_features), square=torch.ones(num_features))

    @property
    def traits(self) -> Traits:
        """Those of batch normalization; the gradient of the gates is made up."""
        return Traits(
            crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True, true_gradient=False
        )

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        z = instances(x, self.num_features)
        mean, var = LOCAL.moments(z)
        square = var + mean.square()
        share = _step(self.batch_gate)
        whole = self._batch(mean, square, z, x)
        sharing = self.sharing()
        mean = (share * whole[0] + (1 - share) * mean) @ sharing
        square = (share * whole[1] + (1 - share) * square) @ sharing
        return self.normalized(x, mean, (square - mean.square()).clamp_min(0))

    def sharing(self) -> Tensor:
        """Return U `(C, C)`, which averages over the channels that share statistics."""
        matrix = self.channel_gate.new_ones(1, 1)
        for gate, prime in zip(_step(self.channel_gate), self.primes, strict=True):
            eye = torch.eye(prime).to(matrix)
            matrix = torch.kron(matrix, (1 - gate) * eye + gate * torch.full_like(eye, 1 / prime))
        return matrix

    def _batch(self, mean: Tensor, square: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return kept(self.running_mean, z), kept(self.running_square, z)
        enough(z.shape[0] * z.shape[2], x)
        found = self.average.mean(mean.mT.unsqueeze(0)), self.average.mean(square.mT.unsqueeze(0))
        track(self, self.momentum, mean=found[0], square=found[1])
        return found


def _step(gate: Tensor) -> Tensor:
    """Return 0 or 1 by the sign, with the gradient of the identity."""
    return gate + ((gate > 0).to(gate) - gate).detach()


def prime_factors(number: int) -> list[int]:
    """Return the prime factors of a number in ascending order.

    >>> prime_factors(24)
    [2, 2, 2, 3]
    """
    found, factor = [], 2
    while number > 1:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return found
