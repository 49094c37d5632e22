"""EvoNorm: layers found by evolution that normalize and activate at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope.norms.affine import row_sums, scale_shift
from normscope.norms.average import LOCAL, by_hand
from normscope.norms.families.mixtures_base import ChannelNorm, enough, instances, kept, unbiased
from normscope.norms.layer import in_float
from normscope.norms.operation import safe_sqrt
from normscope.norms.part import Traits, divide, require
from normscope.norms.population import keep, track, valid_momentum

KINDS: Final = ("b0", "b1", "b2", "s0", "s1", "s2")


class EvoNorm(ChannelNorm):
    """EvoNorm: normalization and activation in one, with batch statistics (B) or those of groups (S).

    B0: x / max(sqrt(var_batch + eps), v x + sqrt(var_instance + eps)); B1: the second is (x + 1) rms_instance; B2: it
    is rms_instance - x. S0: x sigmoid(v x) / sqrt(var_group + eps); S1: silu(x) for x sigmoid(v x); S2: rms_group for
    the deviation. Then scale and shift for each channel.

    Args:
        num_features: number of channels.
        kind: "b0", "b1", "b2", "s0", "s1" or "s2".
        groups: number of groups of channels, for S.
        eps: added to variances and mean squares.
        momentum: weight of the newest batch, for B.
        affine: weight and bias for each channel.
        activate: False leaves only scale and shift, as published code does where no activation follows.
        unbiased: variances divide by n - 1.
    """

    v: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        kind: str = "b0",
        groups: int = 8,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        activate: bool = True,
        unbiased: bool = False,
    ) -> None:
        """Register weight, bias, v where used, and for B the stored variance."""
        super().__init__(num_features, eps, affine)
        require(kind, "kind", KINDS)
        valid_momentum(momentum)
        divide(num_features, groups)
        self.kind, self.groups, self.momentum = kind, groups, momentum
        self.activate, self.unbiased = activate, unbiased
        learned = activate and kind in {"b0", "s0"}
        self.register_parameter("v", nn.Parameter(torch.ones(num_features)) if learned else None)
        if kind[0] == "b" and activate:
            keep(self, var=torch.ones(num_features))

    @property
    def traits(self) -> Traits:
        """B0 and B2 do not see the scale of their input."""
        batch = self.kind[0] == "b" and self.activate
        return Traits(crosses_batch=batch, stateful=batch, scale_invariant=batch and self.kind != "b1")

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize and activate `(N, C, *)`."""
        z = instances(x, self.num_features)
        if not self.activate:
            return self.recover(x, x)
        y = self._batch_kind(z, x) if self.kind[0] == "b" else self._sample_kind(z, x)
        return self.recover(y.reshape(x.shape), x)

    def _batch_kind(self, z: Tensor, x: Tensor) -> Tensor:
        low = (self._batch_variance(x, z) + self.eps).sqrt().expand(len(z), -1)
        if self.v is not None:
            enough(z.shape[2], x, 2 if self.unbiased else 1)
            offset = (self._variance(z) + self.eps).sqrt()
            return _ratio(z, low, self.v.expand_as(low), offset)
        rms = (LOCAL.square(z) + self.eps).sqrt()
        return _ratio(z, low, rms if self.kind == "b1" else -torch.ones_like(rms), rms)

    def _variance(self, z: Tensor) -> Tensor:
        _, var = LOCAL.moments(z)
        return unbiased(var, z.shape[2]) if self.unbiased else var

    def _batch_variance(self, x: Tensor, z: Tensor) -> Tensor:
        if not self.training:
            return kept(self.running_var, z)
        b, _, var = self.moments(x)
        larger = self.bessel(var, b)
        track(self, self.momentum, var=larger)
        return larger if self.unbiased else var

    def _sample_kind(self, z: Tensor, x: Tensor) -> Tensor:
        g = z.reshape(z.shape[0], self.groups, -1)
        if self.kind == "s2":
            scale = (LOCAL.square(g) + self.eps).sqrt()
        else:
            enough(g.shape[2], x)
            scale = safe_sqrt(self._variance(g) + self.eps)
        active = F.silu(z) if self.v is None else z * torch.sigmoid(self.v.unsqueeze(1) * z)
        return scale_shift(active.reshape(g.shape), scale.reciprocal(), None)


def _divided(x: Tensor, low: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Return x / max(low, slope x + offset) by operations that autograd differentiates any number of times."""
    low, slope, offset = (v.unsqueeze(-1) for v in (low, slope, offset))
    return x / torch.maximum(low, torch.addcmul(offset, x, slope))


def _ratio(x: Tensor, low: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Return x / max(low, slope x + offset) for x `[N, C, L]` and values `[N, C]`."""
    return (_by_hand if by_hand(x) else _divided)(x, low, slope, offset)


class _Ratio(torch.autograd.Function):
    """The same with a gradient that takes its sums over rows in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
        divisor = torch.addcmul(offset.unsqueeze(-1), x, slope.unsqueeze(-1))
        torch.maximum(divisor, low.unsqueeze(-1), out=divisor)
        y = x / divisor
        ctx.save_for_backward(x, low, slope, offset)
        ctx.divisor, ctx.ratio = divisor, y.detach()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, slope, offset = ctx.saved_tensors
        if torch.is_grad_enabled():
            given = [v for v in (x, low, slope, offset) if v.requires_grad]
            y = _divided(x, low, slope, offset)
            found = iter(torch.autograd.grad(y, given, grad, create_graph=True))
            return tuple(next(found) if v.requires_grad else None for v in (x, low, slope, offset))
        grad_x = grad / ctx.divisor
        # the gradient of the divisor, then of its part that depends on x
        change = (grad_x * ctx.ratio).neg_()
        whole = change.sum(-1)
        change.mul_(ctx.divisor > low.unsqueeze(-1))
        products, sums = row_sums(change, x)
        return grad_x.addcmul_(change, slope.unsqueeze(-1)), whole - sums, products, sums


_by_hand: Callable[..., Tensor] = _Ratio.apply
