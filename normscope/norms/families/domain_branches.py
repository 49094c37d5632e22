"""Layers with a branch for each domain, role or width: statistics and parameters of each, or shared in part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.affine import folded, scale_shift
from normscope.norms.area import Batch
from normscope.norms.families.branches import by_branch, members
from normscope.norms.families.mixtures_base import RunningNorm, enough, kept
from normscope.norms.layer import Norm, Normalization, in_float
from normscope.norms.operation import Standardize
from normscope.norms.part import Traits, positive
from normscope.norms.population import Running, keep, valid_momentum
from normscope.norms.recovery import Affine


class DomainNorm(Normalization):
    """Batch normalization with statistics, weight and bias of its own for each domain.

    Args:
        num_features: number of channels.
        domains: number of domains.
        default: domain of an input without labels, None to refuse it.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        domains: int = 2,
        default: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Make a layer for each domain."""
        super().__init__()
        self.num_features, self.domains, self.default, self.eps = num_features, domains, default, eps
        self.momentum, self.affine = momentum, affine
        recovery = Affine() if affine else None
        self.branches = nn.ModuleList(
            Norm(Batch(), Standardize(eps), recovery, Running(momentum), num_features=num_features)
            for _ in range(domains)
        )

    @property
    def traits(self) -> Traits:
        """Those of batch normalization within a domain."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True, condition="domain")

    @in_float
    def forward(self, x: Tensor, domain: Tensor | int | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.
            domain: labels `(N,)`, or one domain for the whole batch.

        Returns:
            A tensor of the shape of x.
        """
        labels = members(domain, x.shape[0], self.domains, self.default).to(x.device)
        return by_branch(x, labels, list(self.branches), self.average, self.training)


class SwitchableWidthNorm(Normalization):
    """Switchable batch normalization: statistics, weight and bias of its own for each width of a slimmable network.

    The number of channels of the input tells the width.

    Args:
        num_features: number of channels of the widest.
        widths: fractions of it.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0),
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight, bias and buffers `(widths, C)`, of which a width uses the first of its channels."""
        super().__init__()
        positive(eps, "eps")
        valid_momentum(momentum)
        self.num_features, self.widths, self.eps, self.momentum, self.affine = (
            num_features,
            widths,
            eps,
            momentum,
            affine,
        )
        self.sizes = [round(num_features * width) for width in widths]
        shape = (len(widths), num_features)
        self.weight = nn.Parameter(torch.ones(shape)) if affine else None
        self.bias = nn.Parameter(torch.zeros(shape)) if affine else None
        keep(self, mean=torch.zeros(shape), var=torch.ones(shape))

    @property
    def traits(self) -> Traits:
        """Those of batch normalization."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)` with as many channels as one of the widths.

        Args:
            x: the input.

        Returns:
            A tensor of the shape of x.

        Raises:
            ArgumentError: no width has that many channels.
        """
        if x.ndim < 2 or x.shape[1] not in self.sizes:
            raise ArgumentError(f"x has shape {tuple(x.shape)}; widths={self.widths!r} have {self.sizes} channels.")
        place, size = self.sizes.index(x.shape[1]), x.shape[1]
        z = Batch().split(x)
        stored_mean, stored_var = self.running_mean[place, :size], self.running_var[place, :size]
        if self.training:
            enough(z.shape[2:].numel(), x)
            mean, var = self.average.moments(z)
            count = self.average.count(z)
            self.num_batches_tracked.add_(1)
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            stored_mean.lerp_(mean.detach().squeeze(0).to(stored_mean), rate)
            stored_var.lerp_((var.detach().squeeze(0) * (count / (count - 1))).to(stored_var), rate)
        else:
            mean, var = kept(stored_mean, z).unsqueeze(0), kept(stored_var, z).unsqueeze(0)
        factor = (var + self.eps).rsqrt()
        gain, bias = (None if v is None else v[place, :size] for v in (self.weight, self.bias))
        return scale_shift(x, *folded(factor, -mean * factor, gain, bias))


class DomainAgnosticNorm(RunningNorm):
    """Domain agnostic normalization: the statistics of the source examples normalize those of all domains.

    Args:
        num_features: number of channels.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    @property
    def traits(self) -> Traits:
        """Those of batch normalization."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True, condition="domain")

    @in_float
    def forward(self, x: Tensor, domain: Tensor | int | None = None) -> Tensor:
        """Normalize `(N, C, *)`; domain is 0 for source examples `(N,)`, all without it."""
        source = x
        if self.training:
            labels = members(domain, x.shape[0], int(torch.as_tensor(0 if domain is None else domain).max()) + 1, 0)
            source = x[(labels == 0).to(x.device)]
        return self.normalized(x, *self.batch(source))
