"""Lint: what can be known of normalization in a model, and of its optimizer, without training."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import normscope  # what judges is resolved when asked for: it loads pandas and scipy
from normscope.core.errors import ArgumentError, brief
from normscope.core.site import Site
from normscope.core.store import Store
from normscope.linalg.protect import restored
from normscope.norms.recognize import NormParts, find_norms
from normscope.probes import parameters, structure
from normscope.probes.activations import Activations, on_host
from normscope.probes.factors import Factors
from normscope.probes.hooks import Hooks
from normscope.probes.normalization import attributes
from normscope.probes.transfer import to_host
from normscope.scope.watch import selected, unwrapped

if TYPE_CHECKING:
    from normscope.core.table import Findings


def lint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    example: Any = None,
) -> Findings:
    """Judge a model as it stands, before it is trained: its normalization layers, their order, its optimizer.

    An example runs forward once, without gradient, in the mode that the model is in (layers with running statistics in
    evaluation mode, so that one sample will do). Buffers, modes and random states stay bit for bit what they were. A
    model in evaluation mode is judged as `model.train()` would leave it.

    Args:
        model: the model; a compiled or data-parallel one is unwrapped.
        optimizer: its optimizer, or all that step together; without one, settings are not judged.
        example: a batch, which tells the order of execution and the sizes. A tuple or list is `(input, target)`, as for
            `Problem`, where forward can be called with one argument, and the input is run; else it holds the
            positional arguments. A mapping holds keyword arguments, where forward takes these. Anything else is the
            input. Without an example, what needs it is judged where layers lie in a `torch.nn.Sequential`, else it is
            undecided.

    Returns:
        Findings, worst first; the list prints as a table. An argument that cannot work, or an example on which the
        model itself fails, is an ArgumentError.
    """
    inner = _checked_model(model)
    optimizers = _checked_optimizers(optimizer)
    modules = selected(inner)
    norms = {name: parts for name, parts in find_norms(inner).items() if name in modules}
    named = parameters.named(inner)
    facts = {
        "model": type(inner).__name__,
        "lint": True,
        "norms": len(norms),
        "structure": structure.describe(inner, modules, norms, named, optimizers),
    }
    store = Store(None, "lint", facts)
    try:
        if example is not None:
            _run(inner, modules, norms, store, example)
        store.commit()
        record = store.record()
    finally:
        store.close()
    return normscope.diagnose(record)


class _Order:
    """Hears one forward pass and writes down which layers ran, in what order, on what."""

    active = True

    def __init__(self, norms: Mapping[str, NormParts], store: Store) -> None:
        self._store, self._sites = store, 0
        turns = Factors(1, True, False, False)
        self.activations = Activations(norms, {"normalization"}, turns, self.on_site, self._on_failure, lambda: None)

    def on_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> None:
        """Begin the pass."""
        self.activations.begin_pass()

    def on_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object
    ) -> None:
        """Write down what returned."""
        with torch.enable_grad():  # a forward without gradient would not be taken for one of training
            self.activations.forward(name, module, args, kwargs, output)

    def before_step(self, optimizer: torch.optim.Optimizer, has_closure: bool) -> None:
        """Nothing steps."""

    def after_step(self, optimizer: torch.optim.Optimizer, has_closure: bool) -> None:
        """Nothing steps."""

    def on_site(self, site: str, known: dict[str, object]) -> None:
        """Write down a site."""
        self._store.site(site, {**known, "order": self._sites})
        self._sites += 1

    def _on_failure(self, probe: str, site: str, error: Exception) -> None:
        self._store.event(0, "probe-failed", site, f"{probe}: {type(error).__name__}: {error}")


def _run(
    model: nn.Module, modules: Mapping[str, nn.Module], norms: Mapping[str, NormParts], store: Store, example: Any
) -> None:
    """Run the example and write down what is seen; an error inside a normalization layer is written down as well."""
    watcher = _Order(norms, store)
    keeping = [name for name, parts in norms.items() if parts.has_running]
    trains = {name: modules[name].training or not model.training for name in keeping}
    hooks = Hooks(watcher, model, modules.items(), ())
    try:
        with restored(model, heard=watcher), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in keeping:
                modules[name].training = False
            _call(model, example)
    except Exception as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        layer = _raised_in(error.__traceback__, {id(modules[name]): name for name in norms})
        if layer is None:
            raise ArgumentError(
                f"example={brief(example)}: {type(model).__name__}.forward raised {told}; pass what the model takes: "
                "its input, (input, target), or a mapping of keyword arguments."
            ) from error
        store.event(0, "forward-failed", str(Site(layer, 0, "input")), told)
    finally:
        hooks.remove()
    _write(watcher, norms, trains, store)


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, (tuple, list)) and example:
        if not _takes(model, example[0]):
            return model(*example)
        example = example[0]
    if isinstance(example, Mapping) and _takes(model, **example):
        return model(**example)
    return model(example)


def _takes(model: nn.Module, *args: Any, **named: Any) -> bool:
    try:
        inspect.signature(model.forward).bind(*args, **named)
    except (TypeError, ValueError):
        return False
    return True


def _raised_in(trace: TracebackType | None, layers: Mapping[int, str]) -> str | None:
    """Return the normalization layer whose forward raised, None where another module's did."""
    found = None
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            found = layers.get(id(module), found)
        trace = trace.tb_next
    return found


def _write(watcher: _Order, norms: Mapping[str, NormParts], trains: Mapping[str, bool], store: Store) -> None:
    """Write the sizes that normalization layers saw, and the mode they train in."""
    measured, calls, running = watcher.activations.collect()
    states = on_host(measured, iter(to_host([tensor for item in measured for tensor in item.tensors])))
    for item, state in zip(measured, states, strict=True):
        batch = calls[watcher.activations.owners[item.site]].batch
        store.scalars(0, item.site, "train", "value", ("count", "batch"), np.array([state[0][0], batch]))
    for name in running:
        site = Site(name, 0, "running")
        watcher.on_site(str(site), {"module": name, "call": 0, "slot": "running", **attributes(norms[name])})
        store.scalars(0, str(site), "train", "value", ("training",), np.array([float(trains[name])]))


def _checked_model(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model={brief(model)} must be a torch.nn.Module.")
    inner = unwrapped(model)
    if isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner = unwrapped(inner.module)
    if isinstance(inner, torch.jit.ScriptModule):
        raise ArgumentError(
            f"model={type(inner).__name__} is scripted and takes no hooks; pass the module it was made from."
        )
    return inner


def _checked_optimizers(optimizer: object) -> tuple[torch.optim.Optimizer, ...]:
    optimizers = () if optimizer is None else tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
    for item in optimizers:
        if not isinstance(item, torch.optim.Optimizer):
            raise ArgumentError(
                f"optimizer={brief(item)} must be a torch.optim.Optimizer, a sequence of them, or None; an example "
                "is passed as example=."
            )
    return optimizers
