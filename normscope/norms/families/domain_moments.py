"""Layers that hold the moments of each domain and mix or select them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope.norms.affine import folded, scale_shift
from normscope.norms.average import LOCAL
from normscope.norms.families.branches import members, present
from normscope.norms.families.mixtures_base import ChannelNorm, enough, instances, kept
from normscope.norms.layer import in_float
from normscope.norms.part import Traits
from normscope.norms.population import keep, track, valid_momentum


class _DomainMoments(ChannelNorm):
    """Base of the layers that hold statistics `(domains, C)` and mix or select them.

    Args:
        num_features: number of channels.
        domains: number of domains.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(self, num_features: int, domains: int, eps: float, momentum: float | None, affine: bool) -> None:
        """Register weight, bias and the stored statistics of each domain."""
        super().__init__(num_features, eps, affine)
        valid_momentum(momentum)
        self.domains, self.momentum = domains, momentum
        keep(self, mean=torch.zeros(domains, num_features), var=torch.ones(domains, num_features))

    @property
    def traits(self) -> Traits:
        """Those of batch normalization within a domain."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True, condition="domain")

    def measured(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each domain `(domains, C)`, stored ones without examples; store the rest."""
        mean, var = kept(self.running_mean, x).clone(), kept(self.running_var, x).clone()
        if not self.training:
            return mean, var
        stored_mean, stored_var = mean.clone(), var.clone()
        each = LOCAL.moments(instances(x, self.num_features))
        for place in range(self.domains):
            chosen = (labels == place).nonzero().squeeze(1)
            if not present(each[0][chosen], self.average, True):
                continue
            own, spread, count = self.part(each, chosen, x)
            index = torch.tensor([place], device=x.device)
            mean, var = mean.index_copy(0, index, own), var.index_copy(0, index, spread)
            larger = spread * (count / (count - 1))
            stored_mean[place], stored_var[place] = own.detach()[0], larger.detach()[0]
        with torch.no_grad():
            self._store(stored_mean, stored_var)
        return mean, var

    def part(self, each: tuple[Tensor, Tensor], chosen: Tensor, x: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
        """Return mean and biased variance `[1, C]` of chosen examples, and the number of samples."""
        length = x.shape[2:].numel()
        enough(len(chosen) * length if self.average is LOCAL else 2, x)
        mean, var = (value[chosen] for value in each)
        return *self.pooled(mean, var), self.average.count(mean.mT.unsqueeze(0)) * length

    def _store(self, mean: Tensor, var: Tensor) -> None:
        # domains without examples come back as they are, which the average leaves there
        track(self, self.momentum, mean=mean, var=var)


class AutoDial(_DomainMoments):
    """AutoDIAL: each domain is normalized by a mixture of source and target statistics, with a learned weight.

    mean_source = a mean_s + (1 - a) mean_t, var_source = a E_s[(x - mean_source)^2] + (1 - a) E_t[(x - mean_source)^2];
    for the target with the roles exchanged; a in [0.5, 1]. Weight and bias are shared.

    Args:
        num_features: number of channels.
        eps: added to the variance.
        momentum: weight of the newest batch in the stored mixtures, None for a plain average.
        affine: weight and bias for each channel.
        init: initial a.
    """

    alpha: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.001,
        affine: bool = True,
        init: float = 1.0,
    ) -> None:
        """Register weight, bias, a and the stored mixtures."""
        super().__init__(num_features, 2, eps, momentum, affine)
        self.init = init
        self.alpha = nn.Parameter(torch.tensor([float(init)]))

    @in_float
    def forward(self, x: Tensor, domain: Tensor | int | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.
            domain: 0 for source and 1 for target examples `(N,)`; without it the first half of a training batch is the
                source, and all of an evaluation batch the target.

        Returns:
            A tensor of the shape of x.
        """
        half = torch.arange(x.shape[0]) >= x.shape[0] // 2
        usual = half.long() if self.training else 1
        labels = members(usual if domain is None else domain, x.shape[0], 2, None).to(x.device)
        mean, var = self._mixed(x, labels) if self.training else self.measured(x, labels)
        return self.normalized(x, mean[labels], var[labels])

    def _mixed(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        each = LOCAL.moments(instances(x, self.num_features))
        found = [self.part(each, (labels == place).nonzero().squeeze(1), x) for place in (0, 1)]
        means, variances, counts = zip(*found, strict=True)
        sizes = [torch.as_tensor(count).to(x) for count in counts]
        a = self.alpha.clamp(0.5, 1)
        own, other = torch.cat(means), torch.cat(means[::-1])
        mean = a * own + (1 - a) * other
        var = a * (torch.cat(variances) + (own - mean).square())
        var = var + (1 - a) * (torch.cat(variances[::-1]) + (other - mean).square())
        count = torch.stack(sizes).reshape(2, 1)
        track(self, self.momentum, mean=mean, var=var * (count / (count - 1)))
        return mean, var


class DomainOptimizedNorm(_DomainMoments):
    """Domain-specific optimized normalization: each domain mixes batch and instance statistics in its own proportion.

    mean = w_d mean_batch + (1 - w_d) mean_instance, the variance likewise, w_d = sigmoid(mix_d), weight and bias of
    each domain. Without labels, evaluation averages the outputs of all branches.

    Args:
        num_features: number of channels.
        domains: number of domains.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel and domain.
    """

    mix: nn.Parameter

    def __init__(
        self,
        num_features: int,
        domains: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight and bias `(domains, C)`, the mixtures and the stored statistics."""
        super().__init__(num_features, domains, eps, momentum, affine)
        self.mix = nn.Parameter(torch.zeros(domains))
        self.weight = nn.Parameter(torch.ones(domains, num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(domains, num_features)) if affine else None

    @in_float
    def forward(self, x: Tensor, domain: Tensor | int | None = None) -> Tensor:
        """Normalize `(N, C, *)` from domains `(N,)`, or in evaluation from none."""
        if domain is None and not self.training:
            outputs = [self._branch(x, torch.full((x.shape[0],), d, device=x.device)) for d in range(self.domains)]
            return torch.stack(outputs).mean(0)
        return self._branch(x, members(domain, x.shape[0], self.domains, None).to(x.device))

    def _branch(self, x: Tensor, labels: Tensor) -> Tensor:
        mean, var = self.measured(x, labels)
        z = instances(x, self.num_features)
        own, own_var = LOCAL.moments(z)
        share = torch.sigmoid(self.mix)[labels].unsqueeze(1)
        center = share * mean[labels] + (1 - share) * own
        factor = (share * var[labels] + (1 - share) * own_var + self.eps).rsqrt()
        gain, bias = (None if v is None else v[labels] for v in (self.weight, self.bias))
        return scale_shift(x, *folded(factor, -center * factor, gain, bias))


class GatedBatchNorm(_DomainMoments):
    """Gated batch normalization: the branches of several domains, weighted by how much an example looks like each.

    y = weight sum_d g_d(x) (x - mean_d) / sqrt(var_d + eps) + bias, g = softmax of a linear map of the pooled input.
    Train the gate to tell the domains: cross entropy of `scores(x)` with the labels.

    Args:
        num_features: number of channels.
        domains: number of domains.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        domains: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight, bias, the gate and the stored statistics."""
        super().__init__(num_features, domains, eps, momentum, affine)
        self.gate = nn.Linear(num_features, domains)

    @property
    def traits(self) -> Traits:
        """The gate sees shift and scale."""
        return Traits(crosses_batch=True, stateful=True, condition="domain")

    def scores(self, x: Tensor) -> Tensor:
        """Return the gate's logits `(N, domains)`."""
        found: Tensor = self.gate(instances(x, self.num_features).mean(2))
        return found

    @in_float
    def forward(self, x: Tensor, domain: Tensor | int | None = None) -> Tensor:
        """Normalize `(N, C, *)`; training needs the domain of each example `(N,)` for the statistics."""
        labels = members(domain if self.training else 0, x.shape[0], self.domains, None).to(x.device)
        mean, var = self.measured(x, labels)
        gates = self.scores(x).softmax(1)
        factor = (var + self.eps).rsqrt()
        return self.mapped(x, gates @ factor, -gates @ (mean * factor))
