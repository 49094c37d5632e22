"""Layers of later years that are more than a composition: filter response, global response, gated, residual ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope.core.errors import ArgumentError
from normscope.norms.affine import scale_shift
from normscope.norms.area import Instance, Layer
from normscope.norms.layer import Norm, Normalization, in_float
from normscope.norms.operation import RMS, Operation, Standardize, safe_sqrt
from normscope.norms.part import Traits, positive, require
from normscope.norms.recovery import Affine, channels


class FilterResponseNorm(Normalization):
    """Filter response normalization: each channel of each example is divided by its root mean square over space.

    y = max(weight * x / sqrt(mean x^2 + |eps|) + bias, tau); without a threshold the maximum is left out.

    Args:
        num_features: number of channels.
        eps: added to the mean square.
        affine: weight and bias for each channel.
        threshold: tau for each channel, initially 0: the thresholded linear unit in place of the activation.
        learn_eps: eps is learned for each channel, as published for maps of a single position.
    """

    tau: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        threshold: bool = True,
        learn_eps: bool = False,
    ) -> None:
        """Register weight, bias, tau and offset (the learned eps), all `(C,)`, where there are such."""
        super().__init__()
        positive(eps, "eps", "channels of zeros would be divided by zero")
        self.num_features, self.eps, self.affine = num_features, eps, affine
        self.threshold, self.learn_eps = threshold, learn_eps
        Affine(affine, affine).install(self, num_features)
        self.register_parameter("tau", nn.Parameter(torch.zeros(num_features)) if threshold else None)
        learned = nn.Parameter(torch.full((num_features,), eps)) if learn_eps else None
        self.register_parameter("offset", learned)

    @property
    def traits(self) -> Traits:
        """The scale of the input cancels."""
        return Traits(scale_invariant=True)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        square = self.average.square(Instance().split(x))
        offset = self.get_parameter("offset").abs() if self.learn_eps else self.eps
        scale = (square + offset).rsqrt() * (1 if self.weight is None else self.weight)
        shift = self.bias if self.bias is None else self.bias.unsqueeze(0)
        if self.tau is None:
            return scale_shift(x, scale, shift)
        # max(y, tau) = relu(y - tau) + tau costs fewer passes
        tau = self.tau.unsqueeze(0)
        return scale_shift(torch.relu(scale_shift(x, scale, -tau if shift is None else shift - tau)), None, tau)


class GlobalResponseNorm(Normalization):
    """Global response normalization: channels of large norm over space are strengthened against the others.

    y = x + weight * x * r + bias, r_c = ||x_c|| / (mean over channels of ||x_c|| + eps), norms over space.

    Args:
        num_features: number of channels.
        eps: added to the mean norm.
        channels: "first" (N, C, *), "last" (N, *, C), or "auto" to go by the shape.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, num_features: int, eps: float = 1e-6, channels: str = "auto") -> None:
        """Register weight and bias, initially 0, so that the layer starts as the identity."""
        super().__init__()
        positive(eps, "eps")
        self.num_features, self.eps, self.channels = num_features, eps, channels
        self.area = Layer(channels)
        self.weight, self.bias = nn.Parameter(torch.zeros(num_features)), nn.Parameter(torch.zeros(num_features))

    @property
    def traits(self) -> Traits:
        """A factor on the input is a factor on the output."""
        return Traits(channels_last=self.channels == "last")

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Strengthen the channels of `(N, C, *)` or `(N, *, C)`."""
        axis = self.area.axis(x, self.num_features)
        z = x if axis == 1 else x.movedim(-1, 1)
        z = Instance().split(z)
        norms = safe_sqrt(self.average.square(z) * z.shape[2])
        response = norms / (norms.mean(1, keepdim=True) + self.eps)
        return x * (1 + channels(self.weight * response, x, axis)) + channels(self.bias, x, axis)


def _operation(kind: str, eps: float) -> Operation:
    require(kind, "kind", ("layer", "rms"))
    return Standardize(eps) if kind == "layer" else RMS(eps)


def token_norm(num_features: int, kind: str, eps: float, affine: bool, channels: str = "last") -> Norm:
    """Return layer or root-mean-square normalization of each token.

    Args:
        num_features: number of channels.
        kind: "layer" or "rms".
        eps: added to the variance or to the mean square.
        affine: weight, and for "layer" bias.
        channels: where they are.

    Returns:
        The layer.
    """
    recovery = Affine(shift=kind == "layer") if affine else None
    return Norm(Layer(channels), _operation(kind, eps), recovery, num_features=num_features)


class GatedNorm(Normalization):
    """Gated normalization of tokens: y = norm(x * silu(gate)) * weight, or y = norm(x) * weight * silu(gate).

    Args:
        num_features: number of channels, on the last axis.
        kind: "rms" or "layer".
        groups: normalize so many groups of channels by themselves.
        eps: added to the mean square or to the variance.
        affine: a weight, and for "layer" a bias.
        before: normalize before the gate instead of after it.
    """

    def __init__(
        self,
        num_features: int,
        kind: str = "rms",
        groups: int = 1,
        eps: float = 1e-5,
        affine: bool = True,
        before: bool = False,
    ) -> None:
        """Register weight and bias."""
        super().__init__()
        self.num_features, self.kind, self.groups, self.eps = num_features, kind, groups, eps
        self.affine, self.before = affine, before
        self.operation = _operation(kind, eps)
        self.recovery = Affine(affine, affine and kind == "layer")
        self.recovery.install(self, num_features)
        if groups < 1 or num_features % groups:
            raise ArgumentError(f"groups={groups} does not divide num_features={num_features}; choose a divisor.")

    @property
    def traits(self) -> Traits:
        """It takes a gate."""
        centered = self.kind == "layer" and self.before
        return Traits(shift_invariant=centered, scale_invariant=True, channels_last=True, condition="other")

    @in_float
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, *, C)`.
            gate: of the shape of x, None for no gate.

        Returns:
            A tensor of the shape of x.
        """
        opened = torch.ones((), dtype=x.dtype, device=x.device) if gate is None else F.silu(gate.to(x.dtype))
        value = x if self.before else x * opened
        z = value.reshape(-1, self.groups, self.num_features // self.groups)
        y = self.operation.apply(z, self.operation.measure(z)).reshape(x.shape)
        y = self.recovery.apply(self, y, x, -1, None)
        return y * opened if self.before else y


class DeepNorm(Normalization):
    """DeepNorm: layer normalization after a weighted residual connection, y = LN(alpha * x + f(x)).

    Args:
        num_features: number of channels, on the last axis.
        depth: number of layers N of a model with an encoder or a decoder alone; alpha = (2 N)^(1/4).
        alpha: weight of the residual connection, instead of depth.
        kind: "layer" or "rms".
        eps: added to the variance.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        depth: int = 12,
        alpha: float | None = None,
        kind: str = "layer",
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        """Make the normalization."""
        super().__init__()
        positive(depth, "depth", "alpha would be 0")
        self.num_features, self.depth, self.alpha, self.kind = num_features, depth, alpha, kind
        self.eps, self.affine = eps, affine
        self.norm = token_norm(num_features, kind, eps, affine)

    @property
    def traits(self) -> Traits:
        """It takes the branch f(x)."""
        return Traits(channels_last=True, condition="other")

    @property
    def factor(self) -> float:
        """Weight of the residual connection."""
        return float((2 * self.depth) ** 0.25 if self.alpha is None else self.alpha)

    @property
    def gain(self) -> float:
        """Factor of the initial weights of values, outputs and feed-forward layers: (8 N)^(-1/4)."""
        return float((8 * self.depth) ** -0.25)

    @in_float
    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor:
        """Normalize `(N, *, C)` with the branch of the same shape, none for 0."""
        y: Tensor = self.norm(self.factor * x if branch is None else self.factor * x + branch.to(x.dtype))
        return y


class SandwichLayer(Normalization):
    """Normalization before and after a branch, y = x + norm(f(norm(x))): sandwich and peri-layer normalization.

    Args:
        num_features: number of channels, on the last axis.
        branch: f, None for the identity.
        kind: "layer" or "rms".
        eps: added to the variance or to the mean square.
        affine: weight, and for "layer" bias.
    """

    def __init__(
        self,
        num_features: int,
        branch: nn.Module | None = None,
        kind: str = "layer",
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        """Make both normalizations."""
        super().__init__()
        self.num_features, self.branch, self.kind, self.eps, self.affine = num_features, branch, kind, eps, affine
        self.before = token_norm(num_features, kind, eps, affine)
        self.after = token_norm(num_features, kind, eps, affine)

    @property
    def traits(self) -> Traits:
        """The residual connection lets the scale of the input through."""
        return Traits(channels_last=True)

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """Run the branch on `(N, *, C)` between both normalizations; further arguments are the branch's."""
        z = self.before(x)
        y: Tensor = x + self.after(z if self.branch is None else self.branch(z, *arguments))
        return y


class HypersphereNorm(Normalization):
    """A step on the hypersphere in place of a residual connection: y = unit(h + |a| (unit(f(x)) - h)), h = unit(x).

    unit divides each token by its length; a = weight * init / scale, so that a starts from init and learns at the pace
    of `scale`.

    Args:
        num_features: number of channels, on the last axis.
        init: initial step a.
        scale: initial weight, None for 1 / sqrt(num_features).
        eps: least length.
    """

    weight: nn.Parameter

    def __init__(self, num_features: int, init: float = 0.05, scale: float | None = None, eps: float = 1e-5) -> None:
        """Register weight `(C,)`."""
        super().__init__()
        positive(eps, "eps", "an input of zeros would be divided by zero")
        self.num_features, self.init, self.scale, self.eps = num_features, init, scale, eps
        self.weight = nn.Parameter(torch.full((num_features,), self._start))

    @property
    def _start(self) -> float:
        return float(self.num_features**-0.5 if self.scale is None else self.scale)

    @property
    def traits(self) -> Traits:
        """It takes the branch f(x); each token stands alone."""
        return Traits(scale_invariant=True, channels_last=True, condition="other")

    @in_float
    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor:
        """Move `(N, *, C)` towards a branch of the same shape, or bring it to unit length alone."""
        h = F.normalize(x, dim=-1, eps=self.eps)
        if branch is None:
            return h
        step = (self.weight * (self.init / self._start)).abs()
        return F.normalize(h + step * (F.normalize(branch.to(x.dtype), dim=-1, eps=self.eps) - h), dim=-1, eps=self.eps)
