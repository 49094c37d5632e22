"""Linear layers that normalize their input by population statistics, held constant between updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope.core.errors import ArgumentError
from normscope.norms.area import Batch
from normscope.norms.layer import Norm, Normalization, in_float
from normscope.norms.operation import Standardize
from normscope.norms.part import Traits, positive
from normscope.norms.population import Running, keep, track, valid_momentum
from normscope.norms.recovery import Affine


class PopulationLinear(Normalization):
    """Base of these layers: y = V U (x - c) + d over the channels, with U and c from statistics of earlier batches.

    Training averages the mean and the covariance of the inputs into running_mean and running_covariance after each
    batch; every `every` batches `refresh` makes them c and U and changes V and d so that the function stays the same.

    Args:
        num_features: number of channels of the input.
        out_features: number of channels of the output, None for num_features.
        every: batches between two refreshments, None to call `refresh` yourself.
        momentum: weight of the newest batch in the statistics.
    """

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
        keep(self, mean=torch.zeros(num_features), covariance=torch.eye(num_features))

    @property
    def traits(self) -> Traits:
        """Linear between updates; evaluation is the same function."""
        return Traits(stateful=True)

    def basis(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Return U and its (pseudo-)inverse for a covariance."""
        eye = torch.eye(self.num_features, dtype=covariance.dtype, device=covariance.device)
        return eye, eye

    @torch.no_grad()
    def refresh(self, mean: Tensor | None = None, covariance: Tensor | None = None) -> None:
        """Take over new statistics as c and U; V and d change so that y stays the same (up to a rank that is cut).

        Args:
            mean: `(C,)`, by default the running one.
            covariance: `(C, C)`, by default the running one.
        """
        mean = self.running_mean if mean is None else mean
        matrix, inverse = self.basis(self.running_covariance if covariance is None else covariance)
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
        z = x.movedim(1, -1)
        # copies: a refreshment before the backward pass must not change what that pass needs
        y = self.linear(F.linear(z - self.center.to(x.dtype).clone(), self.transform.to(x.dtype).clone()))
        if self.training:
            self._track(z.detach())
        return y.movedim(-1, 1)

    def linear(self, z: Tensor) -> Tensor:
        """Map `(N, *, C)` by weight and bias."""
        return F.linear(z, self.weight.to(z.dtype), self.bias.to(z.dtype))

    @torch.no_grad()
    def _track(self, z: Tensor) -> None:
        flat = Batch(channels="last").split(z, -1)
        mean = self.average.mean(flat)
        covariance = self.average.products(flat - mean.unsqueeze(-1))
        track(self, self.momentum, mean=mean, covariance=covariance)


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

    def basis(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Return PCA whitening by the largest eigenvalues, and its pseudo-inverse."""
        values, vectors = torch.linalg.eigh(covariance)
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
        area = Batch(channels="last")
        self.standardize = Norm(area, Standardize(), recovery, population, num_features=out_features or num_features)

    @property
    def traits(self) -> Traits:
        """The output is standardized over the batch."""
        return Traits(crosses_batch=True, stateful=True)

    def linear(self, z: Tensor) -> Tensor:
        """Map `(N, *, C)` and standardize."""
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


class _Centered(torch.autograd.Function):
    """z W^T + b, with errors centered over the batch in the gradient of W alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        return F.linear(z, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, weight = ctx.saved_tensors
        errors = grad.flatten(0, -2)
        return grad @ weight, (errors - errors.mean(0)).mT @ z.flatten(0, -2), errors.sum(0)


_centered: Callable[..., Tensor] = _Centered.apply


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
        return _centered(z, self.weight.to(z.dtype), self.bias.to(z.dtype))


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


class _MeanNormalized(torch.autograd.Function):
    """x W^T + b, with the step that descent on a layer with centered input would take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, mean)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean = ctx.saved_tensors
        errors = grad.flatten(0, -2)
        change = errors.mT @ (x.flatten(0, -2) - mean)
        return grad @ weight, change, errors.sum(0) - change @ mean, None


_mean_normalized: Callable[..., Tensor] = _MeanNormalized.apply


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
        return _mean_normalized(z, self.weight.to(z.dtype), self.bias.to(z.dtype), mean)


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
        z = x.movedim(1, -1)
        h = _linear(self.inner, z)
        units = h.tanh()
        y = _linear(self.outer, units + h * self.alpha.to(h.dtype).clone() + self.beta.to(h.dtype))
        y = y + _linear(self.shortcut, z)
        if self.training:
            flat, values = h.detach().flatten(0, -2), units.detach().flatten(0, -2)
            slope = (1 - values.square()).mean(0)
            track(self, self.momentum, slope=slope, value=values.mean(0), input=flat.mean(0))
        return y.movedim(-1, 1)


def _linear(layer: nn.Linear, z: Tensor) -> Tensor:
    """Call a linear layer with its parameters in the type of z."""
    bias = layer.bias
    return F.linear(z, layer.weight.to(z.dtype), None if bias is None else bias.to(z.dtype))
