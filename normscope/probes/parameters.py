"""Parameters: norms of weights, of their gradients and of the last update; the gradient norm of every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normscope.core.site import Site
from normscope.probes import optimizers
from normscope.probes.summary import Row, channel_row

COPIED = 1 << 25  # bytes of weights copied before a sampled step at most, 32 MB


class Parameters:
    """Measures the parameters of one or several optimizers around a step.

    Args:
        named: watched parameters by name.
        stepped: the optimizers.
        on_site: called with a site and its attributes when it is first seen.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        stepped: Sequence[torch.optim.Optimizer],
        on_site: Callable[[str, dict[str, object]], None],
    ) -> None:
        """Start with nothing measured; see the class."""
        self._named, self._optimizers, self._on_site = named, tuple(stepped), on_site
        self._names = {id(parameter): name for name, parameter in named.items()}
        self._known: set[str] = set()
        self._copies: dict[int, dict[str, torch.Tensor]] = {}
        self._turn: dict[int, int] = {}
        self._found: list[tuple[str, str, torch.Tensor]] = []

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy weights, `COPIED` bytes of them at most; those left out have their turn at the next sampled step."""
        mine = self._mine(optimizer)
        again = {name for name, _ in mine}  # an optimizer that steps twice in a step is measured at its last
        self._found = [item for item in self._found if item[0] not in again]
        start = self._turn.get(id(optimizer), 0) % max(len(mine), 1)
        chosen: dict[str, torch.Tensor] = {}
        room = COPIED
        for name, parameter in mine[start:] + mine[:start]:
            thin = _thinned(parameter)
            size = thin.numel() * thin.element_size()
            if size > room:
                break
            room -= size
            chosen[name] = thin.clone()
        self._turn[id(optimizer)] = start + len(chosen)
        self._copies[id(optimizer)] = chosen

    def gradients(self, optimizer: torch.optim.Optimizer, scale: torch.Tensor | None) -> None:
        """Measure weights, as they were before the step, and gradients, divided by the loss scale."""
        mine = self._mine(optimizer)
        kept = self._copies.get(id(optimizer), {})
        whole = [kept[name] if name in kept and kept[name].numel() == p.numel() else p for name, p in mine]
        self._add("value", [name for name, _ in mine], norms(whole))
        graded = [(name, p.grad) for name, p in mine if p.grad is not None]
        found = norms([gradient for _, gradient in graded])
        found = found if scale is None else [norm / scale.to(norm.device) for norm in found]
        self._add("gradient", [name for name, _ in graded], found)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure what the step has changed."""
        before = self._copies.pop(id(optimizer), {})
        now = {name: p for name, p in self._mine(optimizer) if name in before}
        for name, parameter in now.items():
            before[name].sub_(_thinned(parameter))
        found = norms([before[name] for name in now])
        stretch = [math.sqrt(p.numel() / max(before[name].numel(), 1)) for name, p in now.items()]
        self._add("update", list(now), [norm * factor for norm, factor in zip(found, stretch, strict=True)])

    def states(self) -> list[torch.Tensor]:
        """Return the norms measured in this step, on their devices."""
        return [norm for *_, norm in self._found]

    def rows(self, values: Sequence[float], vectors: Mapping[str, np.ndarray]) -> list[Row]:
        """Return rows with norm and rms of each parameter and role.

        Args:
            values: the norms of `states`, on the host.
            vectors: gains and biases of normalization layers by site, kept whole.

        Returns:
            One row a parameter and role.
        """
        scalars: dict[tuple[str, str], dict[str, float]] = {}
        for (name, role, _), norm in zip(self._found, values, strict=True):
            size = max(self._named[name].numel(), 1)
            scalars[self._site(name), role] = {"norm": norm, "rms": norm / math.sqrt(size)}
        for site in vectors:
            scalars.setdefault((site, "value"), {})
        whole = {(site, "value"): {"value": vector.reshape(-1)} for site, vector in vectors.items()}
        return [channel_row(*key, whole.get(key, {}), found) for key, found in scalars.items()]

    def discard(self) -> None:
        """Forget what the step has left."""
        self._copies, self._found = {}, []

    def _add(self, role: str, names: Sequence[str], found: Sequence[torch.Tensor]) -> None:
        self._found += [(name, role, norm) for name, norm in zip(names, found, strict=True)]

    def _mine(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
        held = (p for group in optimizer.param_groups for p in group["params"])
        return [(self._names[id(p)], p) for p in held if id(p) in self._names and not is_lazy(p)]

    def _site(self, name: str) -> str:
        module, _, slot = name.rpartition(".")
        site = str(Site(module, 0, slot))
        if name not in self._known:
            self._known.add(name)
            parameter = self._named[name]
            optimizer, group = optimizers.owner(parameter, self._optimizers)
            attributes: dict[str, object] = {
                "module": module,
                "call": 0,
                "slot": slot,
                "class": "Parameter",
                "shape": list(parameter.shape),
                "dtype": str(parameter.dtype).removeprefix("torch."),
                "trainable": parameter.requires_grad,
                "optimizer": optimizer,
                "group": group,
            }
            self._on_site(site, attributes)
        return site


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters by dotted name: a tied one under its first name, integers (quantized) left out."""
    return {name: p for name, p in model.named_parameters() if p.is_floating_point() or p.is_complex()}


def norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the Euclidean norm of each tensor, as scalars on its device; half precision is summed in float32."""
    return [_square(_dense(tensor)).sqrt_() for tensor in tensors]


@torch.no_grad()
def squared_norm(gradients: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the squared norm of all gradients together, one scalar a device, without waiting for it.

    Args:
        gradients: parameter gradients, dense or sparse.

    Returns:
        One scalar per device that holds a gradient; NaN or infinite as soon as one element is.
    """
    parts: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for gradient in gradients:
        dense = _dense(gradient)
        parts.setdefault((dense.device, dense.dtype), []).append(dense)
    totals: dict[torch.device, torch.Tensor] = {}
    for (device, _), same in parts.items():
        square = torch.stack(torch._foreach_norm(same, 2, _wide(same[0]))).square_().sum()
        totals[device] = totals[device] + square if device in totals else square
    return list(totals.values())


def _square(x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous():
        flat = x.view(-1)
        return torch.dot(flat, flat)  # at memory bandwidth; vector_norm is slower on a CPU
    norm: torch.Tensor = torch.linalg.vector_norm(x, dtype=_wide(x))
    return norm.square_()


def _thinned(x: torch.Tensor) -> torch.Tensor:
    """Return a parameter, or every k-th of its elements where it alone is larger than what may be copied."""
    x = x.detach()
    stride = -(-x.numel() * x.element_size() // COPIED)
    return x.reshape(-1)[::stride] if stride > 1 else x


def _dense(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    if x.is_sparse:
        return x.coalesce().values()
    return x


def _wide(x: torch.Tensor) -> torch.dtype | None:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
