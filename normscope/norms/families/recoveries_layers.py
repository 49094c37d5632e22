"""Recoveries that are more than a part: statistics of each channel of each example change the normalization itself."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope.core.errors import ArgumentError
from normscope.norms.affine import scale_shift
from normscope.norms.area import Batch, Instance
from normscope.norms.families.recoveries_condition import DynamicConvolution, scale_and_shift
from normscope.norms.families.recoveries_input import several
from normscope.norms.families.recoveries_moments import moments
from normscope.norms.layer import Norm, Normalization, in_float
from normscope.norms.operation import Standardize, safe_sqrt
from normscope.norms.part import Traits, positive, require
from normscope.norms.population import Running
from normscope.norms.recovery import Affine

INTENSITIES = ("mean", "deviation")


class RepresentativeBatchNorm(Norm):
    """Representative batch normalization: batch normalization between two calibrations by each example's own channels.

    x' = x + center_weight * K(x), standardized over the batch to z;
    y = z * weight * sigmoid(scale_weight * K(z) + scale_bias) + bias.

    At first the gate is sigmoid(1) everywhere, and x' = x.

    Args:
        num_features: number of channels.
        eps: added to the variance.
        momentum: weight of the newest batch in the stored statistics.
        affine: weight and bias for each channel.
        centering: K before, "mean" or "deviation" of a channel over space.
        scaling: K after.
    """

    center_weight: Tensor
    scale_weight: Tensor
    scale_bias: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        centering: str = "mean",
        scaling: str = "mean",
    ) -> None:
        """Register the parameters of both calibrations."""
        require(centering, "centering", INTENSITIES)
        require(scaling, "scaling", INTENSITIES)
        recovery = Affine(affine, affine)
        super().__init__(Batch(), Standardize(eps), recovery, Running(momentum), num_features=num_features)
        self.affine, self.centering, self.scaling = affine, centering, scaling
        for name, start in (("center_weight", 0.0), ("scale_weight", 0.0), ("scale_bias", 1.0)):
            self.register_parameter(name, nn.Parameter(torch.full((num_features,), start)))

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor that differ from its defaults."""
        return Normalization.settings(self)

    @in_float
    def forward(self, x: Tensor, condition: Any = None) -> Tensor:
        """Calibrate, normalize `(N, C, *)` over the batch, calibrate."""
        # each step is a factor and a summand for each channel of each example, which follow from the moments
        self.area.axis(x, self.num_features)
        if self.training:
            self._check_samples(x, 1)
        mean, var = moments(Instance().split(x))
        deviation = safe_sqrt(var)
        moved = self.center_weight * (mean if self.centering == "mean" else deviation)
        center, total = self._batch(x, mean + moved, var)
        inverse = (total + self.eps).rsqrt()
        left = (mean + moved - center) * inverse
        kept = left if self.scaling == "mean" else deviation * inverse
        gain = torch.sigmoid(self.scale_weight * kept + self.scale_bias)
        if self.weight is not None and self.bias is not None:
            gain = gain * self.weight
            return scale_shift(x, gain * inverse, gain * inverse * (moved - center) + self.bias)
        return scale_shift(x, gain * inverse, gain * inverse * (moved - center))

    def _batch(self, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance `(C,)` of the moved batch from moments `(N, C)`, or the stored ones."""
        if not self.training:
            return self.running_mean, self.running_var
        center = self.average.mean(mean.T.unsqueeze(0)).squeeze(0)
        total = self.average.mean((var + (mean - center).square()).T.unsqueeze(0)).squeeze(0)
        stats = {"mean": center.unsqueeze(0), "var": total.unsqueeze(0)}
        cast(Running, self.population).update(self, self.area.split(x), stats)
        return center, total


class LayerInstanceNorm(Normalization):
    """Layer-instance normalization: each channel learns how much of instance and of layer normalization it takes.

    y = scale * (rho IN(x) + (1 - rho) LN(x)) + shift, scale and shift learned or, if adaptive, given with the input.

    Args:
        num_features: number of channels.
        adaptive: scale and shift come with the input.
        eps: added to the variances.
        affine: learn scale and shift; only without `adaptive`.
        rho: initial rho; None for the published 0.9 if adaptive and 0 if not.
        unbiased: variances divide by n - 1.
        smooth: use clip(rho - smooth, 0, 1) instead of rho, where above 0.
    """

    def __init__(
        self,
        num_features: int,
        adaptive: bool = False,
        eps: float = 1e-5,
        affine: bool = True,
        rho: float | None = None,
        unbiased: bool = True,
        smooth: float = 0.0,
    ) -> None:
        """Register mix (rho), and weight and bias if they are learned."""
        super().__init__()
        positive(eps, "eps")
        self.num_features, self.adaptive, self.eps, self.affine = num_features, adaptive, eps, affine
        self.rho, self.unbiased, self.smooth = rho, unbiased, smooth
        start = (0.9 if adaptive else 0.0) if rho is None else rho
        self.mix = nn.Parameter(torch.full((num_features,), start))
        self._recovery.install(self, num_features)

    @property
    def _recovery(self) -> Affine:
        learned = self.affine and not self.adaptive
        return Affine(learned, learned)

    @property
    def traits(self) -> Traits:
        """Those of instance and layer normalization."""
        condition = "style" if self.adaptive else ""
        return Traits(shift_invariant=True, scale_invariant=True, ranks=(3, 4, 5), condition=condition)

    @torch.no_grad()
    def clip(self) -> None:
        """Clip rho to [0, 1], as published after each step of the optimizer."""
        self.mix.clamp_(0, 1)

    @in_float
    def forward(self, x: Tensor, style: Any = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.
            style: if adaptive, `(N, 2C)` that holds scales then shifts, or a pair of them.

        Returns:
            A tensor of the shape of x.
        """
        z = Instance().split(x)
        several(z.shape[2], x, self)
        rho = (self.mix - self.smooth).clamp(0, 1) if self.smooth else self.mix
        mean, var = moments(z)
        whole = mean.mean(1, keepdim=True)
        # all of an example from its channels: what varies within them and between them
        total = (var + (mean - whole).square()).mean(1, keepdim=True)
        first, second = rho * self._inverse(var, z.shape[2]), (1 - rho) * self._inverse(total, z[0].numel())
        factor, center = first + second, first * mean + second * whole
        if self.adaptive:
            scale, shift = (v.to(x.dtype) for v in scale_and_shift(style, self.num_features, self))
        elif self.weight is not None and self.bias is not None:
            scale, shift = self.weight, self.bias
        else:
            return scale_shift(x, factor, -center)
        return scale_shift(x, factor * scale, shift - center * scale)

    def _inverse(self, var: Tensor, count: int) -> Tensor:
        return (var * (count / (count - 1) if self.unbiased else 1) + self.eps).rsqrt()


def window_mean(x: Tensor, size: int) -> Tensor:
    """Average over square windows inside the map `(N, C, H, W)`; slices are faster than torch's pooling."""
    for dim in (2, 3):
        count = x.shape[dim] - size + 1
        total = x.narrow(dim, 0, count)
        for start in range(1, size):
            total = total + x.narrow(dim, start, count)
        x = total
    return x / size**2


class AdaptiveConvolutionNorm(Normalization):
    """Adaptive convolution: local standardization, then a convolution with a filter predicted from a style.

    y = W(v) * z + b(v), z_p = (x_p - mean_p) / sqrt(var_p + eps), mean and variance of each channel over the window
    around p; beyond the border the map repeats its edge.

    Args:
        num_features: number of channels.
        style: length of the style vector v.
        kernel: size of window and filter, odd and at least 3.
        groups: the filter connects channels within so many groups.
        eps: added to the variance.
        std: standard deviation of the initial weights of the prediction.
    """

    def __init__(
        self,
        num_features: int,
        style: int,
        kernel: int = 3,
        groups: int = 1,
        eps: float = 1e-5,
        std: float = 0.02,
    ) -> None:
        """Register the layers to_filter and to_shift; at first the filter is near the identity.

        Raises:
            ArgumentError: the kernel is even or below 3.
        """
        super().__init__()
        positive(eps, "eps")
        if kernel < 3 or kernel % 2 == 0:
            raise ArgumentError(
                f"kernel={kernel!r} must be odd and at least 3: a window needs a middle and a variance."
            )
        self.num_features, self.style, self.kernel, self.groups = num_features, style, kernel, groups
        self.eps, self.std = eps, std
        self.recovery = DynamicConvolution(style, kernel, groups, std)
        self.recovery.install(self, num_features)

    @property
    def traits(self) -> Traits:
        """Windows of images, and a style."""
        return Traits(shift_invariant=True, scale_invariant=True, ranks=(4,), condition="style")

    @in_float
    def forward(self, x: Tensor, style: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, H, W)`.
            style: `(N, style)`.

        Returns:
            A tensor of the shape of x.
        """
        # about the mean of each channel, so that squares do not cancel
        centered = x - x.mean((2, 3), keepdim=True)
        wide = F.pad(centered, (self.kernel // 2,) * 4, mode="replicate")
        mean = window_mean(wide, self.kernel)
        var = (window_mean(wide.square(), self.kernel) - mean.square()).clamp_min(0)
        return self.recovery.apply(self, (centered - mean) * (var + self.eps).rsqrt(), x, 1, style)


class SelfNorm(Normalization):
    """Self normalization: each channel of each example learns what to keep of its own mean and standard deviation.

    y = x sigmoid(BN(a mean + b sd)), or with a second gate for the mean,
    y = (x - mean) sigmoid(BN(a mean + b sd)) + mean sigmoid(BN(a' mean + b' sd)); mean and sd over space.

    Args:
        num_features: number of channels.
        eps: added to the unbiased variance.
        momentum: weight of the newest batch in the stored statistics of the gates.
        both: there is a gate for the mean.
    """

    def __init__(self, num_features: int, eps: float = 1e-12, momentum: float | None = 0.1, both: bool = False) -> None:
        """Register the weights `(gates, C, 2)` and a batch normalization for each gate."""
        super().__init__()
        self.num_features, self.eps, self.momentum, self.both = num_features, eps, momentum, both
        gates = 2 if both else 1
        self.gate = nn.Parameter(torch.empty(gates, num_features, 2).uniform_(-(0.5**0.5), 0.5**0.5))
        self.norms = nn.ModuleList(
            Norm(Batch(), Standardize(), Affine(), Running(momentum), num_features=num_features) for _ in range(gates)
        )

    @property
    def traits(self) -> Traits:
        """The gates cross the batch."""
        return Traits(crosses_batch=True, stateful=True, ranks=(3, 4, 5))

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Recalibrate `(N, C, *)`."""
        z = Instance().split(x)
        several(z.shape[2], x, self)
        mean, var = moments(z, unbiased=True)
        sd = (var + self.eps).sqrt()
        gates = [
            torch.sigmoid(norm(mean * g[:, 0] + sd * g[:, 1])) for norm, g in zip(self.norms, self.gate, strict=True)
        ]
        return scale_shift(x, gates[0], mean * (gates[1] - gates[0]) if self.both else None)


class CrossNorm(Normalization):
    """Crossed instance statistics: in training examples exchange mean and standard deviation of their channels.

    y = (x - mean) / sd * sd[other] + mean[other]; evaluation leaves the input as it is.

    Args:
        num_features: number of channels.
        probability: how often a batch is crossed.
        eps: added to the unbiased variance.
    """

    def __init__(self, num_features: int, probability: float = 0.5, eps: float = 1e-5) -> None:
        """Keep the settings."""
        super().__init__()
        positive(eps, "eps")
        self.num_features, self.probability, self.eps = num_features, probability, eps

    @property
    def traits(self) -> Traits:
        """Examples are crossed at random."""
        return Traits(crosses_batch=True, random=True, ranks=(3, 4, 5))

    @in_float
    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """Cross `(N, C, *)` in training, with the examples that `order` names if given."""
        if not self.training or (order is None and float(torch.rand(())) >= self.probability):
            return x
        order = torch.randperm(x.shape[0], device=x.device) if order is None else order
        z = Instance().split(x)
        several(z.shape[2], x, self)
        mean, var = moments(z, unbiased=True)
        sd = (var + self.eps).sqrt()
        factor = sd[order] / sd
        return scale_shift(x, factor, mean[order] - mean * factor)
