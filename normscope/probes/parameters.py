"""Parameters: norms of weights, of their gradients and of the last update; the gradient norm of every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters by dotted name: a tied one under its first name, integers (quantized) left out."""
    return {name: p for name, p in model.named_parameters() if p.is_floating_point() or p.is_complex()}


@torch.no_grad()
def copies(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Copy parameters before a step."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the Euclidean norm of each tensor, as scalars on its device; half precision is summed in float32."""
    dense = [_dense(tensor) for tensor in tensors]
    return [torch.linalg.vector_norm(t, dtype=_wide(t)) for t in dense]


@torch.no_grad()
def update_norms(parameters: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the norm of each parameter's change; the copies are used up."""
    for old, new in zip(before, parameters, strict=True):
        old.sub_(new.detach())
    return norms(before)


@torch.no_grad()
def squared_norm(gradients: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the squared norm of all gradients together, one scalar a device, without waiting for it.

    Args:
        gradients: parameter gradients, dense or sparse.

    Returns:
        One scalar per device that holds a gradient; NaN or infinite as soon as one element is.
    """
    parts: dict[torch.device, list[torch.Tensor]] = {}
    for gradient in gradients:
        dense = _dense(gradient)
        parts.setdefault(dense.device, []).append(_square(dense))
    return [torch.stack(values).sum() for values in parts.values()]


def _square(x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous():
        flat = x.view(-1)
        return torch.dot(flat, flat)  # at memory bandwidth; vector_norm is slower on a CPU
    return torch.linalg.vector_norm(x, dtype=_wide(x)).square().to(torch.float32)


def _dense(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    if x.is_sparse:
        return x.coalesce().values()
    return x


def _wide(x: torch.Tensor) -> torch.dtype | None:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
