"""Protection: run a model of the user's and leave no trace of it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from normscope.core.silence import silence


@contextmanager
def restored(model: nn.Module, heard: object = None) -> Iterator[None]:
    """Restore modes, buffers and every random state at the end, also after an error; attached scopes hear nothing.

    Args:
        model: the model that runs inside.
        heard: the one listener that hears nevertheless, None for nobody.

    Yields:
        Nothing.
    """
    held = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with ExitStack() as versions:
        for buffer, _ in buffers:  # a backward may still wait for it
            versions.enter_context(_unsafe_preserve_version_counter(buffer))
        try:
            with random_states(model), silence() if heard is None else silence(heard):
                yield
        finally:
            for module, training, registered in held:
                module.training = training
                module._buffers.update(registered)  # a module may have put new tensors in their place
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)


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
