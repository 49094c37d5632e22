"""Invariance: a held batch run with weights doubled, whole or in part, and how far outputs and gradients follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from normscope.core.site import Site
from normscope.linalg.problem import Problem
from normscope.linalg.protect import undisturbed
from normscope.norms.recognize import NormParts
from normscope.probes import layout
from normscope.probes.summary import Row, channel_row

MOST = 12  # weights tried; of a model with more, at a fixed stride: each costs up to three passes
SAMPLES = 16  # samples of the held batch that are run, where it is a pair of tensors


class _Held(nn.Module):
    """The problem as a module, so that its model's parameters can be replaced for one call."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model, self._problem = problem.model, problem

    def forward(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's first output and the loss."""
        output, target = self._problem.forward(self.model, batch)
        first = next(tensor for _, tensor in layout.tensors(output) if tensor.dtype.is_floating_point)
        return first, self._problem.loss(output, target)


def measure(
    problem: Problem, norms: Mapping[str, NormParts], weights: Mapping[str, nn.Parameter]
) -> dict[str, list[Row]]:
    """Double each weight and compare: a scale-invariant one has f(aW) = f(W) and grad(aW) = grad(W) / a.

    With a = 2 every product is exact in floating point, so all that is left is what eps or another path changes.
    Dropout is off; normalization layers are in the mode that they train in.

    Args:
        problem: model, loss and batches; the first batch is run, of a pair of tensors its first `SAMPLES` samples.
        norms: normalization layers of the model, by name.
        weights: parameters by name; those with two dimensions or more are tried.

    Returns:
        Rows of phase "batch" at the weights: tensor_defect (the whole doubled), row_defect (every second row) and,
        where a normalization layer has groups, block_defect (every second group of rows). Of role "value" |f(aW) -
        f(W)| / |f(W)|, of role "gradient" |a grad(aW) - grad(W)| / |grad(W)|. The cheapest that
        answers: where rows pass, the whole is not tried.
    """
    tried = {name: p for name, p in weights.items() if p.dim() > 1 and p.requires_grad and p.numel()}
    tried = dict(list(tried.items())[:: -(-len(tried) // MOST) or 1])
    groups = {parts.groups for parts in norms.values() if parts.groups}
    if not tried:
        return {"batch": []}
    held, batch, rows = _Held(problem), _first(problem.take(1)[0]), []
    with undisturbed(problem.model):
        for name, module in problem.model.named_modules():
            module.training = module.training and name in norms and norms[name].has_running
        with undisturbed(problem.model), torch.enable_grad():  # within, so that each pass draws the same random numbers
            output, loss = held(batch)
            gradients = torch.autograd.grad(loss, list(tried.values()), allow_unused=True)
        reference = output.detach()
        for (name, weight), gradient in zip(tried.items(), gradients, strict=True):
            if gradient is not None and bool(gradient.any()):
                found = _defects(held, batch, name, weight, reference, gradient, groups)
                module, _, slot = name.rpartition(".")
                site = str(Site(module, 0, slot))
                rows += [channel_row(site, role, {}, found[role]) for role in ("value", "gradient")]
    return {"batch": rows}


def _defects(
    held: _Held,
    batch: Any,
    name: str,
    weight: torch.Tensor,
    output: torch.Tensor,
    gradient: torch.Tensor,
    groups: set[int],
) -> dict[str, dict[str, float]]:
    """Return the defects of one weight by role and by what was doubled."""
    found: dict[str, dict[str, float]] = {"value": {}, "gradient": {}}
    for stat, scale in _scales(weight, groups):
        scaled = (weight.detach() * scale).requires_grad_()
        with undisturbed(held.model), torch.enable_grad():
            changed, loss = functional_call(held, {f"model.{name}": scaled}, (batch,))
            (followed,) = torch.autograd.grad(loss, [scaled], allow_unused=True)
        if followed is None:  # a model that does not take the same way twice
            return found
        found["value"][stat] = _distance(changed, output)
        found["gradient"][stat] = _distance(followed * scale, gradient)
        if stat == "row_defect" and found["gradient"][stat] < PASSED:
            break
        if stat == "tensor_defect" and not found["gradient"][stat] < PASSED:
            break
    return found


PASSED = 0.1  # gradient defect below which the question is answered; that of a plain weight is near 1


def _scales(weight: torch.Tensor, groups: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what to multiply a weight by: every second row, the whole, every second group of rows."""
    rows = torch.arange(len(weight), device=weight.device)
    shape = (-1, *[1] * (weight.dim() - 1))
    yield "row_defect", (1 + rows % 2).to(weight.dtype).view(shape)
    yield "tensor_defect", torch.full_like(weight[:1], 2.0)
    for number in sorted(groups):
        if 1 < number < len(weight) and len(weight) % number == 0:
            yield "block_defect", (1 + rows * number // len(weight) % 2).to(weight.dtype).view(shape)
            return


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def _first(batch: Any) -> Any:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, torch.Tensor) for t in batch)
    if pair and batch[0].dim() and batch[1].dim() and len(batch[0]) == len(batch[1]):
        return batch[0][:SAMPLES], batch[1][:SAMPLES]
    return batch
