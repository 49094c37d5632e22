"""Switchable whitening: a learned mixture of batch and instance whitening with standardizations."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from normscope.norms import roots
from normscope.norms.average import LOCAL
from normscope.norms.families.mixtures_base import ChannelNorm, enough, instances, kept, unbiased
from normscope.norms.layer import in_float
from normscope.norms.part import Traits, divide, require
from normscope.norms.population import keep, track, valid_momentum

Moments = tuple[Tensor, Tensor]

KINDS: Final = {
    2: ("batch whitening", "instance whitening"),
    3: ("batch whitening", "instance whitening", "layer"),
    5: ("batch whitening", "instance whitening", "batch", "instance", "layer"),
}


class SwitchableWhitening(ChannelNorm):
    """Switchable whitening: y = weight W (x - mean) + bias, W the inverse root of a mixture of covariances.

    mean = sum_k p_k mean_k, Sigma = sum_k q_k Sigma_k + eps I, for each example and group of channels; p and q softmax
    over (batch whitening, instance whitening[, batch, instance][, layer]); W by Newton's iteration.

    Args:
        num_features: number of channels.
        kinds: 2, 3 or 5 of them.
        groups: number of groups of channels that are whitened.
        iterations: of Newton's method.
        tie: p and q are the same.
        eps: added to the diagonal of Sigma.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
        published: of 5 kinds, "batch" and "instance" take the weights of the whitenings for their variances.
    """

    running_covariance: Tensor
    mean_weight: nn.Parameter
    var_weight: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        kinds: int = 2,
        groups: int = 1,
        iterations: int = 5,
        tie: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        published: bool = False,
    ) -> None:
        """Register parameters and buffers."""
        super().__init__(num_features, eps, affine)
        require(kinds, "kinds", KINDS)
        valid_momentum(momentum)
        size = divide(num_features, groups)
        self.kinds, self.groups, self.iterations, self.tie = kinds, groups, iterations, tie
        self.momentum, self.published = momentum, published
        self.mean_weight = nn.Parameter(torch.ones(kinds))
        self.register_parameter("var_weight", None if tie else nn.Parameter(torch.ones(kinds)))
        keep(self, mean=torch.zeros(groups, size), covariance=torch.zeros(groups, size, size))

    @property
    def traits(self) -> Traits:
        """Those of batch whitening, up to the mixture."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        z = instances(x, self.num_features)
        z = z.reshape(z.shape[0], self.groups, -1, z.shape[2])
        found = dict(zip(KINDS[5], self._moments(z, x), strict=True))
        p = self.mean_weight.softmax(0)
        q = p if self.var_weight is None else self.var_weight.softmax(0)
        if self.kinds == 5 and self.published:
            q = torch.cat([q[:2], q[:2], q[4:]])
        names = KINDS[self.kinds]
        mean = torch.stack([w * found[k][0].expand(z.shape[:3]) for w, k in zip(p, names, strict=True)]).sum(0)
        shape = (*z.shape[:3], z.shape[2])
        sigma = torch.stack([w * found[k][1].expand(shape) for w, k in zip(q, names, strict=True)]).sum(0)
        root = roots.newton(sigma + self.eps * torch.eye(z.shape[2]).to(z), self.iterations)
        y = torch.baddbmm((root @ -mean.unsqueeze(-1)).flatten(0, 1), root.flatten(0, 1), z.flatten(0, 1))
        return self.recover(y.reshape(x.shape), x)

    def _moments(self, z: Tensor, x: Tensor) -> tuple[Moments, ...]:
        """Return means `[N or 1, groups, c or 1]` and covariances of all kinds."""
        mean = z.mean(3)
        centered = z - mean.unsqueeze(-1)
        covariance = centered @ centered.mT / z.shape[3]
        batch = self._batch(mean, covariance, z, x)
        enough(z.shape[1:].numel(), x)
        layer, biased = LOCAL.moments(z.flatten(1, 2).unsqueeze(1))
        eye = torch.eye(z.shape[2]).to(z)
        layer_moments = layer.reshape(-1, 1, 1), unbiased(biased, z[0].numel()).reshape(-1, 1, 1, 1) * eye
        return (
            batch,
            (mean, covariance),
            (batch[0], batch[1] * eye),
            (mean, covariance * eye),
            layer_moments,
        )

    def _batch(self, means: Tensor, covariances: Tensor, z: Tensor, x: Tensor) -> Moments:
        """Return those of the batch, which follow from those of its examples."""
        if not self.training:
            return kept(self.running_mean, z).unsqueeze(0), kept(self.running_covariance, z).unsqueeze(0)
        length = z.shape[3]
        count = len(z) * length
        enough(count, x)
        mean = self.average.over(means.sum(0) * length, count)
        apart = (means - mean).movedim(0, -1)
        covariance = self.average.over((covariances.sum(0) + apart @ apart.mT) * length, count)
        track(self, self.momentum, mean=mean, covariance=covariance)
        return mean.unsqueeze(0), covariance.unsqueeze(0)
