"""Attentive normalization for image generation: an image is divided into soft regions, each normalized by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope.norms.area import Instance
from normscope.norms.families.recoveries_input import several
from normscope.norms.layer import Normalization, in_float
from normscope.norms.part import Traits, positive


class SemanticNorm(Normalization):
    """Attentive normalization over learned soft regions.

    S = softmax over entities of (F x + alpha K(x_sampled)^T Q(x)) / temperature assigns each position to entities;
    y = x + residual * sum_i S_i (gain_i (x - mean_i) / sqrt(var_i + eps) + bias_i), mean and variance of each channel
    over space, weighted by S_i. residual starts from 0.

    Args:
        num_features: number of channels.
        entities: number of regions.
        sampling: compare the positions also with sampled ones, one for each entity: at random in training, evenly
            spaced in evaluation.
        temperature: the larger, the softer the regions.
        eps: added to the variance.
        affine: gain and bias for each region and channel.
    """

    gain: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        entities: int = 16,
        sampling: bool = True,
        temperature: float = 10.0,
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        """Register filters (F), keys (K), queries (Q), alpha, residual, gain and bias."""
        super().__init__()
        positive(eps, "eps")
        positive(temperature, "temperature", "regions need a temperature")
        self.num_features, self.entities, self.sampling = num_features, entities, sampling
        self.temperature, self.eps, self.affine = temperature, eps, affine
        self.filters = nn.Parameter(torch.randn(entities, num_features))
        self.residual = nn.Parameter(torch.zeros(1))
        if sampling:
            width = max(num_features // 8, 1)
            self.keys, self.queries = nn.Linear(num_features, width), nn.Linear(num_features, width)
            self.alpha = nn.Parameter(torch.full((entities,), 0.5))
        shape = (entities, num_features)
        self.register_parameter("gain", nn.Parameter(torch.ones(shape)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(shape)) if affine else None)

    @property
    def traits(self) -> Traits:
        """Positions are sampled at random in training."""
        return Traits(random=self.sampling, ranks=(3, 4, 5))

    def orthogonality(self) -> Tensor:
        """Return |F F^T - I|^2, to be added to the loss so that the entities differ."""
        return (self.filters @ self.filters.T - torch.eye(self.entities).to(self.filters)).square().sum()

    def layout(self, x: Tensor) -> Tensor:
        """Return the regions S `(N, entities, L)` of an input `(N, C, *)`; they add to 1 at each position."""
        z = Instance().split(x)
        scores = self.filters @ z
        if self.sampling:
            sampled = self.keys(z[:, :, self._positions(z.shape[2], x.device)].mT)
            queries = torch.baddbmm(self.queries.bias.unsqueeze(1), self.queries.weight.expand(len(z), -1, -1), z)
            # alpha balances both scores, and only weights between 0 and 1 do
            scores = scores + self.alpha.clamp(0, 1).unsqueeze(1) * (sampled @ queries)
        return torch.softmax(scores / self.temperature, 1)

    def _positions(self, count: int, device: torch.device) -> Tensor:
        if self.training:
            return torch.randperm(count, device=device)[torch.arange(self.entities, device=device) % count]
        return torch.linspace(0, count - 1, self.entities, device=device).round().long()

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        z = Instance().split(x)
        several(z.shape[2], x, self)
        regions = self.layout(x)
        share = regions / regions.sum(2, keepdim=True)
        # about the mean of the instance, so that squares do not cancel
        middle = z.mean(2, keepdim=True)
        centered = z - middle
        offset = share @ centered.mT
        mean = offset + middle.mT
        var = (share @ centered.square().mT - offset.square()).clamp_min(0)
        scale = (var + self.eps).rsqrt()
        if self.gain is not None:
            scale = scale * self.gain
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        y = torch.addcmul(shift.mT @ regions, z, scale.mT @ regions)
        return torch.addcmul(x, self.residual, y.reshape(x.shape))
