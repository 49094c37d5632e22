"""For scale-invariant weights: AdamS, AdamSRT and SGD-MRT on the sphere of directions, SGD on the PSI manifold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normscope.gradients.optimizer import BaseOptimizer, Group, Params, dot, length, rate, shares


def transport(moment: Tensor, old: Tensor, new: Tensor, eps: float = 0.0) -> Tensor:
    """Carry a moment of each unit from one point's tangent space to the next one's, scaled with the weights.

    m <- (m (w . w+) - (m . w+) w) / (|w+|^2 + eps)

    A unit of length 0, before the step or after it, has no tangent space: its moment stays.

    Args:
        moment: the moment m, `(C, ...)`.
        old: weights w before the step.
        new: weights w+ after it.
        eps: added to the denominator.

    Returns:
        The moment at w+; orthogonal to w+ for m orthogonal to w.

    Source: S122.
    """
    moved = (moment * dot(old, new) - dot(moment, new) * old) / (dot(new, new) + eps)
    return torch.where(_directed(old, new), moved, moment)


def _directed(old: Tensor, new: Tensor) -> Tensor:
    """Tell of each unit whether it has a direction both before and after a step."""
    return (dot(old, old) > 0) & (dot(new, new) > 0)


class AdamS(BaseOptimizer):
    """Adam with one second moment for each unit, for scale-invariant weights.

    v <- beta_2 v + (1 - beta_2) |g|^2,  w <- w - lr sqrt(d) m^ / (sqrt(v^) + eps)

    for a unit (a row, the filter of one output channel) of d weights. Weight decay is an L2 term. Tensors of one
    dimension, and groups with `invariant=False`, take plain Adam steps.

    Source: S122.
    """

    transported = False

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        invariant: bool = True,
    ) -> None:
        """Set up.

        Args:
            params: parameters or groups.
            lr: learning rate.
            betas: weights of the old averages.
            eps: added to the denominator.
            weight_decay: coefficient of the L2 term.
            invariant: the group's units are scale invariant, as those before a normalization are.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"invariant": invariant})

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        units, *rest = shares(params, grads, group["invariant"])
        self.adam(group, *rest)
        beta, square = group["betas"]
        for p, grad in units:
            gradient = grad.add(p, alpha=group["weight_decay"])
            (count,), (first,) = self.counted([p]), self.kept([p], "exp_avg")
            (second,) = self.kept([p], "exp_avg_sq", [length(p)])
            first.lerp_(gradient, 1 - beta)
            second.mul_(square).add_(dot(gradient, gradient), alpha=1 - square)
            scale = rate(group) * math.sqrt(p[0].numel()) / (1 - beta**count)
            old = p.clone() if self.transported else p
            p.sub_(first / (second.sqrt() / math.sqrt(1 - square**count) + group["eps"]), alpha=scale)
            if self.transported:
                rescaled = second * dot(old, old) / (dot(p, p) + group["eps"])
                second.copy_(torch.where(_directed(old, p), rescaled, second))
                first.copy_(transport(first, old, p, group["eps"]))


class AdamSRT(AdamS):
    """AdamS whose moments follow the weights: the second is rescaled, the first transported to the new tangent space.

    v <- v |w|^2 / (|w+|^2 + eps), and `transport` of m.

    Source: S122.
    """

    transported = True


class SGDMRT(BaseOptimizer):
    """SGD whose momentum is rescaled and transported to the new tangent space, for scale-invariant weights.

    b <- momentum b + g,  w+ = w - lr b,  then `transport` of b.

    Weight decay is an L2 term. Tensors of one dimension, and groups with `invariant=False`, take plain SGD steps.

    Source: S122.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        invariant: bool = True,
    ) -> None:
        """Set up.

        Args:
            params: parameters or groups.
            lr: learning rate.
            momentum: weight of the earlier steps.
            weight_decay: coefficient of the L2 term.
            invariant: the group's units are scale invariant, as those before a normalization are.
        """
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "invariant": invariant}
        super().__init__(params, defaults)

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        units, _, _ = shares(params, grads, group["invariant"])
        old = [p.clone() for p, _ in units]
        self.sgd(group, params, grads)
        if group["momentum"]:
            for (p, _), before in zip(units, old, strict=True):
                buffer = self.state[p]["momentum_buffer"]
                buffer.copy_(transport(buffer, before, p))


class PSISGD(BaseOptimizer):
    """SGD on the manifold of positively scale-invariant weights: equivalent weights stay equivalent.

    b <- momentum b + |w|^2 g,  w <- (1 - lr d) w - lr b

    for each unit w. |w|^2 g is the gradient in the metric <a, b> / |w|^2, which does not see the scale: from c w every
    iterate is c times what it is from w. The decay d is decoupled, which keeps that. Tensors of one dimension, and
    groups with `invariant=False`, take plain SGD steps.

    Source: S118.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        invariant: bool = True,
    ) -> None:
        """Set up.

        Args:
            params: parameters or groups.
            lr: learning rate.
            momentum: weight of the earlier steps.
            weight_decay: decoupled for units, an L2 term for the rest.
            invariant: the group's units are scale invariant, as those before a normalization are.
        """
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "invariant": invariant}
        super().__init__(params, defaults)

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        units, *rest = shares(params, grads, group["invariant"])
        self.sgd(group, *rest)
        if units:
            held = [p for p, _ in units]
            steps = self.accumulated(held, [dot(p, p) * g for p, g in units], group["momentum"], fresh=True)
            if group["weight_decay"]:
                torch._foreach_mul_(held, 1 - rate(group) * group["weight_decay"])
            torch._foreach_add_(held, steps, alpha=-rate(group))
