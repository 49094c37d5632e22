"""Examine: one look at a model as it is, nothing trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from normscope.core.errors import ArgumentError
from normscope.linalg.problem import Forward, Problem, drops
from normscope.linalg.protect import copies, put_back, restore_tensor, restored
from normscope.scope.watch import Layers, unwrapped, watch

if TYPE_CHECKING:
    from normscope.core.record import Record

MAX_BATCHES = 16


def examine(
    model: nn.Module,
    loss: Callable[[Any, Any], torch.Tensor],
    batches: Iterable[Any],
    *,
    run: str | Path | None = None,
    layers: Layers | None = None,
    probes: str | Iterable[str] | None = None,
    forward: Forward | None = None,
    reduction: str = "mean",
    progress: bool | None = None,
) -> Record:
    """Measure a model at rest: each batch is run forward and backward, and the model is as before at the end.

    Normalization uses the statistics of the batch, dropout is off. Each batch is a step of the record. Weights,
    buffers, modes, `.grad` and random states stay bit for bit what they were, also after an error.

    Args:
        model: the model.
        loss: `loss(output, target)`, a scalar tensor.
        batches: batches `(input, target)`; at most `MAX_BATCHES` of them are run.
        run: folder of the record, new; None keeps it in memory.
        layers: which modules to look at, as for `attach`; all by default.
        probes: which probes, as for `attach`; all by default.
        forward: `(model, batch) -> (output, target)` for batches of any other form.
        reduction: how the loss joins the samples of a batch, "mean" or "sum".
        progress: whether to draw a progress bar on stderr; by default where that is a terminal.

    Returns:
        The record, for `diagnose`, `write_report` and all else that takes one.
        A loss that is no scalar with a gradient is an ArgumentError.

    Raises:
        ArgumentError: an argument cannot work.
    """
    problem = Problem(model, loss, batches, forward=forward, reduction=reduction, held=MAX_BATCHES)
    inner = unwrapped(model)
    if isinstance(inner, torch.jit.ScriptModule):
        raise ArgumentError(
            f"model={type(inner).__name__} is scripted and takes no hooks; pass the module that it was made from."
        )
    still = _still(inner)
    held = problem.take(MAX_BATCHES)
    plain = (p for p in inner.parameters() if not is_lazy(p) and type(p.data) is torch.Tensor)  # a forward may rewrite
    stored = copies((*plain, *inner.buffers()))
    session, hooks, *_ = watch(
        inner,
        (),
        run=run,
        every=1,
        layers=layers,
        probes=probes,
        problem=problem,
        scaler=None,
        reduction=reduction,
        name="examined",
    )
    quiet = not sys.stderr.isatty() if progress is None else not progress
    try:
        with _undisturbed(inner, session), put_back(stored):
            for number, batch in enumerate(tqdm(held, desc="batches", unit="batch", disable=quiet)):
                session.annotate({"loss": _run(problem, inner, batch, number)})
                session.look(still)
                for tensor, value in stored:  # each batch meets the model as it is
                    restore_tensor(tensor, value)
    finally:
        hooks.remove()
        session.finish(measure=False)
        record = session.store.record()
        session.store.close()
    return record


def _still(model: nn.Module) -> torch.optim.Optimizer:
    """Return what holds the parameters as an optimizer does, and never steps."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ArgumentError(
            f"model={type(model).__name__} has no parameter that requires a gradient; set requires_grad where "
            "gradients are to be looked at."
        )
    return torch.optim.SGD(trainable, lr=0.0)


@contextmanager
def _undisturbed(model: nn.Module, listener: object) -> Iterator[None]:
    """Set the model up for a look, and give back everything at the end: gradients too."""
    held = [(p, p.grad) for p in model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(restored(model, heard=listener))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        try:
            for module in model.modules():  # not train(): an overridden one may merge weights or freeze layers
                module.training = not drops(module)
            yield
        finally:
            for p, gradient in held:
                p.grad = gradient


def _run(problem: Problem, model: nn.Module, batch: Any, number: int) -> float:
    for p in model.parameters():
        p.grad = None
    output, target = problem.forward(problem.model, batch)
    value = problem.loss(output, target)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        shaped = isinstance(value, torch.Tensor) and value.numel() != 1
        got = f"a tensor of shape {tuple(value.shape)}" if shaped else repr(value)
        raise ArgumentError(
            f"loss: batch {number} gave {got}; it must be a scalar tensor that depends on the parameters."
        )
    mine = [p for p in model.parameters() if p.requires_grad]  # a loss with parameters keeps its own gradients
    value.backward(inputs=mine)  # type: ignore[no-untyped-call]
    return float(value.detach())
