"""The gradient of a problem, taken twice: what is random, not finite or unused shows before any product is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.linalg import ranks

if TYPE_CHECKING:
    from normscope.linalg.problem import Evaluated, Problem


@dataclass(frozen=True)
class Gradient:
    """The gradient over all batches and ranks.

    Attributes:
        loss: L.
        parts: gradient by name, of the parameters that the loss uses.
        total: what sums over batches are divided by: samples for a mean, 1 for a sum.
    """

    loss: float
    parts: dict[str, Tensor]
    total: float


@dataclass
class _Sums:
    """Weighted sums over batches; `size` sums the norms of their gradients, `fault` is the first loss not finite."""

    parts: list[Tensor]
    used: Tensor
    loss: Tensor
    size: Tensor
    total: Tensor
    fault: str = ""


def checked_loss(loss: object) -> Tensor:
    """Return the loss as a tensor without axes.

    Args:
        loss: what the user's loss returned.

    Returns:
        The loss.

    Raises:
        ArgumentError: if it is no scalar tensor.
    """
    if not isinstance(loss, Tensor):
        raise ArgumentError(f"loss returned a {type(loss).__name__}; it must return a scalar tensor.")
    if loss.numel() != 1:
        raise ArgumentError(
            f"loss returned a tensor of shape {tuple(loss.shape)}; it must return a scalar: join the samples by "
            ".mean(), or by .sum() with reduction='sum'."
        )
    return loss.reshape(())


def take(problem: Problem, model: nn.Module, params: Mapping[str, nn.Parameter]) -> Gradient:
    """Return the gradient, after two evaluations that must agree.

    Args:
        problem: the problem.
        model: the model, or its copy.
        params: the selected parameters by name.

    Returns:
        The gradient of the parameters that the loss uses.

    Raises:
        ArgumentError: if two evaluations differ or no parameter is used; also for a loss that is not finite.
    """
    with problem.running(model) as evaluate:
        first, second = (_sums(problem, evaluate, list(params.values())) for _ in range(2))
        _across_ranks(problem, first, second)
    _check_repeatable(first, second)
    pairs = zip(params, zip(first.parts, first.used, strict=True), strict=True)
    used = {name: part / first.total.to(part) for name, (part, u) in pairs if u > 0}  # a scalar keeps its type
    if not used:
        raise ArgumentError(f"loss does not depend on any of the {len(params)} selected parameters; see parameters=.")
    return Gradient(float(first.loss / first.total), used, float(first.total))


def _sums(problem: Problem, evaluate: Callable[[Any], Evaluated], params: list[nn.Parameter]) -> _Sums:
    used = torch.zeros(len(params), dtype=torch.float64, device=params[0].device)
    loss, size, total = (used.sum() for _ in range(3))
    sums = _Sums([torch.zeros_like(p) for p in params], used, loss, size, total)
    for number, batch in enumerate(problem.each()):
        found = evaluate(batch)
        weight = problem.weight(found.samples)
        sums.loss += weight * float(found.loss.detach())
        sums.total += weight
        if not math.isfinite(float(found.loss.detach())) and not sums.fault:
            sums.fault = f"{float(found.loss.detach())} in batch {number}"
        if not found.loss.requires_grad:
            continue
        for i, part in enumerate(torch.autograd.grad(found.loss, params, allow_unused=True)):
            if part is not None:
                sums.used[i] = 1.0
                sums.parts[i].add_(part, alpha=weight)
                sums.size += weight * float(part.norm())
    return sums


def _across_ranks(problem: Problem, *passes: _Sums) -> None:
    for sums in passes:
        for tensor in (sums.loss, sums.used, sums.size, sums.total, *sums.parts):
            ranks.add(tensor, problem.distributed)
        if problem.reduction == "sum":
            sums.total.fill_(1.0)
        if sums.fault or not math.isfinite(float(sums.loss)):  # after the sums: no rank waits for one that raised
            raise ArgumentError(
                f"loss is {sums.fault or 'not finite on another rank'}: curvature is not defined there; look for NaN "
                "in the batch or for a model that has diverged."
            )


def _check_repeatable(first: _Sums, second: _Sums) -> None:
    """Refuse a loss whose gradient changes between two evaluations by more than round-off."""
    limit = torch.finfo(first.parts[0].dtype).eps ** 0.5
    pairs = zip(first.parts, second.parts, strict=True)
    apart = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in pairs))
    losses = abs(float(first.loss - second.loss))
    if apart > limit * float(first.size) or losses > limit * abs(float(first.loss)):
        share = apart / max(float(first.size), 1e-300)
        raise ArgumentError(
            f"two evaluations at the same parameters differ: the gradient by {share:.1e} of its size, the loss by "
            f"{losses / float(first.total):.1e}. Some randomness remains: noise in the model, augmentation or "
            "shuffling in the loader. Hold the batches in a list, take the noise out, or try mode='eval'."
        )
