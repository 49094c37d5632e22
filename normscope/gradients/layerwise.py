"""Steps relative to each layer's weights: LARS, LAMB, LANS, CLARS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from normscope.core.errors import ArgumentError
from normscope.gradients.optimizer import BaseOptimizer, Group, Params, corrections, decayed, denominators, rate


class LARS(BaseOptimizer):
    """Layer-wise adaptive rate scaling: every tensor moves by a fixed share of its norm.

    b <- momentum b + lr r (g + d w),  w <- w - b,  r = trust_coefficient |w| / (|g| + d |w| + eps)

    with weight decay d. The learning rate is inside the momentum, as in the paper: it matters when it changes. r is 1
    where w or g is zero, so that weights that start at zero move at all. A group with `trust_coefficient=None` takes
    plain SGD steps: common for biases and the parameters of normalization, to which the paper applies r as well.

    Source: S106, algorithm 1.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trust_coefficient: float | None = 0.001,
        *,
        eps: float = 0.0,
    ) -> None:
        """Set up.

        Args:
            params: parameters or groups.
            lr: learning rate.
            momentum: weight of the earlier steps.
            weight_decay: coefficient of the L2 term.
            trust_coefficient: share of the weights' norm; None for plain SGD.
            eps: added to the denominator.
        """
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"trust_coefficient": trust_coefficient, "eps": eps})

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        plain = group["trust_coefficient"] is None
        rates = [params[0].new_tensor(rate(group))] * len(params) if plain else self.rates(group, params, grads)
        steps = decayed(group, params, grads)
        if steps is grads:
            steps = list(torch._foreach_mul(grads, rates))
        else:
            torch._foreach_mul_(steps, rates)
        torch._foreach_sub_(params, self.accumulated(params, steps, group["momentum"], fresh=True))

    def rates(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Return the learning rate of each tensor."""
        weight, gradient = torch.stack(torch._foreach_norm(params)), self.gradient_norms(params, grads)
        share = group["trust_coefficient"] * weight / (gradient + group["weight_decay"] * weight + group["eps"])
        return list((rate(group) * torch.where((weight > 0) & (gradient > 0), share, 1.0)).unbind())

    def gradient_norms(self, params: list[Tensor], grads: list[Tensor]) -> Tensor:
        """Return the norm of each tensor's gradient."""
        return torch.stack(torch._foreach_norm(grads))


class CLARS(LARS):
    """Complete layer-wise adaptive rate scaling: the norms of the samples' gradients, averaged, instead of the batch's.

    r = trust_coefficient |w| / (mean_i |g_i| + d |w| + eps)

    and otherwise LARS. While samples disagree the batch gradient is short but each sample's is not, so that early steps
    stay small and need no warmup. Needs `grad_sample` of every parameter, `(samples, *shape)`, beside `grad`:
    `sample_gradients` sets both. Without it a step is an ArgumentError.

    Source: S109.
    """

    def gradient_norms(self, params: list[Tensor], grads: list[Tensor]) -> Tensor:
        """Return the mean norm of the samples' gradients of each tensor."""
        return torch.stack([_sample_norm(p) for p in params])


def _sample_norm(p: Tensor) -> Tensor:
    samples = getattr(p, "grad_sample", None)
    if samples is None or samples.shape[1:] != p.shape:
        found = "none" if samples is None else f"one of shape {tuple(samples.shape)}"
        raise ArgumentError(
            f"grad_sample of a parameter of shape {tuple(p.shape)} must be (samples, *shape), found {found}: call "
            "normscope.gradients.sample_gradients(model, loss, inputs, targets) before the step, instead of backward."
        )
    mean: Tensor = torch.linalg.vector_norm(samples.flatten(1), dim=1).mean()
    return mean


def sample_gradients(model: nn.Module, loss: Callable[[Any, Any], Tensor], inputs: Tensor, targets: Tensor) -> None:
    """Set `grad` and `grad_sample` of every parameter: the gradient of the mean loss, and that of each sample.

    Args:
        model: the model; one whose normalization crosses the batch has no gradients of single samples.
        loss: `loss(output, target)` of a batch of one, a scalar.
        inputs: `(samples, ...)`.
        targets: `(samples, ...)`.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = {name: p.detach() for name, p in params.items()}

    def single(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, values, (x[None],)), y[None])

    gradients = vmap(grad(single), in_dims=(None, 0, 0), randomness="different")(values, inputs, targets)
    for name, p in params.items():
        p.grad_sample = gradients[name].detach()  # type: ignore[attr-defined]
        p.grad = p.grad_sample.mean(0)  # type: ignore[attr-defined]


class LAMB(BaseOptimizer):
    """Adam's direction with decay, scaled to each tensor's norm.

    u = m^ / (sqrt(v^) + eps) + d w,  w <- w - lr |w| / |u| u

    with bias-corrected averages m^ and v^ of the gradient and its square, and weight decay d. The ratio of norms is 1
    where either is zero; it is not clamped.

    Source: S107, algorithm 2.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        """Set up.

        Args:
            params: parameters or groups.
            lr: learning rate: the share of its norm by which a tensor moves.
            betas: weights of the old averages.
            eps: added to the denominator.
            weight_decay: decay inside the ratio.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        counts, betas = self.counted(params), group["betas"]
        first, second = self.moments(params, grads, betas)
        steps = list(torch._foreach_div(first, denominators(second, counts, betas[1], group["eps"])))
        torch._foreach_mul_(steps, corrections(counts, betas))
        weights = torch._foreach_norm(params)
        torch._foreach_sub_(params, directions(params, steps, group["weight_decay"], weights, rate(group)))


class LANS(LAMB):
    """LAMB on gradients normalized by tensor, with a share of the current gradient in each step.

    g~ = g / (|g| + eps),  r = m^ / (sqrt(v^) + eps) + d w,  c = g~ / (sqrt(v^) + eps) + d w
    w <- w - lr |w| (beta_1 r / |r| + (1 - beta_1) c / |c|)

    with averages m^ and v^ of g~. A ratio of norms is 1 where either is zero.

    Source: S108, algorithm 2.
    """

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update parameters of one group."""
        counts, betas, decay = self.counted(params), group["betas"], group["weight_decay"]
        norms = list(torch._foreach_norm(grads))
        torch._foreach_add_(norms, group["eps"])
        units = list(torch._foreach_div(grads, norms))
        first, second = self.moments(params, units, betas)
        roots = denominators(second, counts, betas[1], group["eps"])
        averaged = list(torch._foreach_div(first, roots))
        torch._foreach_mul_(averaged, corrections(counts, betas))
        torch._foreach_div_(units, roots)
        torch._foreach_mul_(units, [math.sqrt(1 - betas[1] ** t) for t in counts])
        weights = torch._foreach_norm(params)
        moves = [
            directions(params, steps, decay, weights, share * rate(group))
            for steps, share in ((averaged, betas[0]), (units, 1 - betas[0]))
        ]
        for steps in moves:
            torch._foreach_sub_(params, steps)


def directions(
    params: list[Tensor], steps: list[Tensor], decay: float, weights: Sequence[Tensor], scale: float
) -> list[Tensor]:
    """Return scale |w| / |u| u for u = step + decay w; the steps are written over."""
    if decay:
        torch._foreach_add_(steps, params, alpha=decay)
    weight, step = torch.stack(list(weights)), torch.stack(torch._foreach_norm(steps))
    ratios = scale * torch.where((weight > 0) & (step > 0), weight / step, 1.0)
    torch._foreach_mul_(steps, list(ratios.unbind()))
    return steps
