"""Protection: run a model of the user's and leave no trace of it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import is_lazy

from normscope.core.silence import silence


@contextmanager
def restored(model: nn.Module, heard: object = None) -> Iterator[None]:
    """Restore what running a model changes, at the end and after an error; attached scopes hear nothing meanwhile.

    Modes, buffers, every random state, and the attributes of its modules: counters, tensors and generators that a
    module keeps beside its buffers; of parameters, whose copies would weigh as much as the model, those below a module
    whose class says by `writes_parameters = True` that its forward rewrites them. The user's hooks on parameters are
    off. What a module changes inside a list or an object of its own cannot be seen.

    Args:
        model: the model that runs inside.
        heard: the one listener that hears nevertheless, None for nobody.

    Yields:
        Nothing.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    held = [dict(vars(module)) for module in modules]
    kept = [value for attributes in held for value in attributes.values()]
    writers = [module for module in modules if getattr(type(module), "writes_parameters", False)]
    rewritten = {id(p): p for module in writers for p in module.parameters()}
    saved = copies(t for t in (*model.buffers(), *rewritten.values(), *kept) if isinstance(t, torch.Tensor))
    with ExitStack() as stack:  # each step of it is taken, whatever another one raises
        stack.enter_context(put_back(saved))
        for value in kept:
            if _state(value) is not None:
                stack.callback(_set_state, value, _state(value))
        for module, attributes in zip(modules, held, strict=True):
            stack.callback(_restore_module, module, attributes, {name: dict(attributes[name]) for name in _OWNED})
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        stack.enter_context(without_hooks(model.parameters()))
        with random_states(model), silence() if heard is None else silence(heard):
            yield


_OWNED = ("_buffers", "_modules", "_parameters")


def copies(tensors: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copy tensors, for `restore_tensor`.

    Args:
        tensors: any tensors; those that have no values or take no writing are left out.

    Returns:
        Each tensor with its copy.
    """
    kept = [t for t in tensors if not is_lazy(t) and not t.is_inference() and t.device.type != "meta"]
    return [(tensor, tensor.detach().clone()) for tensor in kept]


@contextmanager
def put_back(saved: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Restore tensors at the end, and their version counters, as a backward may still wait for them.

    Args:
        saved: the tensors with their `copies`.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:  # each step of it is taken, whatever another one raises
        for tensor, copy in saved:
            stack.enter_context(_unsafe_preserve_version_counter(tensor))
            stack.callback(restore_tensor, tensor, copy)
        yield


def _restore_module(module: nn.Module, attributes: dict[str, Any], owned: dict[str, dict[str, Any]]) -> None:
    """Take away what a module has put on itself, and put back what it had, in the places where it was."""
    for name in vars(module).keys() - attributes.keys():
        del vars(module)[name]
    vars(module).update(attributes)
    for name, saved in owned.items():
        now = attributes[name]
        for key in now.keys() - saved.keys():
            del now[key]
        now.update(saved)


@torch.no_grad()
def restore_tensor(tensor: torch.Tensor, saved: torch.Tensor) -> None:
    """Write back what was changed, bit for bit; of a tensor that overlaps itself each place once.

    Args:
        tensor: the tensor.
        saved: a copy of what it was.
    """
    if _same(tensor, saved):
        return
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor, saved = tensor.narrow(dim, 0, 1), saved.narrow(dim, 0, 1)
    tensor.copy_(saved)


def _same(tensor: torch.Tensor, saved: torch.Tensor) -> bool:
    """Tell whether two tensors have the same bits: NaN equals itself, and -0 is not 0."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.shape != saved.shape:
        return torch.equal(tensor, saved)
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (tensor, saved)]
    return torch.equal(*bits)


def _state(value: object) -> Any:
    """Return the state of a generator, None for anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, (np.random.RandomState, random.Random)):
        return value.get_state() if isinstance(value, np.random.RandomState) else value.getstate()
    return None


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model inside without gradient and without a trace; see `restored`.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    with restored(model), torch.no_grad():
        yield


@contextmanager
def generator_state(batches: object) -> Iterator[None]:
    """Restore the generator of a loader and of its sampler, so that its later epochs are those of a run without.

    Args:
        batches: a loader, or anything else.

    Yields:
        Nothing.
    """
    owners = (batches, getattr(batches, "sampler", None))
    held = [generator for owner in owners if (generator := getattr(owner, "generator", None)) is not None]
    states = [generator.get_state() for generator in held]
    try:
        yield
    finally:
        for generator, state in zip(held, states, strict=True):
            generator.set_state(state)


@contextmanager
def random_states(model: nn.Module) -> Iterator[None]:
    """Restore the random states of Python, numpy and torch, on the model's devices too.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def without_hooks(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Take the user's hooks off parameters, which would change what is differentiated twice, or step in the backward.

    Args:
        tensors: the parameters.

    Yields:
        Nothing.
    """
    sorts = ("_backward_hooks", "_post_accumulate_grad_hooks")
    held = [(hooks, dict(hooks)) for tensor in tensors for sort in sorts if (hooks := getattr(tensor, sort))]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, saved in held:
            hooks.update(saved)
