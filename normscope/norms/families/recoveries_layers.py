"""Recoveries that are more than a part: calibrated, passport-aware and instance-with-layer normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope.core.errors import ArgumentError
from normscope.norms.area import Batch, Instance, Layer
from normscope.norms.average import LOCAL, rows
from normscope.norms.families.recoveries_condition import needed, scale_and_shift
from normscope.norms.families.recoveries_input import positions, scaled, several
from normscope.norms.layer import Norm, Normalization, in_float
from normscope.norms.operation import Standardize, safe_sqrt
from normscope.norms.part import Traits, divide, known_features, positive, require
from normscope.norms.population import Running
from normscope.norms.recovery import Affine, Recovery, channels

INTENSITIES = ("mean", "deviation")


def intensity(z: Tensor, kind: str) -> Tensor:
    """Return mean or biased standard deviation of each channel of each example, `(N, C)` from `(N, C, L)`."""
    return z.mean(2) if kind == "mean" else safe_sqrt(z.var(2, correction=0))


@dataclass(frozen=True, repr=False)
class Calibrated(Recovery):
    """Scale calibration: y * weight * sigmoid(a K(y) + b) + bias, K an intensity of each channel of each example.

    Attributes:
        scaling: K, "mean" or "deviation" over space.
        affine: there are weight and bias.
    """

    scaling: str = "mean"
    affine: bool = True

    def install(self, host: nn.Module, num_features: int | None) -> None:
        """Register weight, bias, scale_weight (a, initially 0) and scale_bias (b, initially 1), all `(C,)`."""
        count = known_features(num_features, self)
        Affine(self.affine, self.affine).install(host, count)
        host.register_parameter("scale_weight", nn.Parameter(torch.zeros(count)))
        host.register_parameter("scale_bias", nn.Parameter(torch.ones(count)))

    def apply(self, host: Any, y: Tensor, x: Tensor, axis: int, condition: Any) -> Tensor:
        """Gate the normalized values, then scale and shift."""
        gate = torch.sigmoid(intensity(positions(y, axis), self.scaling) * host.scale_weight + host.scale_bias)
        if not self.affine:
            return y * channels(gate, y, axis)
        return scaled(y, gate * host.weight, host.bias, axis)


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
        recovery = Calibrated(scaling, affine)
        super().__init__(Batch(), Standardize(eps), recovery, Running(momentum), num_features=num_features)
        self.affine, self.centering, self.scaling = affine, centering, scaling
        self.register_parameter("center_weight", nn.Parameter(torch.zeros(num_features)))

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor that differ from its defaults."""
        return Normalization.settings(self)

    @in_float
    def forward(self, x: Tensor, condition: Any = None) -> Tensor:
        """Calibrate, normalize `(N, C, *)` over the batch, calibrate."""
        axis = self.area.axis(x, self.num_features)
        center = intensity(positions(x, axis), self.centering) * self.center_weight
        return super().forward(x + channels(center, x, axis))


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
        operation = Standardize(self.eps, self.unbiased)
        instance = operation.apply(z, operation.measure(z))
        whole = Layer("first").split(x)
        layer = operation.apply(whole, operation.measure(whole)).reshape(z.shape)
        y = (torch.lerp(layer, instance, rho.unsqueeze(1))).reshape(x.shape)
        if not self.adaptive:
            return self._recovery.apply(self, y, x, 1, None)
        scale, shift = scale_and_shift(style, self.num_features, self)
        return scaled(y, scale.to(y.dtype), shift.to(y.dtype), 1)


class PassportNorm(Normalization):
    """Passport-aware normalization: a second branch whose scale and shift follow from secret passports.

    Without passports y = BN(x) * weight + bias. With passports (s, k), activations of the layer before,
    y = BN'(x) * f(mean s) + f(mean k), means over examples and space, f(v) = B leaky_relu(A v).

    Args:
        num_features: number of channels.
        eps: added to the variance.
        momentum: weight of the newest batch in the stored statistics.
        affine: weight and bias of the branch without passports.
        reduction: f has num_features / reduction hidden units.
        published: both branches share stored statistics, as in the authors' code; else each has its own.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        reduction: int = 4,
        published: bool = False,
    ) -> None:
        """Register both branches and f."""
        super().__init__()
        self.num_features, self.eps, self.momentum, self.affine = num_features, eps, momentum, affine
        self.reduction, self.published = reduction, published
        Affine(affine, affine).install(self, num_features)
        self.public = self._branch()
        self.secret = self.public if published else self._branch()
        hidden = divide(num_features, reduction)
        inside, outside = nn.Linear(num_features, hidden, bias=False), nn.Linear(hidden, num_features, bias=False)
        self.passport = nn.Sequential(inside, nn.LeakyReLU(), outside)

    def _branch(self) -> Norm:
        return Norm(Batch(), Standardize(self.eps), None, Running(self.momentum), num_features=self.num_features)

    @property
    def traits(self) -> Traits:
        """It takes passports."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True, condition="other")

    def scale_and_shift(self, passports: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return scale and shift `(C,)` of the branch with passports.

        Args:
            passports: activations of the layer before for both passports, each `(M, C, *)`.

        Returns:
            Scale, from the first, and shift, from the second.
        """
        dtype = next(self.passport.parameters()).dtype
        first, second = (Instance().split(p.to(dtype)).mean((0, 2)) for p in passports)
        return self.passport(first), self.passport(second)

    def sign_loss(self, passports: tuple[Tensor, Tensor], signature: Tensor, margin: float = 0.1) -> Tensor:
        """Return the loss that writes a signature into the signs of the scale.

        Args:
            passports: as in `scale_and_shift`.
            signature: 1 or -1 for each channel.
            margin: the scale should exceed it, with that sign.

        Returns:
            0.1 sum relu(margin - signature * scale) + 1e-5 sum scale^2.
        """
        scale, _ = self.scale_and_shift(passports)
        return 0.1 * torch.relu(margin - signature * scale).sum() + 1e-5 * scale.square().sum()

    @in_float
    def forward(self, x: Tensor, passports: tuple[Tensor, Tensor] | None = None, which: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`.
            passports: activations of the layer before for both passports, or None for the branch without.
            which: `(N,)`, True for the examples that take the branch with passports; all if not given.

        Returns:
            A tensor of the shape of x.
        """
        if passports is None:
            return self._public(x)
        if which is None:
            return self._secret(x, passports)
        y = torch.empty_like(x)
        for chosen, branch in ((~which, self._public), (which, lambda z: self._secret(z, passports))):
            if bool(chosen.any()):
                y = y.index_put((chosen,), branch(x[chosen]))
        return y

    def _public(self, x: Tensor) -> Tensor:
        return Affine(self.affine, self.affine).apply(self, self.public(x), x, 1, None)

    def _secret(self, x: Tensor, passports: tuple[Tensor, Tensor]) -> Tensor:
        scale, shift = self.scale_and_shift(passports)
        y: Tensor = self.secret(x)
        return scaled(y, scale, shift, 1)


class AdaptiveConvolutionNorm(Normalization):
    """Adaptive convolution: patches are standardized by themselves, then convolved with a filter from a style.

    y_p = sum over offsets o and channels j of W(v)_o (x_(p + o) - mean_p) / sd_p + b(v), mean and standard deviation of
    each channel over the patch around p; beyond the border the map repeats its edge.

    Args:
        num_features: number of channels.
        style: length of the style vector v.
        kernel: size of patch and filter, odd and at least 3.
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
        """Register the layers to_filter and to_shift; at first the filter passes on the middle of the patch.

        Raises:
            ArgumentError: the kernel is even or below 3.
        """
        super().__init__()
        positive(eps, "eps")
        if kernel < 3 or kernel % 2 == 0:
            raise ArgumentError(f"kernel={kernel!r} must be odd and at least 3: a patch needs a middle and a variance.")
        self.num_features, self.style, self.kernel, self.groups = num_features, style, kernel, groups
        self.eps, self.std = eps, std
        width = divide(num_features, groups)
        start = torch.zeros(num_features, width, kernel**2)
        start[torch.arange(num_features), torch.arange(num_features) % width, kernel**2 // 2] = 1
        self.to_filter, self.to_shift = nn.Linear(style, start.numel()), nn.Linear(style, num_features)
        for layer, bias in ((self.to_filter, start.flatten()), (self.to_shift, torch.zeros(num_features))):
            nn.init.normal_(layer.weight, std=std)
            with torch.no_grad():
                layer.bias.copy_(bias)

    @property
    def traits(self) -> Traits:
        """Patches of images, and a style."""
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
        v = needed(style, self, f"a style vector of length {self.style} for each example").to(x.dtype)
        n, c = x.shape[:2]
        margin = self.kernel // 2
        patches = F.unfold(F.pad(x, (margin,) * 4, mode="replicate"), self.kernel).reshape(n, c, self.kernel**2, -1)
        var, mean = torch.var_mean(patches, 2, correction=0, keepdim=True)
        z = ((patches - mean) * (var + self.eps).rsqrt()).reshape(n, self.groups, -1, patches.shape[3])
        filters = self.to_filter(v).reshape(n, self.groups, c // self.groups, -1)
        y: Tensor = (filters @ z).reshape(x.shape) + channels(self.to_shift(v), x, 1)
        return y


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
        var, mean = torch.var_mean(z, 2)
        sd = (var + self.eps).sqrt()
        gates = [
            torch.sigmoid(norm(mean * g[:, 0] + sd * g[:, 1])) for norm, g in zip(self.norms, self.gate, strict=True)
        ]
        y = z * rows(gates[0], z)
        if self.both:
            y = y + rows(mean * (gates[1] - gates[0]), z)
        return y.reshape(x.shape)


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
            return x * 1
        order = torch.randperm(x.shape[0], device=x.device) if order is None else order
        z = Instance().split(x)
        several(z.shape[2], x, self)
        operation = Standardize(self.eps, unbiased=True)
        stats = operation.measure(z, LOCAL)
        sd = (stats["var"] + self.eps).sqrt()
        return (operation.apply(z, stats) * rows(sd[order], z) + rows(stats["mean"][order], z)).reshape(x.shape)
