"""Region normalization: statistics of a masked region and of the rest, over the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.affine import scale_shift
from normscope.norms.area import Batch
from normscope.norms.layer import Normalization, in_float
from normscope.norms.part import Traits, positive
from normscope.norms.recovery import channels


class _Region(Normalization):
    """Standardizes a region and the rest, each by its own statistics over the batch."""

    eps: float

    def centered(self, x: Tensor) -> Tensor:
        """Subtract the mean as a constant, so that squares do not cancel."""
        return x - channels(self.average.mean(Batch().split(x)).detach(), x, 1)

    def coefficients(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b `(1, C)` of a x + b, standard within the region of a mask `(N, 1, *)` of zeros and ones."""
        share = self.average.mean(Batch().split(mask)).clamp_min(torch.finfo(x.dtype).tiny)
        whole, var = self.average.moments(Batch().split(x * mask))
        # the region fills only a part of the batch, and so does its variance: outside it is its mean
        var = (var + whole.square() * (1 - 1 / share)).clamp_min(0)
        scale = ((var + self.eps) / share).rsqrt()
        return scale, -whole / share * scale


class RegionNorm(_Region):
    """Basic region normalization: given the mask of a damaged image, region and rest are standardized apart.

    y = sum over regions r of m_r ((1 + gain_r) (x - mean_r) / sd_r + bias_r)

    Args:
        num_features: number of channels.
        eps: added to the variance of the region filled up with its mean, as in the authors' code.
        affine: gain and bias for each region and channel.
        published: add both biases everywhere, as the authors' code does.
    """

    gain: nn.Parameter | None

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True, published: bool = False) -> None:
        """Register gain and bias, each `(2, C)`: region, rest."""
        super().__init__()
        positive(eps, "eps")
        self.num_features, self.eps, self.affine, self.published = num_features, eps, affine, published
        self.register_parameter("gain", nn.Parameter(torch.zeros(2, num_features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(2, num_features)) if affine else None)

    @property
    def traits(self) -> Traits:
        """It needs a mask."""
        return Traits(crosses_batch=True, ranks=(3, 4, 5), condition="map", shift_invariant=True, scale_invariant=True)

    @in_float
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.
            mask: `(N, 1, *)`, 1 in the region and 0 outside.

        Returns:
            `(N, C, *)`.

        Raises:
            ArgumentError: there is no mask, or its shape does not fit.
        """
        if mask is None or mask.shape != (x.shape[0], 1, *x.shape[2:]):
            found = None if mask is None else tuple(mask.shape)
            raise ArgumentError(
                f"mask={found} must have the shape {(x.shape[0], 1, *x.shape[2:])}; 1 marks the region."
            )
        x, mask = self.centered(x), mask.to(x)
        pairs = [self.coefficients(x, m) for m in (mask, 1 - mask)]
        if self.gain is not None and self.bias is not None:
            biases = self.bias.sum(0).expand_as(self.bias) if self.published else self.bias
            pairs = [
                (scale * (1 + gain), shift * (1 + gain) + bias)
                for (scale, shift), gain, bias in zip(pairs, self.gain, biases, strict=True)
            ]
        inside, outside = (scale_shift(x, *pair) for pair in pairs)
        return torch.where(mask > 0, inside, outside)


class LearnedRegionNorm(_Region):
    """Learned region normalization: the mask comes from the input, gain and bias from the map that gives the mask.

    s = sigmoid(conv([mean_C x, max_C x])), mask = s >= threshold, y = rn(x, mask) (1 + conv(s)) + conv(s).

    Args:
        num_features: number of channels.
        threshold: where the region begins.
        eps: added to the variance.
        kernel_size: of the three convolutions.
    """

    def __init__(self, num_features: int, threshold: float = 0.8, eps: float = 1e-5, kernel_size: int = 7) -> None:
        """Make the convolutions."""
        super().__init__()
        positive(eps, "eps")
        self.num_features, self.threshold, self.eps, self.kernel_size = num_features, threshold, eps, kernel_size
        pad = kernel_size // 2
        self.importance = nn.Conv2d(2, 1, kernel_size, padding=pad, bias=False)
        self.gain_map = nn.Conv2d(1, 1, kernel_size, padding=pad)
        self.bias_map = nn.Conv2d(1, 1, kernel_size, padding=pad)

    @property
    def traits(self) -> Traits:
        """The mask is hard: it has no gradient."""
        return Traits(crosses_batch=True, ranks=(4,), true_gradient=False)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, H, W)`."""
        summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        s = torch.sigmoid(self.importance(summary))
        selected = s.detach() >= self.threshold
        x, mask = self.centered(x), selected.to(x)
        inside, outside = (scale_shift(x, *self.coefficients(x, m)) for m in (mask, 1 - mask))
        y = torch.where(selected, inside, outside)
        gain, bias = self.gain_map(s), self.bias_map(s)
        return torch.addcmul(y + bias, y, gain)
