"""Problem: a model with a loss and held data, for what needs more than the training steps themselves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from normscope.core.errors import ArgumentError

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]


HELD = 8  # batches held of a loader or an iterator


class Problem:
    """A model, a loss and held batches.

    Args:
        model: the model.
        loss: `loss(output, target)`, a scalar tensor.
        batches: batches `(input, target)`; of a loader or an iterator the first `HELD` are held.
        forward: `(model, batch) -> (output, target)` for batches of any other form.

    Raises:
        ArgumentError: if the model is no module, the loss not callable, or there is no batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], torch.Tensor],
        batches: Iterable[Any],
        *,
        forward: Forward | None = None,
    ) -> None:
        """Check and hold the parts; see the class."""
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model={model!r} must be a torch.nn.Module.")
        if not callable(loss):
            raise ArgumentError(f"loss={loss!r} must be callable as loss(output, target).")
        self.model, self.loss = model, loss
        self.forward: Forward = forward or _forward_pair
        if not isinstance(batches, Iterable):
            raise ArgumentError(
                f"batches={batches!r} must be a sequence of batches (input, target), or a loader of them."
            )
        if isinstance(batches, torch.Tensor) or (isinstance(batches, tuple) and _is_batch(batches)):
            raise ArgumentError("batches: got a single batch; pass a list of batches, as [(inputs, targets)].")
        if isinstance(batches, (list, tuple)):
            self.batches = batches
        else:
            with _random_states(model), _generator_state(batches):  # a shuffling loader draws from generators
                self.batches = list(islice(batches, HELD))
        if not self.batches:
            raise ArgumentError(f"batches={batches!r} is empty; pass at least one held batch (input, target).")

    @property
    def size(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def __repr__(self) -> str:
        """Say what the problem holds."""
        return f"Problem({type(self.model).__name__}, {self.size:,} parameters, {len(self.batches)} batches)"


def _forward_pair(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    try:
        inputs, target = batch
    except (TypeError, ValueError):
        raise ArgumentError(
            f"batches: a batch of type {type(batch).__name__} is not a pair (input, target); "
            "pass forward=lambda model, batch: (output, target)."
        ) from None
    return model(inputs), target


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model inside without a trace: modes, buffers and every random state are restored, also after an error.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    held = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with _random_states(model), torch.no_grad():
            yield
    finally:
        for module, training, registered in held:
            module.training = training
            module._buffers.update(registered)  # a module may have put new tensors in their place
        with torch.no_grad():
            for buffer, saved in buffers:
                with _unsafe_preserve_version_counter(buffer):  # a backward may still wait for it
                    buffer.copy_(saved)


def _is_batch(batches: tuple[object, ...]) -> bool:
    return bool(batches) and all(isinstance(item, torch.Tensor) for item in batches)


@contextmanager
def _generator_state(batches: object) -> Iterator[None]:
    """Restore the generator of a loader and of its sampler, so that its later epochs are those of a run without."""
    owners = (batches, getattr(batches, "sampler", None))
    held = [generator for owner in owners if (generator := getattr(owner, "generator", None)) is not None]
    states = [generator.get_state() for generator in held]
    try:
        yield
    finally:
        for generator, state in zip(held, states, strict=True):
            generator.set_state(state)


@contextmanager
def _random_states(model: nn.Module) -> Iterator[None]:
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
