"""Without the radial part of a step: AdamP and SGDP, which decide by themselves which weights are scale invariant."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normscope.gradients.optimizer import BaseOptimizer, Group, Params, corrections, denominators, dot, length, rate


def project(p: Tensor, grad: Tensor, step: Tensor, delta: float, eps: float) -> Tensor | None:
    """Remove from a step what lies along the weights, if the gradient shows that their scale does not matter.

    With w a unit (else the whole tensor) and d its size, the weights count as scale invariant if |cos(g, w)| <
    delta / sqrt(d) for each; then step <- step - w^ (w^ . step) with w^ = w / (|w| + eps).

    Args:
        p: weights, two dimensions at least.
        grad: gradient.
        step: the step.
        delta: how far from orthogonal a gradient may be.
        eps: smallest norm.

    Returns:
        The projected step; None if the weights are not scale invariant.

    Source: S120.
    """
    inner, weight, gradient = dot(grad, p), length(p), length(grad)
    if _orthogonal(inner, weight, gradient, delta / math.sqrt(p[0].numel()), eps):
        unit = p / (weight + eps)
        return step - unit * dot(unit, step)
    weight = torch.linalg.vector_norm(weight)
    if _orthogonal(inner.sum(), weight, torch.linalg.vector_norm(gradient), delta / math.sqrt(p.numel()), eps):
        unit = p / (weight + eps)
        projected: Tensor = step - unit * (unit * step).sum()
        return projected
    return None


def _orthogonal(inner: Tensor, weight: Tensor, gradient: Tensor, bound: float, eps: float) -> bool:
    cosine = inner.abs() / (weight.clamp_min(eps) * gradient.clamp_min(eps))
    return bool(cosine.max() < bound)


class _Projected(BaseOptimizer):
    """Steps of which the radial part is removed, and less decay where it is."""

    def move(
        self, group: Group, params: list[Tensor], grads: list[Tensor], steps: list[Tensor], scales: list[float]
    ) -> list[Tensor]:
        """Project the steps, decay the parameters, take the steps times `scales` away; return the projected steps."""
        factors = []
        for place, (p, grad) in enumerate(zip(params, grads, strict=True)):
            projected = project(p, grad, steps[place], group["delta"], group["eps"]) if p.ndim > 1 else None
            factors.append(1.0 if projected is None else group["decay_ratio"])
            steps[place] = steps[place] if projected is None else projected
        decay = rate(group) * group["weight_decay"] / (1 - group.get("momentum", 0.0))
        if decay:
            torch._foreach_mul_(params, [1 - decay * factor for factor in factors])
        torch._foreach_sub_(params, torch._foreach_mul(steps, scales))
        return steps


class AdamP(_Projected):
    """Adam whose step has no radial part on scale-invariant weights, with decoupled decay.

    u = m^ / (sqrt(v^) + eps), projected by `project`;  w <- (1 - lr d) w - lr u

    On projected weights the decay d is multiplied by decay_ratio. The averages are stored as they are.

    Source: S120.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        delta: float = 0.1,
        decay_ratio: float = 0.1,
        nesterov: bool = False,
    ) -> None:
        """Set up.

        Args:
            params: parameters or groups.
            lr: learning rate.
            betas: weights of the old averages.
            eps: added to denominators.
            weight_decay: decoupled weight decay.
            delta: how far from orthogonal a gradient may be.
            decay_ratio: share of the decay that projected weights get.
            nesterov: look ahead.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"delta": delta, "decay_ratio": decay_ratio, "nesterov": nesterov})

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        counts, betas = self.counted(params), group["betas"]
        first, second = self.moments(params, grads, betas)
        if group["nesterov"]:
            first = list(torch._foreach_lerp(first, grads, 1 - betas[0]))
        steps = list(torch._foreach_div(first, denominators(second, counts, betas[1], group["eps"])))
        self.move(group, params, grads, steps, [rate(group) * scale for scale in corrections(counts, betas)])


class SGDP(_Projected):
    """SGD with momentum whose step has no radial part on scale-invariant weights, with decoupled decay.

    b <- momentum b + g, projected by `project`; w <- (1 - lr d / (1 - momentum)) w - lr b

    On projected weights the decay d is multiplied by decay_ratio. The paper stores the momentum before the projection;
    the authors' code, without Nesterov, after it: `store_projected=True` does so.

    Source: S120.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        delta: float = 0.1,
        decay_ratio: float = 0.1,
        eps: float = 1e-8,
        store_projected: bool = False,
    ) -> None:
        """Set up.

        Args:
            params: parameters or groups.
            lr: learning rate.
            momentum: weight of the earlier steps.
            weight_decay: decoupled weight decay.
            nesterov: look ahead.
            delta: how far from orthogonal a gradient may be.
            decay_ratio: share of the decay that projected weights get.
            eps: added to denominators.
            store_projected: keep the projected step as momentum.
        """
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "eps": eps}
        more = {"delta": delta, "decay_ratio": decay_ratio, "store_projected": store_projected}
        super().__init__(params, defaults | more)

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        momentum = group["momentum"]
        buffers = self.accumulated(params, grads, momentum)
        steps = list(torch._foreach_add(grads, buffers, alpha=momentum)) if group["nesterov"] else list(buffers)
        projected = self.move(group, params, grads, steps, [rate(group)] * len(params))
        if group["store_projected"] and momentum and not group["nesterov"]:
            torch._foreach_copy_(buffers, projected)
