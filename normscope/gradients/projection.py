"""Weights kept on a manifold by plain means: projection-based weight normalization, and fine-grained SGD."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normscope.gradients.optimizer import BaseOptimizer, Group, Params, dot, length, rate, shares
from normscope.gradients.stiefel import orthonormal


def unit_rows(p: Tensor) -> Tensor:
    """Return units of length 1; one that is zero stays."""
    norm = length(p)
    return p / torch.where(norm > 0, norm, 1.0)


class ProjectionSGD(BaseOptimizer):
    """SGD that scales each unit back to length 1 after every step: projection-based weight normalization.

    w <- w - lr b,  w <- w / |w|,  b <- momentum b + g

    With `tangent=True` the gradient first loses its radial part, g - (w^ . g) w^. Units lose their length, which a
    normalization after them, or a scale of its own, makes good. There is no weight decay on units. Tensors of one
    dimension, and groups with `constrained=False`, take plain SGD steps.

    Source: S126.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        tangent: bool = False,
        constrained: bool = True,
    ) -> None:
        """Set up.

        Args:
            params: parameters or groups.
            lr: learning rate.
            momentum: weight of the earlier steps.
            weight_decay: L2 term of the parameters that are no units.
            tangent: use the Riemannian gradient.
            constrained: whether the group's units are to have length 1.
        """
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"tangent": tangent, "constrained": constrained})

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        units, *rest = shares(params, grads, group["constrained"])
        self.sgd(group, *rest)
        for p, grad in units:
            unit = unit_rows(p)
            gradient = grad - dot(unit, grad) * unit if group["tangent"] else grad
            (step,) = self.accumulated([p], [gradient], group["momentum"])
            p.copy_(unit_rows(p.sub(step, alpha=rate(group))))


def _oblique(p: Tensor) -> Tensor:
    return unit_rows(p)


def _sphere(p: Tensor) -> Tensor:
    return unit_rows(p[None])[0]


def _stiefel(p: Tensor) -> Tensor:
    rows = p.flatten(1)
    wide = len(rows) <= rows.shape[1]
    return (orthonormal(rows) if wide else orthonormal(rows.mT).mT).reshape(p.shape)


def _oblique_tangent(p: Tensor, grad: Tensor) -> Tensor:
    return grad - dot(p, grad) * p


def _sphere_tangent(p: Tensor, grad: Tensor) -> Tensor:
    return grad - (p * grad).sum() * p


def _stiefel_tangent(p: Tensor, grad: Tensor) -> Tensor:
    x, g = p.flatten(1), grad.flatten(1)
    if len(x) > x.shape[1]:
        return _stiefel_tangent(x.mT, g.mT).mT.reshape(p.shape)
    inner = g @ x.mT
    return (g - (inner + inner.mT) / 2 @ x).reshape(p.shape)


def _oblique_move(p: Tensor, step: Tensor) -> Tensor:
    norm = length(step)
    return p * norm.cos() + step * torch.sinc(norm / math.pi)


def _sphere_move(p: Tensor, step: Tensor) -> Tensor:
    return _oblique_move(p[None], step[None])[0]


def _stiefel_move(p: Tensor, step: Tensor) -> Tensor:
    return _stiefel(p + step)


# manifold -> projection onto it, projection of a gradient on its tangent space, step along it
MANIFOLDS = {
    "oblique": (_oblique, _oblique_tangent, _oblique_move),
    "sphere": (_sphere, _sphere_tangent, _sphere_move),
    "stiefel": (_stiefel, _stiefel_tangent, _stiefel_move),
}


class FineGrainedSGD(BaseOptimizer):
    """FG-SGD: each tensor on a manifold of its own, with a step that shrinks with the gradient's length R on it.

    b <- momentum b + g,  h = tangent part of b,  R = |h|
    step = -lr h / sqrt(max(1, R^2 max((2 r + R)^2, 1 + c (r + R)))),  w <- Exp_w(step)

    with the radius r and the curvature c of the manifold: for unit spheres and r = 1 the root is
    sqrt(max(1, R^2 (2 + R)^2)). Manifolds, chosen by group: "oblique" (each unit on a sphere, their product), "sphere"
    (the tensor on one sphere) and "stiefel" (rows orthonormal; columns, if there are more rows), where a QR retraction
    stands for the exponential map. Weights are put on the manifold at the first step. Tensors of one dimension, and
    groups with `manifold=None`, take plain SGD steps.

    Source: S096.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        manifold: str | None = "oblique",
        curvature: float = 1.0,
        radius: float = 1.0,
    ) -> None:
        """Set up.

        Args:
            params: parameters or groups.
            lr: learning rate.
            momentum: weight of the earlier gradients.
            weight_decay: L2 term of the parameters on no manifold.
            manifold: "oblique", "sphere", "stiefel" or None.
            curvature: bound c on the sectional curvature.
            radius: bound r on the distance to a minimum along the manifold.
        """
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"manifold": manifold, "curvature": curvature, "radius": radius})

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        units, *rest = shares(params, grads, group["manifold"] is not None)
        self.sgd(group, *rest)
        for p, grad in units:
            onto, tangent, move = MANIFOLDS[group["manifold"]]
            point = onto(p)
            (gradient,) = self.accumulated([p], [grad], group["momentum"])
            direction = tangent(point, gradient)
            p.copy_(move(point, -self.size(group, direction) * direction))

    def size(self, group: Group, direction: Tensor) -> Tensor:
        """Return the step size for a tangent direction of length R."""
        norm, radius = torch.linalg.vector_norm(direction), group["radius"]
        bound = torch.maximum((2 * radius + norm) ** 2, 1 + group["curvature"] * (radius + norm))
        size: Tensor = rate(group) / (norm**2 * bound).clamp_min(1.0).sqrt()
        return size
