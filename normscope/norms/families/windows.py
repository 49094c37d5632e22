"""Normalizations over windows: local context, local contrast, divisive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope.core.errors import ArgumentError
from normscope.norms.affine import folded, scale_shift
from normscope.norms.average import LOCAL
from normscope.norms.families.mixtures_base import unbiased
from normscope.norms.layer import Normalization, in_float
from normscope.norms.operation import safe_sqrt
from normscope.norms.part import Traits, divide, positive
from normscope.norms.recovery import Affine


def window(size: int | Sequence[int], dims: int, name: str = "window") -> tuple[int, ...]:
    """Return a window's size along each spatial dimension.

    Args:
        size: one number for all, or one for each.
        dims: number of spatial dimensions.
        name: name of the argument.

    Returns:
        The sizes.

    Raises:
        ArgumentError: there is not one for each dimension, or one is below 1.
    """
    sizes = (size,) * dims if isinstance(size, int) else tuple(size)
    if len(sizes) != dims or min(sizes) < 1:
        raise ArgumentError(f"{name}={size!r} must be a number above 0, or {dims} of them, one for each dimension.")
    return sizes


def box(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Sum over windows `(N, C, *)`; along each dimension the result is shorter by the window less one."""
    for dim, size in enumerate(sizes, start=2):
        edge = [0, 0] * (x.ndim - 1 - dim) + [1, 0]
        total = F.pad(x.cumsum(dim), edge)
        count = x.shape[dim] - size + 1
        x = total.narrow(dim, size, count) - total.narrow(dim, 0, count)
    return x


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], mode: str) -> Tensor:
    """Pad each spatial dimension with zeros ("constant") or its last values ("replicate")."""
    widths = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return F.pad(x, widths, mode=mode)


def centered_box(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Average over windows centered at each position, with zeros beyond the border, always over the full window."""
    before = [(size - 1) // 2 for size in sizes]
    after = [size - 1 - lead for size, lead in zip(sizes, before, strict=True)]
    return box(padded(x, before, after, "constant"), sizes) / torch.Size(sizes).numel()


class LocalContextNorm(Normalization):
    """Local context normalization: each position is standardized over a window and a group of channels.

    y = weight (x - mean) / sqrt(var + eps) + bias, statistics over the group's channels in the window around the
    position; near the border those of the nearest whole window. Windows as large as the map give group normalization
    with the unbiased variance.

    Args:
        num_features: number of channels.
        channels_per_group: channels of a group.
        window: size of the window, one number or one for each dimension.
        eps: added to the variance.
        affine: weight and bias for each channel.
        published: follow the authors' code: statistics are constants in the backward pass, and the window
            stands half a pixel or one pixel further along each dimension.
    """

    def __init__(
        self,
        num_features: int,
        channels_per_group: int = 2,
        window: int | tuple[int, ...] = 227,
        eps: float = 1e-5,
        affine: bool = True,
        published: bool = False,
    ) -> None:
        """Register weight and bias."""
        super().__init__()
        positive(eps, "eps")
        divide(num_features, channels_per_group)
        self.num_features, self.channels_per_group = num_features, channels_per_group
        self.window, self.eps, self.affine, self.published = window, eps, affine, published
        Affine(affine, affine).install(self, num_features)

    @property
    def traits(self) -> Traits:
        """Each example by itself."""
        return Traits(shift_invariant=True, scale_invariant=True, true_gradient=not self.published, ranks=(3, 4, 5))

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)` with at least one spatial dimension."""
        sizes = window(self.window, x.ndim - 2)
        grouped = x.reshape(x.shape[0], -1, self.channels_per_group, *x.shape[2:])
        if any(w >= n for w, n in zip(sizes, x.shape[2:], strict=True)):
            mean, var = LOCAL.moments(grouped)
            factor = (unbiased(var, grouped[0, 0].numel()) + self.eps).rsqrt()
            scale, shift = (v.repeat_interleave(self.channels_per_group, 1) for v in (factor, -mean * factor))
            return scale_shift(x, *folded(scale, shift, self.weight, self.bias))
        mean, var = self._windows(grouped, sizes)
        y = ((grouped - mean) * (var + self.eps).rsqrt()).reshape(x.shape)
        return Affine(self.affine, self.affine).apply(self, y, x, 1, None)

    def _windows(self, grouped: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.published):
            # one value for each group taken away first keeps the difference of moments accurate
            origin = grouped.mean(tuple(range(2, grouped.ndim)), keepdim=True)
            shifted = grouped - origin
            mean, square = self._moment(shifted, sizes), self._moment(shifted.square(), sizes)
            return (mean + origin), (square - mean.square()).clamp_min(0)

    def _moment(self, grouped: Tensor, sizes: tuple[int, ...]) -> Tensor:
        moment = box(grouped.mean(2), sizes) / torch.Size(sizes).numel()
        spare = [n - have for n, have in zip(grouped.shape[3:], moment.shape[2:], strict=True)]
        before = [size // 2 for size in sizes] if self.published else [(size - 1) // 2 for size in sizes]
        if self.published:
            # the first window begins at the second row and column
            for dim in range(2, moment.ndim):
                moment = moment.narrow(dim, 1, moment.shape[dim] - 1)
            after = [n + 1 - lead for n, lead in zip(spare, before, strict=True)]
        else:
            after = [n - lead for n, lead in zip(spare, before, strict=True)]
        return padded(moment, before, after, "replicate").unsqueeze(2)


class LocalContrastNorm(Normalization):
    """Local contrast normalization: subtract a weighted local mean over all channels, divide by the local deviation.

    v = x - sum w x, y = v / max(c, sigma), sigma = sqrt(sum w v^2): Gaussian weights over window and channels that sum
    to 1 over what lies inside the map; c is the mean of sigma over the example.

    Args:
        num_features: number of channels.
        window: size of the window.
        sigma: standard deviation of the weights in pixels, None for a quarter of the window.
        eps: least divisor.
    """

    def __init__(self, num_features: int, window: int = 9, sigma: float | None = None, eps: float = 1e-4) -> None:
        """Store the settings; there are no parameters."""
        super().__init__()
        positive(eps, "eps")
        self.num_features, self.window, self.sigma, self.eps = num_features, window, sigma, eps

    @property
    def traits(self) -> Traits:
        """Each example by itself."""
        return Traits(shift_invariant=True, scale_invariant=True, ranks=(3, 4, 5))

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)` with at least one spatial dimension."""
        inside = self._blur(torch.ones_like(x[:1, :1]))
        centered = x - self._blur(x.mean(1, keepdim=True)) / inside
        deviation = safe_sqrt(self._blur(centered.square().mean(1, keepdim=True)) / inside)
        least = deviation.mean(tuple(range(1, x.ndim)), keepdim=True)
        return centered * torch.maximum(deviation, least).clamp_min(self.eps).reciprocal()

    def _blur(self, x: Tensor) -> Tensor:
        width = self.window / 4 if self.sigma is None else self.sigma
        reach = torch.arange(self.window, dtype=x.dtype, device=x.device) - (self.window - 1) / 2
        weights = torch.softmax(-0.5 * (reach / width).square(), 0)
        lead = (self.window - 1) // 2
        for dim in range(2, x.ndim):
            place = torch.arange(x.shape[dim], device=x.device)
            tap = place - place.unsqueeze(-1) + lead
            # a product with a band has a faster gradient than windows that overlap
            band = weights[tap.clamp(0, self.window - 1)] * ((tap >= 0) & (tap < self.window))
            x = (x.movedim(dim, -1) @ band.mT).movedim(-1, dim)
        return x


class DivisiveNorm(Normalization):
    """Divisive normalization: subtract the local mean over all channels, divide by the local deviation.

    v = x - box_sum(mean_C x), y = weight v / sqrt(sigma^2 + box_sup(mean_C v^2)) + bias. Without spatial dimensions the
    windows run along the features.

    Args:
        num_features: number of channels.
        sum_window: size of the window of the mean.
        sup_window: size of the window of the deviation.
        sigma: constant in the divisor, its initial value if learned.
        learn_sigma: sigma is a parameter.
        affine: weight and bias for each channel.
        published: divide the box of the deviation by the size of the other window, as the authors' code for maps.
    """

    def __init__(
        self,
        num_features: int,
        sum_window: int | tuple[int, ...] = 3,
        sup_window: int | tuple[int, ...] = 3,
        sigma: float = 1.0,
        learn_sigma: bool = False,
        affine: bool = True,
        published: bool = False,
    ) -> None:
        """Register weight, bias and sigma."""
        super().__init__()
        positive(sigma, "sigma")
        self.num_features, self.sum_window, self.sup_window = num_features, sum_window, sup_window
        self.sigma, self.learn_sigma, self.affine, self.published = sigma, learn_sigma, affine, published
        Affine(affine, affine).install(self, num_features)
        self.register_parameter("deviation", nn.Parameter(torch.tensor(sigma)) if learn_sigma else None)

    @property
    def traits(self) -> Traits:
        """Each example by itself; borders and sigma leave no invariance."""
        return Traits()

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        flat = x.ndim == 2
        z = x.unsqueeze(1) if flat else x
        first, second = (window(w, z.ndim - 2, "window") for w in (self.sum_window, self.sup_window))
        v = z - centered_box(z.mean(1, keepdim=True), first)
        local = centered_box(v.square().mean(1, keepdim=True), second)
        if self.published and not flat:
            local = local * (torch.Size(second).numel() / torch.Size(first).numel())
        sigma: Any = self.sigma if self.deviation is None else self.deviation
        y = (v * (sigma**2 + local).rsqrt()).reshape(x.shape)
        return Affine(self.affine, self.affine).apply(self, y, x, 1, None)


class LocalResponseNorm(Normalization):
    """Local response normalization: x / (k + alpha / size * sum of squares of `size` neighboring channels)^beta.

    Args:
        num_features: number of channels.
        size: number of neighboring channels, zeros beyond the first and the last one.
        alpha: weight of the mean square.
        beta: exponent.
        k: added constant.
    """

    def __init__(
        self, num_features: int, size: int = 5, alpha: float = 5e-4, beta: float = 0.75, k: float = 2.0
    ) -> None:
        """Store the settings; there are no parameters."""
        super().__init__()
        positive(k, "k", "an input of zeros would be divided by zero")
        self.num_features, self.size, self.alpha, self.beta, self.k = num_features, size, alpha, beta, k

    @property
    def traits(self) -> Traits:
        """Each position by itself."""
        return Traits()

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        z = x.flatten(2) if x.ndim > 2 else x.unsqueeze(-1)
        place = torch.arange(x.shape[1], device=x.device)
        apart = place - place.unsqueeze(-1)
        # a product with a band of ones is faster than pooling, an exponential than a power
        near = (apart >= -(self.size // 2)) & (apart <= (self.size - 1) // 2)
        mean = (near.to(x) / self.size) @ z.square()
        return (z * torch.exp(-self.beta * (self.k + self.alpha * mean).log())).reshape(x.shape)
