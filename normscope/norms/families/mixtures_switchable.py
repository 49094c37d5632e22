"""Switchable normalization and its sparse variant: learned mixtures of instance, layer and batch statistics."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.area import Batch
from normscope.norms.average import LOCAL
from normscope.norms.families.mixtures_base import ChannelNorm, enough, instances, kept, unbiased
from normscope.norms.layer import in_float
from normscope.norms.part import Traits, require
from normscope.norms.population import keep, track, valid_momentum

KINDS: Final = ("instance", "layer", "batch")


class SwitchableNorm(ChannelNorm):
    """Switchable normalization: means and variances are mixed by two learned softmax weightings.

    y = weight (x - sum_k p_k mean_k) / sqrt(sum_k q_k var_k + eps) + bias, p and q softmax. The instance variance is
    unbiased; the others follow from it as E[var + mean^2] - mean^2. Without "instance" they are taken directly.

    Args:
        num_features: number of channels.
        kinds: statistics that are mixed, at least two of "instance", "layer" and "batch", in this order.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    mean_weight: nn.Parameter
    var_weight: nn.Parameter

    def __init__(
        self,
        num_features: int,
        kinds: tuple[str, ...] = KINDS,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight, bias, the weightings and, with "batch", the stored statistics.

        Raises:
            ArgumentError: fewer than two kinds, or in another order.
        """
        super().__init__(num_features, eps, affine)
        for kind in kinds:
            require(kind, "kinds", KINDS)
        if len(kinds) < 2 or tuple(kinds) != tuple(k for k in KINDS if k in kinds):
            raise ArgumentError(f"kinds={kinds!r} must be at least two of {KINDS}, in this order.")
        valid_momentum(momentum)
        self.kinds, self.momentum = tuple(kinds), momentum
        self.mean_weight = nn.Parameter(torch.ones(len(kinds)))
        self.var_weight = nn.Parameter(torch.ones(len(kinds)))
        if "batch" in kinds:
            keep(self, mean=torch.zeros(num_features), var=torch.zeros(num_features))

    @property
    def traits(self) -> Traits:
        """Those of batch normalization, if batch statistics are mixed in."""
        batch = "batch" in self.kinds
        return Traits(crosses_batch=batch, stateful=batch, shift_invariant=True, scale_invariant=True)

    def mixture(self) -> tuple[Tensor, Tensor]:
        """Return the weights of the means and of the variances."""
        return self.mean_weight.softmax(0), self.var_weight.softmax(0)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        z = instances(x, self.num_features)
        mean_part, var_part = self.mixture()
        found = self._derived(z, x) if "instance" in self.kinds else self._direct(z, x)
        mean = sum(p * found[kind][0] for p, kind in zip(mean_part, self.kinds, strict=True))
        var = sum(p * found[kind][1] for p, kind in zip(var_part, self.kinds, strict=True))
        return self.normalized(x, torch.as_tensor(mean), torch.as_tensor(var))

    def _derived(self, z: Tensor, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return mean and variance by kind, all from those of the instances."""
        enough(z.shape[2], x)
        mean, biased = LOCAL.moments(z)
        var = unbiased(biased, z.shape[2])
        square = var + mean.square()
        found = {"instance": (mean, var)}
        if "layer" in self.kinds:
            whole = mean.mean(1, keepdim=True)
            found["layer"] = whole, square.mean(1, keepdim=True) - whole.square()
        if "batch" in self.kinds and self.training:
            whole = self.average.mean(mean.mT.unsqueeze(0))
            found["batch"] = whole, self.average.mean(square.mT.unsqueeze(0)) - whole.square()
            self._store(*found["batch"])
        return found | self._stored(z)

    def _direct(self, z: Tensor, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return mean and unbiased variance of layer and batch."""
        enough(x[0].numel() if len(x) else 2, x)
        mean, biased = LOCAL.moments(z.unsqueeze(1))
        found = {"layer": (mean, unbiased(biased, z[0].numel()))}
        if self.training:
            b = Batch().split(x)
            enough(b.shape[2:].numel(), x)
            whole, biased = self.average.moments(b)
            found["batch"] = whole, self.bessel(biased, b)
            self._store(*found["batch"])
        return found | self._stored(z)

    def _store(self, mean: Tensor, var: Tensor) -> None:
        track(self, self.momentum, mean=mean, var=var)

    def _stored(self, z: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        if self.training or "batch" not in self.kinds:
            return {}
        return {"batch": (kept(self.running_mean, z), kept(self.running_var, z))}


def sparsemax(z: Tensor) -> Tensor:
    """Project a vector onto the probability simplex."""
    ordered, _ = z.sort(descending=True)
    index = torch.arange(1, len(z) + 1, dtype=z.dtype, device=z.device)
    size = int((1 + index * ordered > ordered.cumsum(0)).sum())
    p: Tensor = (z - (ordered[:size].sum() - 1) / size).relu()
    return p


def sparsestmax(z: Tensor, radius: float) -> Tensor:
    """Project onto the simplex outside a circle: the projection moves away from the uniform weights of its support.

    p = sparsemax(z), u uniform on the support of p; if |p - u| < r, p <- u + r (p - u) / |p - u|; where that leaves the
    simplex, again on the smaller support u', with r' = sqrt(r^2 - |u' - u|^2).

    Args:
        z: the vector.
        radius: r, from 0 (sparsemax) to the radius of the circle around the simplex (one-hot).

    Returns:
        Weights of at least 0 that add up to 1.

    >>> sparsestmax(torch.tensor([0.5, 0.4, -3.0]), 0.0)
    tensor([0.5500, 0.4500, 0.0000])
    """
    p, limit = sparsemax(z), radius
    before: Tensor | None = None
    while float(p.detach().max() - p.detach().min()) < 1:
        support = (p.detach() > 0).to(p)
        center = support / support.sum()
        if before is not None:
            limit = max(limit**2 - float((center - before).square().sum()), 0.0) ** 0.5
        distance = torch.linalg.vector_norm(p - center)
        if not 0 < float(distance.detach()) < limit:
            return p
        moved: Tensor = center + limit * (p - center) / distance
        p = moved
        if float(p.detach().min()) >= 0:
            return p
        p, before = sparsemax(p), center
    return p


class SparseSwitchableNorm(SwitchableNorm):
    """Sparse switchable normalization: the weightings are projected outside a circle that grows until one kind is left.

    Set `radius` to the progress of training, from 0 to 1; a weighting that has become one-hot stays as it is.

    Args:
        num_features: number of channels.
        radius: of the circle; see `sparsestmax`.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    mean_fixed: Tensor
    var_fixed: Tensor
    mean_mix: Tensor
    var_mix: Tensor
    circle: Tensor

    def __init__(
        self,
        num_features: int,
        radius: float = 0.0,
        eps: float = 1e-5,
        momentum: float | None = 0.003,
        affine: bool = True,
    ) -> None:
        """Register what switchable normalization has, the radius, and the weightings in use."""
        super().__init__(num_features, KINDS, eps, momentum, affine)
        self.register_buffer("circle", torch.tensor([float(radius)], dtype=torch.float64))
        for name in ("mean", "var"):
            self.register_buffer(f"{name}_fixed", torch.zeros(1, dtype=torch.long))
            self.register_buffer(f"{name}_mix", torch.ones(len(KINDS)))

    @property
    def radius(self) -> float:
        """The radius of the circle."""
        return float(self.circle)

    @radius.setter
    def radius(self, value: float) -> None:
        self.circle.fill_(value)

    def mixture(self) -> tuple[Tensor, Tensor]:
        """Return the weights of the means and of the variances; training stores them."""
        return self._weights("mean"), self._weights("var")

    def _weights(self, name: str) -> Tensor:
        stored: Tensor = getattr(self, f"{name}_mix")
        fixed: Tensor = getattr(self, f"{name}_fixed")
        parameter: Tensor = getattr(self, f"{name}_weight")
        if bool(fixed):
            return stored.clone() + 0 * parameter
        found = sparsestmax(parameter, self.radius)
        if self.training:
            stored.copy_(found.detach())
            fixed.fill_(int(float(found.detach().max() - found.detach().min()) >= 1))
        return found
