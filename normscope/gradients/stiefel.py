"""Rows orthonormal, a point of the Stiefel manifold: SGD and Adam that move by an iterated Cayley transform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.gradients.optimizer import BaseOptimizer, Group, Params, length, rate

SMALL = 1e-8


def orthonormal(rows: Tensor) -> Tensor:
    """Return orthonormal rows close to the given ones, by QR with positive diagonal; `(p, n)` with p at most n."""
    q, r = torch.linalg.qr(rows.mT)
    found: Tensor = (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).mT
    return found


class _Cayley(BaseOptimizer):
    """What both steps share: the rows, the skew matrix of a direction, and plain steps for the rest."""

    def split(
        self, group: Group, params: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor], list[Tensor]]:
        """Divide parameters into those that have at most as many rows as columns, and the rest with its gradients."""
        fits = [group["constrained"] and p.ndim > 1 and len(p) <= p[0].numel() for p in params]
        if any(fits) and params[0].dtype not in (torch.float32, torch.float64):
            raise ArgumentError(
                f"params of dtype={str(params[0].dtype).removeprefix('torch.')} cannot be kept orthonormal: QR and so "
                f"fine a constraint need float32 or float64; keep parameters in float32 (and compute under "
                f"torch.autocast), or put these in a group with constrained=False."
            )
        pairs = list(zip(params, grads, strict=True))
        rest = [pair for pair, fit in zip(pairs, fits, strict=True) if not fit]
        return [pair for pair, fit in zip(pairs, fits, strict=True) if fit], [p for p, _ in rest], [g for _, g in rest]

    def rows(self, group: Group, p: Tensor, count: int) -> Tensor:
        """Return the rows `(p, n)` as the step begins: orthonormal every so many steps, else of length 1."""
        rows = p.flatten(1)
        period = group["retraction"]
        if period is not None and (count - 1) % period == 0:
            return orthonormal(rows)
        return rows / (length(rows) + SMALL)

    def cayley(self, group: Group, x: Tensor, factor: Tensor, start: Tensor, sign: float) -> Tensor:
        """Return the point that the Cayley transform moves to, by fixed-point iteration.

        Y <- X^T + a/2 W (X^T + Y),  W = F X - (F X)^T,  |a| = min(lr, 1 / |W|_1)

        Args:
            group: the group.
            x: rows X, `(p, n)`.
            factor: F, `(n, p)`; products with W need no matrix of n by n.
            start: direction of the first iterate, `(n, p)`.
            sign: sign of a.

        Returns:
            Y, `(n, p)`.
        """
        half = factor @ x
        size = torch.linalg.matrix_norm(half - half.mT, 1)
        step = sign * torch.clamp(1 / (size + SMALL), max=rate(group))
        y = x.mT + step * start
        for _ in range(group["iterations"]):
            y = x.mT + step / 2 * skew(factor, x, x.mT + y)
        return y


def factor(x: Tensor, direction: Tensor) -> Tensor:
    """Return F = V - X^T (X V) / 2 of a direction V `(n, p)` at rows X `(p, n)`; F X - (F X)^T is the skew matrix."""
    return direction - x.mT @ (x @ direction) / 2


def skew(half: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return (F X - (F X)^T) Y for F `(n, p)`, X `(p, n)` and Y `(n, p)`."""
    return half @ (x @ y) - x.mT @ (half.mT @ y)


class CayleySGD(_Cayley):
    """SGD with momentum on orthonormal rows X, by the Cayley transform.

    V <- momentum V - G^T,  F = V - X^T X V / 2,  W = F X - (F X)^T,  Y = X^T + a/2 W (X^T + Y),  V <- W X^T

    with a = min(lr, 1 / |W|_1) and Y by fixed-point iteration, which keeps the rows orthonormal up to its residual, of
    order (a |W| / 2)^iterations. Rows are made orthonormal (by QR) at the first step and every `retraction` steps,
    where the authors' code does so at random, and of length 1 at each. Without momentum the numbers are those of the
    authors' code, which loses its momentum between steps. There is no weight decay on rows. Tensors of one dimension or
    with more rows than columns, and groups with `constrained=False`, take plain SGD steps.

    Source: S104, algorithm 1.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        iterations: int = 5,
        retraction: int | None = 100,
        constrained: bool = True,
    ) -> None:
        """Set up.

        Args:
            params: parameters or groups.
            lr: largest step size.
            momentum: weight of the earlier steps.
            weight_decay: L2 term of the parameters that are not constrained.
            iterations: number of fixed-point iterations.
            retraction: rows are made orthonormal every so many steps; None for never.
            constrained: whether the group's rows are to be orthonormal.
        """
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        more = {"iterations": iterations, "retraction": retraction, "constrained": constrained}
        super().__init__(params, defaults | more)

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        held, *rest = self.split(group, params, grads)
        self.sgd(group, *rest)
        for p, grad in held:
            (count,), (buffer,) = self.counted([p]), self.kept([p], "momentum_buffer", [p.flatten(1).mT])
            x = self.rows(group, p, count)
            direction = group["momentum"] * buffer - grad.flatten(1).mT
            half = factor(x, direction)
            p.copy_(self.cayley(group, x, half, direction, 1.0).mT.reshape(p.shape))
            buffer.copy_(skew(half, x, x.mT))


class CayleyAdam(_Cayley):
    """Adam on orthonormal rows X, by the Cayley transform, with one second moment for each tensor.

    M <- beta_1 M + (1 - beta_1) G^T,  v <- beta_2 v + (1 - beta_2) |G|^2,  r = sqrt(v^ + eps)
    F = (M^ - X^T X M^ / 2) / r,  W = F X - (F X)^T,  Y = X^T - a/2 W (X^T + Y),  M <- r (1 - beta_1^t) W X^T

    and otherwise as `CayleySGD`; the rest takes plain Adam steps.

    Source: S104, algorithm 2.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        iterations: int = 5,
        retraction: int | None = 100,
        constrained: bool = True,
    ) -> None:
        """Set up.

        Args:
            params: parameters or groups.
            lr: largest step size.
            betas: weights of the old averages.
            eps: added to the second moment.
            weight_decay: L2 term of the parameters that are not constrained.
            iterations: number of fixed-point iterations.
            retraction: rows are made orthonormal every so many steps; None for never.
            constrained: whether the group's rows are to be orthonormal.
        """
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        more = {"iterations": iterations, "retraction": retraction, "constrained": constrained}
        super().__init__(params, defaults | more)

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        held, *rest = self.split(group, params, grads)
        self.adam(group, *rest)
        beta, square = group["betas"]
        for p, grad in held:
            (count,), (first,) = self.counted([p]), self.kept([p], "exp_avg", [p.flatten(1).mT])
            (second,) = self.kept([p], "exp_avg_sq", [p.new_zeros(())])
            x = self.rows(group, p, count)
            first.lerp_(grad.flatten(1).mT, 1 - beta)
            second.mul_(square).add_(grad.square().sum(), alpha=1 - square)
            root = (second / (1 - square**count) + group["eps"]).sqrt()
            half = factor(x, first) / ((1 - beta**count) * root)
            p.copy_(self.cayley(group, x, half, first, -1.0).mT.reshape(p.shape))
            first.copy_(skew(half, x, x.mT) * (root * (1 - beta**count)))
