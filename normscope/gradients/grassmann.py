"""Each unit a direction, a point of the Grassmann manifold G(1, n): SGD and Adam of the Riemannian approach to BN."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normscope.gradients.optimizer import BaseOptimizer, Group, Params, dot, length, rate, shares

# where the authors' code divides by a length it adds this, in the exponential map as well
SMALL = 1e-8


class _Grassmann(BaseOptimizer):
    """What both steps share: unit vectors, their tangent gradients, and plain steps for the rest."""

    def tangent(self, group: Group, p: Tensor, grad: Tensor) -> Tensor:
        """Scale the units of a parameter to length 1 and return the gradient on the manifold, clipped by unit."""
        p.div_(length(p) + SMALL)
        if group["orthogonality"]:
            rows = p.flatten(1)
            spread = (rows @ rows.mT @ rows - rows).reshape(p.shape)
            grad = grad.add(spread, alpha=2 * group["orthogonality"])
        gradient = grad - dot(p, grad) * p
        if group["max_norm"] is not None:
            norm = length(gradient)
            gradient *= torch.where(norm > group["max_norm"], group["max_norm"] / norm, 1.0)
        return gradient


class GrassmannSGD(_Grassmann):
    """SGD with momentum along geodesics of unit vectors.

    h = g - (y . g) y,  m <- momentum m - lr h,  y+ = y cos|m| + m/|m| sin|m|,  m+ = m cos|m| - |m| y sin|m|

    for each unit y, which is scaled to length 1 before each step, the first included, so that the step changes the
    weights though not what a network with normalization computes. There is no weight decay on units. Tensors of one
    dimension, and groups with `invariant=False`, take plain SGD steps.

    Source: S114.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        max_norm: float | None = 0.1,
        orthogonality: float = 0.0,
        invariant: bool = True,
    ) -> None:
        """Set up.

        Args:
            params: parameters or groups.
            lr: learning rate: an angle for each unit of tangent gradient.
            momentum: weight of the earlier steps.
            weight_decay: L2 term of the parameters that are no units.
            max_norm: longest tangent gradient of a unit, None for any.
            orthogonality: weight a of the penalty a/2 |Y Y^T - I|^2 on the units Y of a layer.
            invariant: the group's units are scale invariant, as those before a normalization are.
        """
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        more: dict[str, Any] = {"max_norm": max_norm, "orthogonality": orthogonality, "invariant": invariant}
        super().__init__(params, defaults | more)

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        units, *rest = shares(params, grads, group["invariant"])
        self.sgd(group, *rest)
        for p, grad in units:
            gradient = self.tangent(group, p, grad)
            (buffer,) = self.kept([p], "momentum_buffer")
            buffer.mul_(group["momentum"]).sub_(gradient, alpha=rate(group))
            norm = length(buffer)
            unit = buffer / (norm + SMALL)
            cosine, sine = norm.cos(), norm.sin()
            buffer.copy_(norm * (unit * cosine - p * sine))
            p.copy_(p * cosine + unit * sine)


class GrassmannAdam(_Grassmann):
    """Adam along geodesics of unit vectors, with one second moment for each.

    m <- beta_1 m + (1 - beta_1) h,  v <- beta_2 v + (1 - beta_2) |h|^2,  d = -lr m^ / sqrt(v^)

    with h as in `GrassmannSGD`; y moves along d, and m is carried with it. Tensors of one dimension, and groups with
    `invariant=False`, take plain Adam steps.

    Source: S114.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_norm: float | None = 0.1,
        orthogonality: float = 0.0,
        invariant: bool = True,
    ) -> None:
        """Set up.

        Args:
            params: parameters or groups.
            lr: learning rate, about the angle of a step.
            betas: weights of the old averages.
            eps: added to the second moment.
            weight_decay: L2 term of the parameters that are no units.
            max_norm: longest tangent gradient of a unit, None for any.
            orthogonality: weight a of the penalty a/2 |Y Y^T - I|^2 on the units Y of a layer.
            invariant: the group's units are scale invariant, as those before a normalization are.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        more: dict[str, Any] = {"max_norm": max_norm, "orthogonality": orthogonality, "invariant": invariant}
        super().__init__(params, defaults | more)

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        units, *rest = shares(params, grads, group["invariant"])
        self.adam(group, *rest)
        beta, square = group["betas"]
        for p, grad in units:
            gradient = self.tangent(group, p, grad)
            (count,), (first,) = self.counted([p]), self.kept([p], "exp_avg")
            (second,) = self.kept([p], "exp_avg_sq", [length(p)])
            first.lerp_(gradient, 1 - beta)
            second.mul_(square).add_(dot(gradient, gradient), alpha=1 - square)
            scale = rate(group) * math.sqrt(1 - square**count) / (1 - beta**count)
            step = -scale * first / (second + group["eps"]).sqrt()
            norm = length(step)
            unit = step / (norm + SMALL)
            cosine, sine = norm.cos(), norm.sin()
            along = dot(unit, first)
            first.copy_(first - along * ((1 - cosine) * unit + sine * p))
            p.copy_(p * cosine + unit * sine)
