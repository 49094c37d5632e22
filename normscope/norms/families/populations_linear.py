"""Linear layers that normalize their input by population statistics, held constant between updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.area import Batch
from normscope.norms.average import LOCAL, rows
from normscope.norms.layer import Norm, Normalization, in_float
from normscope.norms.operation import Standardize
from normscope.norms.part import Traits, positive
from normscope.norms.population import Running, keep, track, valid_momentum
from normscope.norms.recovery import Affine


class PopulationLinear(Normalization):
    """Base of these layers: y = V U (x - c) + d over the channels, with U and c from statistics of earlier batches.

    Training averages the mean of the inputs into running_mean after each batch, and their covariance into
    running_covariance where U needs it (`correlated`); every `every` batches `refresh` makes them c and U and changes
    V and d so that the function stays the same.

    Args:
        num_features: number of channels of the input.
        out_features: number of channels of the output, None for num_features.
        every: batches between two refreshments, None to call `refresh` yourself.
        momentum: weight of the newest batch in the statistics.
    """

    correlated: ClassVar[bool] = False
    writes_parameters: ClassVar[bool] = True
    center: Tensor
    transform: Tensor
    running_covariance: Tensor
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        num_features: int,
        out_features: int | None = None,
        every: int | None = 1,
        momentum: float | None = 0.1,
        rank: int | None = None,
    ) -> None:
        """Start from c = 0, U = I and torch's initial weights.

        Raises:
            ArgumentError: every or rank is out of range.
        """
        super().__init__()
        valid_momentum(momentum)
        if every is not None and every < 1:
            raise ArgumentError(f"every={every} must be at least 1 batch, or None to refresh by hand.")
        if rank is not None and not 1 <= rank <= num_features:
            raise ArgumentError(f"rank={rank} must be between 1 and num_features={num_features}.")
        self.num_features, self.out_features, self.every, self.momentum = num_features, out_features, every, momentum
        self.rank = rank
        start: Any = nn.Linear(rank or num_features, out_features or num_features)
        self.weight, self.bias = start.weight, start.bias
        self.register_buffer("center", torch.zeros(num_features))
        self.register_buffer("transform", torch.eye(num_features)[: rank or num_features])
        keep(self, mean=torch.zeros(num_features))
        if self.correlated:
            self.register_buffer("running_covariance", torch.eye(num_features))

    @property
    def traits(self) -> Traits:
        """Linear between updates; evaluation is the same function."""
        return Traits(stateful=True)

    def basis(self, covariance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return U and its (pseudo-)inverse for a covariance."""
        eye = torch.eye(self.num_features).to(self.center)
        return eye, eye

    @torch.no_grad()
    def refresh(self, mean: Tensor | None = None, covariance: Tensor | None = None) -> None:
        """Take over new statistics as c and U; V and d change so that y stays the same (up to a rank that is cut).

        Args:
            mean: `(C,)`, by default the running one.
            covariance: `(C, C)`, by default the running one.
        """
        mean = self.running_mean if mean is None else mean
        matrix, inverse = self.basis(covariance)
        plain = self.weight @ self.transform
        self.bias.add_(plain @ (mean - self.center))
        self.weight.copy_(plain @ inverse)
        self.transform.copy_(matrix)
        self.center.copy_(mean)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the population and map linearly.

        Args:
            x: `(N, C, *)`.

        Returns:
            `(N, out, *)`.
        """
        if self.training and self.every and (done := int(self.num_batches_tracked)) and done % self.every == 0:
            self.refresh()
        z = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
        y = self.linear(z)
        if self.training:
            self._track(z.detach())
        return y.reshape(len(x), -1, *x.shape[2:])

    def linear(self, z: Tensor) -> Tensor:
        """Map `(N, C, L)` by weight, transform and center in a single product: W (x - c) + d with W = V U."""
        # copies: a refreshment before the backward pass must not change what that pass needs
        weight = self.weight.to(z.dtype) @ self.transform.to(z.dtype).clone()
        return product(z, weight, self.bias.to(z.dtype) - weight @ self.center.to(z.dtype).clone())

    @torch.no_grad()
    def _track(self, z: Tensor) -> None:
        flat = Batch().split(z)
        mean = self.average.mean(flat)
        found = {"mean": mean}
        if self.correlated:
            found["covariance"] = self.average.products(flat - rows(mean, flat))
        track(self, self.momentum, **found)


class CenteredLinear(PopulationLinear):
    """The centering trick: y = W (x - c) + d, c the mean of the inputs of earlier batches."""

    def __init__(
        self,
        num_features: int,
        out_features: int | None = None,
        every: int | None = 1,
        momentum: float | None = 0.1,
    ) -> None:
        """Start uncentered."""
        super().__init__(num_features, out_features, every, momentum)


class NaturalLinear(PopulationLinear):
    """Layer of a natural neural network (PRONG): y = V U (x - c) + d with white U (x - c).

    U = (Lambda + eps)^(-1/2) E^T from the covariance E Lambda E^T; gradient descent on V and d then approximates the
    natural gradient on the weights of the plain layer. An optimizer's state stays as it was at a refreshment.

    Args:
        num_features: number of channels of the input.
        out_features: number of channels of the output, None for num_features.
        eps: added to the eigenvalues.
        every: batches between two refreshments, None to call `refresh` yourself.
        momentum: weight of the newest batch in the statistics.
    """

    correlated: ClassVar[bool] = True

    def __init__(
        self,
        num_features: int,
        out_features: int | None = None,
        eps: float = 1e-3,
        every: int | None = 1000,
        momentum: float | None = 0.1,
        rank: int | None = None,
    ) -> None:
        """Start unwhitened."""
        super().__init__(num_features, out_features, every, momentum, rank)
        positive(eps, "eps", "directions without variance would be divided by zero")
        self.eps = eps

    def basis(self, covariance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return PCA whitening by the largest eigenvalues, and its pseudo-inverse."""
        values, vectors = torch.linalg.eigh(self.running_covariance if covariance is None else covariance)
        kept = self.rank or self.num_features
        deviations = (values[-kept:].clamp_min(0) + self.eps).sqrt()
        vectors = vectors[:, -kept:]
        return (vectors / deviations).mT, vectors * deviations


class GeneralizedWhitenedLinear(NaturalLinear):
    """Layer of a generalized whitened network: white, compact input, standardized output: BN(V U (x - c) + d).

    U keeps the `rank` largest directions and is refreshed often; `refresh(*rectified_moments(...))` takes the
    statistics of a rectified standardized input from the correlations of its weights instead of data.

    Args:
        num_features: number of channels of the input.
        out_features: number of channels of the output, None for num_features.
        eps: added to the eigenvalues.
        every: batches between two refreshments.
        momentum: weight of the newest batch in the statistics.
        rank: number of directions kept, None for all.
    """

    def __init__(
        self,
        num_features: int,
        out_features: int | None = None,
        eps: float = 1e-3,
        every: int | None = 20,
        momentum: float | None = 0.1,
        rank: int | None = None,
    ) -> None:
        """Start unwhitened."""
        super().__init__(num_features, out_features, eps, every, momentum, rank)
        recovery, population = Affine(), Running(momentum)
        self.standardize = Norm(Batch(), Standardize(), recovery, population, num_features=out_features or num_features)

    @property
    def traits(self) -> Traits:
        """The output is standardized over the batch."""
        return Traits(crosses_batch=True, stateful=True)

    def linear(self, z: Tensor) -> Tensor:
        """Map `(N, C, L)` and standardize."""
        y: Tensor = self.standardize(super().linear(z))
        return y


def rectified_moments(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of max(z, 0) for Gaussian z of mean 0, variance 1 and given correlations.

    E[a b] = (sqrt(1 - r^2) + r (pi - arccos r)) / (2 pi), E[a] = 1 / sqrt(2 pi).

    Args:
        correlation: `(C, C)`; of V x with white x it is V V^T, scaled to a diagonal of 1.

    Returns:
        Mean `(C,)` and covariance `(C, C)`.
    """
    r = correlation.clamp(-1, 1)
    second = ((1 - r.square()).sqrt() + r * (torch.pi - r.arccos())) / (2 * torch.pi)
    mean = r.new_full((len(r),), (2 * torch.pi) ** -0.5)
    return mean, second - mean.square()[0]


def product(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return weight z + bias for `(N, C, L)`."""
    wide = weight.expand(len(z), *weight.shape)
    return wide @ z if bias is None else torch.baddbmm(bias.unsqueeze(1), wide, z)


class _Controlled(torch.autograd.Function):
    """W z + b of `(N, C, L)` whose gradient of W loses a mean, that of the errors or a given one of the inputs."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, weight, mean)
        return product(z, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        z, weight, mean = ctx.saved_tensors
        change, total = (grad @ z.mT).sum(0), grad.sum((0, 2))
        if mean is None:
            count = len(z) * z.shape[2]
            return product(grad, weight.mT), change - torch.outer(total, z.sum((0, 2))) / count, total, None
        change = change - torch.outer(total, mean)
        return product(grad, weight.mT), change, total - change @ mean, None


_controlled: Callable[..., Tensor] = _Controlled.apply


class FactorCenteredLinear(CenteredLinear):
    """Factor centering: inputs lose their running mean, errors their batch mean in the gradient of the weights.

    dW = sum (delta - mean delta) (x - c)^T, dd = sum delta; `center_slope` centers the third factor.
    """

    @property
    def traits(self) -> Traits:
        """The gradient of the weights is centered on purpose."""
        return Traits(stateful=True, true_gradient=False)

    def linear(self, z: Tensor) -> Tensor:
        """Map with centered errors."""
        centered = z - self.center.to(z.dtype).clone().unsqueeze(1)
        return _controlled(centered, self.weight.to(z.dtype), self.bias.to(z.dtype), None)


def center_slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of each entry whose derivative, for the backward pass, loses its mean over the batch.

    The mean slope passes through a linear shortcut instead, which the network is to have.

    Args:
        function: a function of each entry, as torch.tanh.
        x: `(N, *)`.

    Returns:
        function(x), with derivative function'(x) - mean over N of function'(x).
    """
    y = function(x)
    with torch.enable_grad():
        inner = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(inner).sum(), inner)
    return y - (x - x.detach()) * slope.mean(0, keepdim=True)


class MeanNormalizedLinear(PopulationLinear):
    """Mean-normalized stochastic gradient: y = W x + b, its gradients those of centered inputs.

    dW = sum delta (x - mean)^T, db = sum delta - dW mean, with the running mean of earlier batches.
    """

    def __init__(self, num_features: int, out_features: int | None = None, momentum: float | None = 0.1) -> None:
        """Start from mean 0."""
        super().__init__(num_features, out_features, None, momentum)

    @property
    def traits(self) -> Traits:
        """The gradient of the parameters is changed on purpose."""
        return Traits(stateful=True, true_gradient=False)

    def linear(self, z: Tensor) -> Tensor:
        """Map; the gradient sees the running mean."""
        mean = self.running_mean.to(z.dtype).clone()
        return _controlled(z, self.weight.to(z.dtype), self.bias.to(z.dtype), mean)


class LinearTransformations(Normalization):
    """Perceptron with transformed units and a shortcut: y = A f(Bx + b) + S x + d, f(h) = tanh(h) + alpha h + beta.

    alpha = -mean tanh'(h) and beta = -mean (tanh(h) + alpha h), from earlier batches, make the units and their slopes
    0 on average; S and d take up the difference, so that the function stays the same at `refresh`.

    Args:
        num_features: number of channels of input and output.
        hidden: number of units, None for num_features.
        every: batches between two refreshments, None to call `refresh` yourself.
        momentum: weight of the newest batch in the statistics.
    """

    writes_parameters: ClassVar[bool] = True
    running_slope: Tensor
    running_value: Tensor
    running_input: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(
        self, num_features: int, hidden: int | None = None, every: int | None = 1, momentum: float | None = 0.1
    ) -> None:
        """Start from untransformed units."""
        super().__init__()
        valid_momentum(momentum)
        self.num_features, self.hidden, self.every, self.momentum = num_features, hidden, every, momentum
        units = hidden or num_features
        self.inner, self.outer = nn.Linear(num_features, units), nn.Linear(units, num_features)
        self.shortcut = nn.Linear(num_features, num_features, bias=False)
        self.register_buffer("alpha", torch.zeros(units))
        self.register_buffer("beta", torch.zeros(units))
        keep(self, slope=torch.zeros(units), value=torch.zeros(units), input=torch.zeros(units))

    @property
    def traits(self) -> Traits:
        """The same function in training and evaluation, between updates."""
        return Traits(stateful=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over alpha and beta from the running statistics; shortcut and bias change so that y stays the same."""
        alpha = -self.running_slope
        beta = -(self.running_value + alpha * self.running_input)
        outer, turned = self.outer.weight, (alpha - self.alpha)
        self.shortcut.weight.sub_((outer * turned) @ self.inner.weight)
        self.outer.bias.sub_(outer @ (turned * self.inner.bias + beta - self.beta))
        self.alpha.copy_(alpha)
        self.beta.copy_(beta)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C, *)` to the same shape."""
        if self.training and self.every and (done := int(self.num_batches_tracked)) and done % self.every == 0:
            self.refresh()
        z = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
        inner, outer, shortcut = (layer.weight.to(z.dtype) for layer in (self.inner, self.outer, self.shortcut))
        alpha, beta = (value.to(z.dtype).clone() for value in (self.alpha, self.beta))
        h = product(z, inner, self.inner.bias.to(z.dtype))
        units = h.tanh()
        # A (alpha h + beta) + S x goes through B and the small matrices, so that x and the units are multiplied once
        bent = outer * alpha
        bias = self.outer.bias.to(z.dtype) + outer @ beta + bent @ self.inner.bias.to(z.dtype)
        y = product(units, outer, bias) + product(z, shortcut + bent @ inner)
        if self.training:
            seen, values = (Batch().split(v.detach()) for v in (h, units))
            (mean, spread), value = LOCAL.moments(values), LOCAL.mean(seen)
            slope = 1 - spread - mean.square()
            track(self, self.momentum, slope=slope, value=mean, input=value)
        return y.reshape(x.shape)
