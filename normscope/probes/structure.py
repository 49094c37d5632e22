"""Structure: what a model and its optimizers are before anything runs, as plain values for a record."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normscope.core.site import Site
from normscope.norms.layer import Norm, Normalization
from normscope.norms.recognize import NormParts, class_name
from normscope.probes import normalization, optimizers, ranks
from normscope.probes.noise import crossing

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # types in which a gain is read
_CASTS = (".float()", "torch.float32", "torch.float)")  # how a forward method of its own leaves half precision


def describe(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    norms: Mapping[str, NormParts],
    named: Mapping[str, nn.Parameter],
    stepped: Sequence[torch.optim.Optimizer],
) -> dict[str, object]:
    """Describe a model at rest; nothing is run.

    Args:
        model: the model.
        modules: its modules that are looked at, by name.
        norms: normalization layers among them.
        named: parameters that are looked at, by name.
        stepped: its optimizers.

    Returns:
        training (mode of the model), processes (that train together), foreign (tensors that optimizers hold and the
        model does not), and rows: modules in the order of definition, parameters, and groups of the optimizers.
    """
    holders, crossed = _holders(stepped), crossing(model, norms)
    mine = {id(p) for p in model.parameters()}
    gains = {name: f"{name}.{parts.gain}".lstrip(".") for name, parts in norms.items() if parts.gain}
    names = {module: name for name, module in modules.items()}
    before = {
        names[target]: names[source] for target, source in _consecutive(model) if {target, source} <= names.keys()
    }
    rows: list[dict[str, object]] = []
    for name, module in modules.items():
        row: dict[str, object] = {"module": name, "class": class_name(module), "after": before.get(name, "")}
        if isinstance(module, nn.modules.dropout._DropoutNd):
            row["drop"] = optimizers.known(module.p)
        if name in norms:
            gain = named.get(gains.get(name, ""))
            row |= _norm(module, norms[name], gain) | {"crosses": name in crossed}
        rows.append(row)
    kept = set(gains.values())
    return {
        "training": model.training,
        "processes": ranks.world(),
        "foreign": sum(key not in mine for key in holders),
        "modules": rows,
        "parameters": [_parameter(name, p, holders.get(id(p), []), name in kept) for name, p in named.items()],
        "groups": [group for optimizer in stepped for group in _groups(optimizer, stepped)],
    }


def _norm(module: nn.Module, parts: NormParts, gain: nn.Parameter | None) -> dict[str, object]:
    dtype = "" if gain is None else str(gain.dtype).removeprefix("torch.")
    return normalization.attributes(parts) | {
        "axis": parts.axis,
        "ndim": parts.normalized_ndim,
        "training": module.training,
        "whitens": isinstance(module, Norm) and module.traits.whitens and module.traits.crosses_batch,
        "synchronized": is_synchronized(module),
        "computes_in": _computes_in(module, dtype),
    }


def _parameter(name: str, p: nn.Parameter, holders: list[tuple[str, int]], is_gain: bool) -> dict[str, object]:
    module, _, slot = name.rpartition(".")
    row: dict[str, object] = {
        "site": str(Site(module, 0, slot)),
        "module": module,
        "slot": slot,
        "shape": [] if is_lazy(p) else list(p.shape),
        "dtype": str(p.dtype).removeprefix("torch."),
        "trainable": p.requires_grad,
        "holders": holders,
    }
    if is_gain and _is_readable(p):
        size = p.detach().abs()
        row |= {"least": float(size.min()), "largest": float(size.max())}
    return row


def _is_readable(p: nn.Parameter) -> bool:
    """Tell whether a parameter holds plain numbers: a sharded or quantized one would have to be computed."""
    plain = p.dtype in _PLAIN and not is_lazy(p) and type(p.data) is torch.Tensor
    return plain and p.device.type != "meta" and p.numel() > 0


def _holders(stepped: Sequence[torch.optim.Optimizer]) -> dict[int, list[tuple[str, int]]]:
    """Return the optimizers and groups that hold a tensor, by its id."""
    found: dict[int, list[tuple[str, int]]] = {}
    for optimizer in stepped:
        label = optimizers.label(optimizer, stepped)
        for number, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                found.setdefault(id(p), []).append((label, number))
    return found


def _groups(optimizer: torch.optim.Optimizer, stepped: Sequence[torch.optim.Optimizer]) -> Iterator[dict[str, Any]]:
    """Yield settings and rule of each parameter group."""
    for row, group in zip(optimizers.settings(optimizer, stepped), optimizer.param_groups, strict=True):
        first = next(iter(group["params"]), None)
        rule = {} if first is None else optimizers.rule(first, (optimizer,))
        rates = (optimizers.known(group.get(name)) for name in ("lr", "initial_lr", "max_lr"))  # a schedule's peak
        peak = max((rate for rate in rates if isinstance(rate, (int, float))), default=None)
        yield row | rule | {"peak": peak, "eps": optimizers.known(group.get("eps"))}


def _consecutive(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield modules with the one whose output they take, where the model's definition leaves no doubt."""
    for module in model.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            for first, second in pairwise(module):
                source, target = _end(first, -1), _end(second, 0)
                if source is not None and target is not None:
                    yield target, source


def _end(module: nn.Module, position: int) -> nn.Module | None:
    """Return the first or last layer of what runs in sequence, None where that cannot be told."""
    while isinstance(module, nn.Sequential) and len(module) and type(module).forward is nn.Sequential.forward:
        module = module[position]
    return None if any(True for _ in module.children()) else module


def is_synchronized(module: nn.Module) -> bool:
    """Tell whether a normalization layer takes the statistics of a batch over all ranks."""
    ours = isinstance(module, Normalization) and type(module.average).__name__ == "Across"
    return ours or isinstance(module, nn.SyncBatchNorm) or "sync" in type(module).__name__.lower()


def _computes_in(module: nn.Module, dtype: str) -> str:
    """Return the type in which a layer adds its eps: torch's kernels and those that say so leave half precision."""
    if isinstance(module, Normalization) or any(
        ".nn.modules." in kind.__module__ for kind in type(module).__mro__[:-2]
    ):
        return "float64" if dtype == "float64" else "float32"
    source = _source(type(module))
    return "float32" if any(cast in source for cast in _CASTS) else dtype if source else ""


def _source(cls: type) -> str:
    """Return the source of a class's methods; to look for the class itself would parse its whole file."""
    found = ""
    for function in filter(inspect.isroutine, vars(cls).values()):
        with suppress(OSError, TypeError):
            found += inspect.getsource(inspect.unwrap(getattr(function, "__func__", function)))
    return found
