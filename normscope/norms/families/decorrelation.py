"""Methods that whiten or decorrelate in ways that are more than a composition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.area import Batch
from normscope.norms.average import LOCAL, rows
from normscope.norms.layer import Norm, Normalization, in_float
from normscope.norms.part import Traits, positive
from normscope.norms.population import Running, keep, track, valid_momentum
from normscope.norms.recovery import Affine, channels, mixed
from normscope.norms.split import in_groups
from normscope.norms.whiten import Whiten


class ChannelEquilibrium(Normalization):
    """Channel equilibrium: a mixture of decorrelated channels and of channels weighted by their own variance.

    y = s W x + (1 - s) x g(v) / sqrt(mean v), s = sigmoid(weight), W = covariance^(-1/2) of the batch by Newton's
    iteration, v the variance of each channel of each example, g(v) = sigmoid(FC relu LN FC v). It follows a batch
    normalization with affine parameters; x is not centered again.

    Args:
        num_features: number of channels.
        group_size: channels that are decorrelated together.
        iterations: of Newton's iteration.
        eps: added to the diagonal of the covariance.
        momentum: weight of the newest batch, None for a plain average.
        reduction: of the hidden layer.
        pooling: the covariance is that of the 2 x 2 maxima.
        published: leave W without its factor 1 / sqrt(trace), as the authors' code does.
    """

    running_matrix: Tensor
    running_scale: Tensor

    def __init__(
        self,
        num_features: int,
        group_size: int = 64,
        iterations: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        reduction: int = 4,
        pooling: bool = False,
        published: bool = False,
    ) -> None:
        """Make the gate and the two linear maps; register the stored statistics."""
        super().__init__()
        positive(eps, "eps")
        valid_momentum(momentum)
        self.num_features, self.group_size, self.iterations, self.eps = num_features, group_size, iterations, eps
        self.momentum, self.reduction, self.pooling, self.published = momentum, reduction, pooling, published
        self.area = Batch(num_features // min(group_size, num_features))
        groups, size = self.area.rows(num_features)
        self.operation = Whiten("newton", eps, iterations=iterations)
        self.gate = nn.Parameter(torch.zeros(1))
        hidden = max(num_features // reduction, 1)
        self.fc = nn.Sequential(
            nn.Linear(num_features, hidden, bias=False),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_features, bias=False),
            nn.Sigmoid(),
        )
        keep(self, matrix=torch.eye(size).repeat(groups, 1, 1), scale=torch.zeros(1))

    @property
    def traits(self) -> Traits:
        """It stores the matrix and the mean deviation."""
        return Traits(crosses_batch=True, stateful=True, ranks=(3, 4, 5))

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)` with at least one spatial dimension."""
        z = self.area.split(x)
        _, variance = LOCAL.moments(x.flatten(2))
        variance = variance * (x[0, 0].numel() / max(x[0, 0].numel() - 1, 1))
        if self.training:
            matrix = self._matrix(x)
            scale = self.average.mean(variance.mT.unsqueeze(0)).mean().clamp_min(self.eps**2).sqrt().reshape(1)
            track(self, self.momentum, matrix=matrix, scale=scale)
        else:
            matrix, scale = self.running_matrix, self.running_scale
        whitened = self.operation.apply(z, {"mean": torch.zeros_like(z[:, :, 0, 0]), "matrix": matrix})
        weights = self.fc(variance) / scale.clamp_min(self.eps)
        s = torch.sigmoid(self.gate)
        return s * self.area.merge(whitened, x) + (1 - s) * x * channels(weights, x, 1)

    def _matrix(self, x: Tensor) -> Tensor:
        seen = torch.nn.functional.max_pool2d(x, 2) if self.pooling else x
        share = seen.shape[2:].numel() / x.shape[2:].numel() if self.published else 1.0
        z = self.area.split(seen)
        covariance = self.average.products(z - rows(self.average.mean(z), z)) * share
        sigma = self.operation.regularized(covariance)
        matrix = self.operation.matrix(sigma)
        if not self.published:
            return matrix
        return matrix * sigma.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[:, None, None]


class IsotropicBatchNorm(Normalization):
    """Isotropic batch normalization: channels are scaled down by their deviation and their correlation with others.

    theta = (gamma sd + eps)^-beta, gamma the mean squared correlation with all channels; theta is rescaled so that the
    total variance stays, y = theta x. The statistics are moving averages, constants in the backward pass, used in
    training as in evaluation; the first batch starts them.

    Args:
        num_features: number of channels.
        beta: 0 leaves the input as it is, 1 removes all differences.
        eps: added before the power.
        momentum: weight of the newest batch, None for a plain average.
    """

    running_deviation: Tensor
    running_covariance: Tensor

    def __init__(self, num_features: int, beta: float = 0.5, eps: float = 1e-3, momentum: float | None = 0.05) -> None:
        """Register the stored statistics."""
        super().__init__()
        positive(eps, "eps")
        valid_momentum(momentum)
        self.num_features, self.beta, self.eps, self.momentum = num_features, beta, eps, momentum
        keep(self, deviation=torch.ones(num_features), covariance=torch.eye(num_features))

    @property
    def traits(self) -> Traits:
        """The statistics have no gradient."""
        return Traits(crosses_batch=True, stateful=True, true_gradient=False)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        if self.training:
            self._track(x.detach())
        return x * channels(self.theta().to(x.dtype), x, 1)

    def theta(self) -> Tensor:
        """Return the factor of each channel."""
        deviation, covariance = self.running_deviation, self.running_covariance
        tiny = torch.finfo(deviation.dtype).tiny
        correlation = (covariance / torch.outer(deviation, deviation).clamp_min(tiny)).clamp(-1, 1)
        theta = (correlation.square().mean(1) * deviation + self.eps).pow(-self.beta)
        total = covariance.diagonal().sum()
        return theta * (total / ((covariance.diagonal() * theta.square()).sum() + self.eps)).sqrt()

    def _track(self, x: Tensor) -> None:
        z = Batch().split(x)
        covariance = self.average.products(z - rows(self.average.mean(z), z))[0]
        momentum = 1.0 if int(self.num_batches_tracked) == 0 else self.momentum
        track(self, momentum, deviation=covariance.diagonal().clamp_min(0).sqrt(), covariance=covariance)


class ShuffledWhitening(Normalization):
    """Shuffled decorrelated batch normalization: channels change their groups at random from one pass to the next.

    Args:
        num_features: number of channels.
        groups: number of groups that are whitened apart.
        eps: added to the diagonal of the covariance.
        affine: weight and bias for each channel.
    """

    def __init__(self, num_features: int, groups: int = 4, eps: float = 1e-5, affine: bool = False) -> None:
        """Register weight and bias."""
        super().__init__()
        self.num_features, self.groups, self.eps, self.affine = num_features, groups, eps, affine
        self.whiten = Norm(Batch(groups), Whiten("zca", eps), num_features=num_features)
        Affine(affine, affine).install(self, num_features)

    @property
    def traits(self) -> Traits:
        """Those of batch whitening, with random groups in training."""
        return Traits(crosses_batch=True, shift_invariant=True, scale_invariant=True, random=True)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`; evaluation leaves the channels in their places."""
        if not self.training:
            return Affine(self.affine, self.affine).apply(self, self.whiten(x), x, 1, None)
        order = torch.randperm(x.shape[1], device=x.device)
        y = self.whiten(x[:, order])[:, order.argsort()]
        return Affine(self.affine, self.affine).apply(self, y, x, 1, None)


class DomainWhitening(Normalization):
    """Domain-specific whitening: each domain has its own statistics, all share weight and bias.

    In training a batch without a domain is divided into as many equal parts as there are domains, in order; in
    evaluation it belongs to the last one, the target.

    Args:
        num_features: number of channels.
        domains: number of domains.
        group_size: channels that are whitened together.
        eps: weight of the identity in the covariance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        domains: int = 2,
        group_size: int = 4,
        eps: float = 1e-3,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Make a layer for each domain."""
        super().__init__()
        self.num_features, self.domains, self.group_size = num_features, domains, group_size
        self.eps, self.momentum, self.affine = eps, momentum, affine
        self.whiten = nn.ModuleList(in_groups(num_features, group_size, self._make) for _ in range(domains))
        Affine(affine, affine).install(self, num_features)

    def _make(self, count: int, groups: int) -> Norm:
        operation = Whiten("cholesky", 0.0, self.eps, population="covariance")
        return Norm(Batch(groups), operation, None, Running(self.momentum), num_features=count)

    @property
    def traits(self) -> Traits:
        """Those of batch whitening."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True, condition="domain")

    @in_float
    def forward(self, x: Tensor, domain: int | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.
            domain: the domain of the whole batch, None to divide it.

        Returns:
            `(N, C, *)`.

        Raises:
            ArgumentError: the batch cannot be divided, or there is no such domain.
        """
        if domain is None and not self.training:
            domain = self.domains - 1
        if domain is None and len(x) % self.domains:
            raise ArgumentError(f"a batch of {len(x)} has no {self.domains} equal parts; pass domain=, or pad it.")
        if domain is not None and not 0 <= domain < self.domains:
            raise ArgumentError(f"domain={domain!r} must be at least 0 and below domains={self.domains}.")
        if domain is not None:
            y = self.whiten[domain](x)
        else:
            parts = x.chunk(self.domains)
            y = torch.cat([whiten(part) for whiten, part in zip(self.whiten, parts, strict=True)])
        return Affine(self.affine, self.affine).apply(self, y, x, 1, None)


class GroupColoring(Normalization):
    """Group-wise deep whitening and coloring: the centered content is mixed by a matrix from the style.

    y = alpha (X (x - mean) + shift) + (1 - alpha) x, in each group X = U D U^T with U the columns of S scaled to unit
    length and D their lengths; S and shift come from the style. That x is white is left to `penalty`, in the loss.

    Args:
        num_features: number of channels.
        groups: number of groups.
        alpha: initial weight of the mixed content, learned.
        eps: added to the diagonal of the covariance and to the lengths.
    """

    def __init__(self, num_features: int, groups: int = 4, alpha: float = 0.6, eps: float = 1e-5) -> None:
        """Register the weight of the mixed content."""
        super().__init__()
        positive(eps, "eps")
        self.num_features, self.groups, self.alpha, self.eps = num_features, groups, alpha, eps
        self.area = Batch(groups)
        self.area.rows(num_features)
        self.share = nn.Parameter(torch.tensor([alpha]))

    @property
    def traits(self) -> Traits:
        """The mean is that of the batch."""
        return Traits(crosses_batch=True, condition="style")

    @in_float
    def forward(self, x: Tensor, style: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Color.

        Args:
            x: the content `(N, C, *)`.
            style: S `(N, groups, C / groups, C / groups)` and the shift `(N, C)`.

        Returns:
            `(N, C, *)`.

        Raises:
            ArgumentError: there is no style.
        """
        if style is None:
            raise ArgumentError("style=None: coloring needs (S, shift) from the style; call layer(x, (S, shift)).")
        s, shift = style
        mean = self.average.mean(Batch().split(x))[0]
        unit = s / s.norm(dim=-2, keepdim=True).clamp_min(self.eps)
        matrix = (s @ unit.mT).flatten(1, 2)
        colored = mixed(matrix, x - channels(mean, x, 1), 1, self.groups) + channels(shift, x, 1)
        return self.share * colored + (1 - self.share) * x

    def penalty(self, x: Tensor) -> Tensor:
        """Return the mean absolute difference of the groups' covariance (unbiased, plus eps I) and the identity."""
        z = self.area.split(x)
        count = self.average.count(z)
        covariance = self.average.products(z - rows(self.average.mean(z), z)) * (count / (count - 1))
        eye = torch.eye(covariance.shape[-1], dtype=x.dtype, device=x.device)
        return (covariance + (self.eps - 1) * eye).abs().mean()
