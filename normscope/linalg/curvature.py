"""Curvature matrices of one batch as products with a vector, by double backward.

With loss l(z, t) and output z(theta), J = dz/dtheta, n samples:

- "hessian": H = d^2 l / dtheta^2.
- "ggn": the generalized Gauss-Newton matrix J^T (d^2 l / dz^2) J.
- "fisher": the empirical Fisher matrix (1/n) sum_i g_i g_i^T of the gradients g_i of the samples' own losses
  (without 1/n for a summed loss).
- "mc-fisher": the same with targets drawn from the model's own prediction; its mean is the Fisher matrix, which for
  cross-entropy and squared error is the Gauss-Newton matrix.

J v is the derivative of J^T u with respect to u, so all of them are two backward passes. torch.func.jacrev is not used:
it is wrong through normalization layers.

Sources: pearlmutter1994 (products), schraudolph2002 (Gauss-Newton), martens2020 (Fisher matrices).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad
from torch.utils._pytree import tree_flatten, tree_unflatten

from normscope.core.errors import ArgumentError
from normscope.linalg.gradient import checked_loss

if TYPE_CHECKING:
    from normscope.linalg.problem import Evaluated, Problem

KINDS = ("hessian", "ggn", "fisher", "mc-fisher")
LIKELIHOODS = {"cross_entropy": "classes", "CrossEntropyLoss": "classes", "mse_loss": "normal", "MSELoss": "normal"}

PLAIN = (
    "Take its plain form: eager attention instead of a fused or flash kernel, the model before torch.compile, a "
    "backward that can be differentiated."
)

# (a part of the vector for each chosen parameter, numbers of the chosen, whether another product follows) -> parts
Product = Callable[[Sequence[Tensor], Sequence[int], bool], Sequence[Tensor]]
_Metric = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def product(
    kind: str,
    problem: Problem,
    found: Evaluated,
    params: Sequence[Tensor],
    generator: torch.Generator,
    draws: int,
    check: bool,
) -> Product:
    """Build the product of one batch; it holds the batch's graph.

    Args:
        kind: one of `KINDS`.
        problem: loss and reduction.
        found: the evaluated batch.
        params: all parameters.
        generator: draws the targets of "mc-fisher".
        draws: how many for each sample.
        check: whether to look through the graph for what has no second derivative.

    Returns:
        The product.

    Raises:
        ArgumentError: if the output is no tensor with a row for each sample, where one is needed.
    """
    if kind == "hessian":
        return _hessian(found.loss, params, check)
    flat, form = tree_flatten(found.output)
    live = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.requires_grad]
    outputs = [flat[i] for i in live]
    if not outputs or not all(output.dim() for output in outputs):
        raise ArgumentError(
            f"operator={kind!r} needs the model's output, one row for each sample, but forward returned a "
            f"{type(found.output).__name__} without such a tensor; return (output, target) and let loss join them."
        )
    leaves = [output.detach().requires_grad_() for output in outputs]

    def loss(target: object) -> Tensor:
        whole = [leaves[live.index(i)] if i in live else leaf for i, leaf in enumerate(flat)]
        return checked_loss(found.criterion(tree_unflatten(whole, form), target))

    if kind == "ggn":
        return _sandwich(outputs, params, _second(loss(found.target), leaves), check)
    targets = [found.target]
    if kind == "mc-fisher":
        targets = [_drawn(problem, leaves, found.target, generator) for _ in range(draws)]
    scale = (found.samples if problem.reduction == "mean" else 1.0) / len(targets)
    slopes = [grad(loss(target), leaves, allow_unused=True, materialize_grads=True) for target in targets]
    return _sandwich(outputs, params, _outer(slopes, scale), check)


def refuse_single(derivatives: Sequence[Tensor]) -> None:
    """Refuse derivatives that cannot be differentiated again: autograd would take the part as constant, silently.

    Args:
        derivatives: made with their graph.

    Raises:
        ArgumentError: if a backward in the graph is marked as once differentiable.
    """
    seen: set[object] = set()
    waiting: list[Any] = [d.grad_fn for d in derivatives]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
            if node.name() == "torch::autograd::Error":
                raise ArgumentError(f"model: an operation has no second derivative (once_differentiable). {PLAIN}")


def _hessian(loss: Tensor, params: Sequence[Tensor], check: bool) -> Product:
    if not loss.requires_grad:
        return lambda vector, chosen, follows: [torch.zeros_like(v) for v in vector]
    slopes = grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
    if check:
        refuse_single(slopes)

    def multiply(vector: Sequence[Tensor], chosen: Sequence[int], follows: bool) -> Sequence[Tensor]:
        return _pull([slopes[i] for i in chosen], [params[i] for i in chosen], vector, follows)

    return multiply


def _sandwich(outputs: Sequence[Tensor], params: Sequence[Tensor], metric: _Metric, check: bool) -> Product:
    """Return v -> J^T M J v."""
    dummies = [torch.zeros_like(output, requires_grad=True) for output in outputs]
    pulled = grad(outputs, params, dummies, create_graph=True, allow_unused=True, materialize_grads=True)
    if check:
        refuse_single(pulled)

    def multiply(vector: Sequence[Tensor], chosen: Sequence[int], follows: bool) -> Sequence[Tensor]:
        pushed = _pull([pulled[i] for i in chosen], dummies, vector, True)
        return _pull(outputs, [params[i] for i in chosen], metric(pushed), follows)

    return multiply


def _second(loss: Tensor, leaves: Sequence[Tensor]) -> _Metric:
    slopes = grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    return lambda vector: _pull(slopes, leaves, vector, True)


def _outer(slopes: Sequence[Sequence[Tensor]], scale: float) -> _Metric:
    """Return w -> scale * sum over draws of r (r . w), sample by sample."""
    stacked = [torch.stack(drawn).flatten(2) for drawn in zip(*slopes, strict=True)]  # draws, samples, features

    def multiply(vector: Sequence[Tensor]) -> Sequence[Tensor]:
        pairs = list(zip(stacked, vector, strict=True))
        dots = torch.stack([torch.einsum("dsf,sf->ds", r, v.flatten(1)) for r, v in pairs]).sum(0) * scale
        return [torch.einsum("dsf,ds->sf", r, dots).reshape(v.shape) for r, v in pairs]

    return multiply


def _pull(of: Sequence[Tensor], to: Sequence[Tensor], by: Sequence[Tensor], keep: bool) -> Sequence[Tensor]:
    """Return the vector-Jacobian product; what does not depend on anything has derivative zero."""
    pairs = [(y, v) for y, v in zip(of, by, strict=True) if y.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in to]
    heads, weights = zip(*pairs, strict=True)
    return grad(heads, to, weights, retain_graph=keep, allow_unused=True, materialize_grads=True)


def _drawn(problem: Problem, leaves: Sequence[Tensor], target: object, generator: torch.Generator) -> Tensor:
    """Draw a target for each sample from the prediction, whose negative logarithm is the loss."""
    loss = getattr(problem.loss, "func", problem.loss)  # of functools.partial
    kind = LIKELIHOODS.get(getattr(loss, "__name__", type(loss).__name__))
    if kind is None or len(leaves) != 1 or not isinstance(target, Tensor):
        raise ArgumentError(
            f"operator='mc-fisher' draws targets and needs to know their distribution: loss={loss!r} must be "
            "torch.nn.functional.cross_entropy, nn.CrossEntropyLoss, mse_loss or nn.MSELoss on one output tensor; pick "
            "the output in forward, or take operator='ggn', its mean over all draws."
        )
    output = leaves[0].detach()
    if kind == "normal":
        # the loss of a sample is s |z - t|^2, the variance of t therefore 1 / (2 s)
        scale = 1.0 / output[0].numel() if problem.reduction == "mean" else 1.0
        noise = torch.randn(output.shape, generator=generator, dtype=output.dtype)
        drawn: Tensor = output + noise.to(output.device) / (2.0 * scale) ** 0.5
        return drawn
    axis = 1 if output.dim() > 1 else 0
    chances: Tensor = output.softmax(axis).movedim(axis, -1)
    rows = torch.multinomial(chances.reshape(-1, chances.shape[-1]).cpu(), 1, generator=generator)
    classes = rows.reshape(chances.shape[:-1]).to(output.device)
    if target.is_floating_point():
        hot: Tensor = F.one_hot(classes, chances.shape[-1])
        encoded: Tensor = hot.movedim(-1, axis).to(target.dtype)
        return encoded
    kept: Tensor = torch.where(target == getattr(problem.loss, "ignore_index", -100), target, classes)
    return kept
