"""Attach: one line that watches a training run, and the scope that it returns."""

from __future__ import annotations

import atexit
import numbers
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import normscope  # what judges is resolved when asked for: it loads pandas and scipy, training should not
from normscope.core.errors import ArgumentError
from normscope.core.table import Findings
from normscope.linalg.problem import Problem
from normscope.probes.hooks import Hooks
from normscope.probes.ranks import whole
from normscope.scope import terminate
from normscope.scope.session import Session
from normscope.scope.watch import Layers, ranks_of, unwrapped, watch

if TYPE_CHECKING:
    from normscope.core.record import Record


class Scope:
    """A running attachment: `findings()`, `report()`, `record()`, `step()`, `close()`; made by `attach`."""

    def __init__(self, session: Session, hooks: Hooks, path: Path | None, summary: str) -> None:
        """Hold the parts; use `attach`."""
        self._session, self._hooks, self._path, self._summary = session, hooks, path, summary
        self._closed = False
        atexit.register(self._at_exit)
        if path is not None:
            terminate.close_on_terminate(self)

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._closed

    def step(self, loss: Any = None, grad_norm: Any = None, batch: int | None = None) -> None:
        """Tell what normscope cannot see; optional. Call it before or after the optimizer's step.

        Of several ranks each tells its own loss and batch; what only some tell is taken as well.

        Args:
            loss: the loss, a number or a scalar tensor; a tensor is not waited for.
            grad_norm: norm of the parameter gradients before clipping, as `clip_grad_norm_` returns it.
            batch: number of samples, where it is not the first dimension of the model's first input.

        What is not a single number is an ArgumentError.
        """
        if not self._closed:
            values = {"loss": _number("loss", loss), "grad_norm": _number("grad_norm", grad_norm)}
            self._session.annotate(values | {"batch_size": _number("batch", batch)})

    def measured(self, module: str, **values: float) -> None:
        """Add numbers of your own about a module at the step in progress, if it is a sampled one.

        They are found where normscope's own are: `record.series("MODULE/mine", NAME)`. Call it within the step, from a
        hook or the loop, before the optimizer's step, once for each module.

        Args:
            module: path of the module, as "layer1.conv"; "" for the whole model.
            values: the numbers, by name.

        What is not a single number is an ArgumentError.
        """
        if self._closed or not self._session.active or not values:
            return
        self._session.tell(module, {name: float(_number(name, value)) for name, value in values.items()})

    def record(self) -> Record:
        """Return what has been recorded so far."""
        if not self._closed:
            self._session.settle()
            self._session.flush()
        elif self._path is not None:
            return normscope.load(self._path)
        return self._session.store.record()

    def findings(self) -> Findings:
        """Judge what has been recorded so far: findings, worst first, in a list that prints as a table.

        Returns:
            The findings; of several ranks the first one has them, the others none.
        """
        return normscope.diagnose(self.record()) if self._session.writes else Findings()

    def report(self, path: str | Path | None = None) -> Path:
        """Write report.html with its Markdown and JSON twins beside it; of several ranks the first one does.

        Args:
            path: the page; report.html in the run's folder by default.

        Returns:
            The path of the page.

        Raises:
            ArgumentError: if the run is kept in memory and no path is given.
        """
        if not self._session.writes:
            return Path("report.html" if path is None else path)
        if path is None and self._path is None:
            raise ArgumentError("path=None: a run kept in memory has no folder; pass a path, as 'report.html'.")
        record = self.record()
        return normscope.write_report(
            record, normscope.diagnose(record), path if path is not None else Path(str(self._path), "report.html")
        )

    def close(self) -> None:
        """Detach: remove every hook, write what waits. A second call does nothing."""
        self._close(measure=True)

    def _at_exit(self) -> None:
        if not self._session.forked:
            self._session.leave()
        self.close()

    def end(self) -> None:
        """Detach and write what waits, without a last measurement: for a process that is to go at once."""
        self._close(measure=False)

    def _close(self, measure: bool) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        terminate.closed(self)
        if self._session.forked:  # the record and the hooks are the parent's
            return
        self._hooks.remove()
        self._session.finish(measure)
        if self._path is not None:  # a record in memory stays as long as its scope
            self._session.store.close()

    def __enter__(self) -> Scope:
        """Return the scope; it is attached already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach, also when the loop raised."""
        self._close(measure=kind is None)

    def __repr__(self) -> str:
        """Say what is attached and how far it is."""
        state = "closed" if self._closed else "attached"
        where = str(self._path) if self._path else "memory"
        return (
            f"Scope({self._summary}, {state}, step {self._session.step}, every {self._session.every}, run in {where})"
        )


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    run: str | Path | None = None,
    every: int = 10,
    layers: Layers | None = None,
    probes: str | Iterable[str] | None = None,
    problem: Problem | None = None,
    scaler: Any = None,
    reduction: str = "mean",
    resume: bool = False,
) -> Scope:
    """Attach to a training run; nothing else in it changes.

    Steps are counted by the optimizers' own step hooks. On sampled steps per-channel statistics of every layer's output
    and of its gradient, norms of weights, gradients and updates, and the state of normalization layers are recorded; on
    every step the gradient norm. A flight recorder holds the norms of each parameter tensor, of its gradient and its
    step, for the last 256 steps and those around a jump of the loss; see `normscope explain`. Training is bit-identical
    with and without. A SIGTERM that nobody handles closes the record, and ends the process as it would have.

    Under DistributedDataParallel, or after fully_shard, attach on every rank: the first one writes the record, of all
    ranks' samples together, as one process on the joined batch would; held batches, attention, the
    largest tokens, and what only some ranks measure, are the first one's.

    Args:
        model: the model.
        optimizer: its optimizer, or several; with several a step ends when all have stepped.
        run: folder of the record, new unless `resume`; None keeps it in memory.
        every: a step is sampled if its index is a multiple of this.
        layers: which modules to watch: a glob over module paths ("layer3.*"), a module type, or a sequence of these; a
            match brings the modules below it. All by default.
        probes: which of "moments", "tails", "parameters", "flight", "normalization", "attention", "covariance",
            "curvature", "invariance", "noise", "noise-scale", "population"; all by default. On request, with
            "covariance": "correlation" for the correlations of each layer's input, "patches" for the second moment of
            the patches that convolutions see.
        problem: loss and held batches for what compares training with evaluation and a weight with its double, and for
            the curvature of the loss.
        scaler: the `torch.amp.GradScaler`, so that its scale is undone and skipped steps are known.
        reduction: how the loss joins the samples of a batch, "mean" or "sum".
        resume: if the folder holds a run of this model already, go on with it: its steps are kept, and those to come
            are counted on from the last of them.

    Returns:
        The scope; a context manager that detaches at its end.

    Raises:
        ArgumentError: if an argument cannot work. A run that cannot be written is a StoreError.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model={type(model).__name__} must be a torch.nn.Module.")
    size, model = ranks_of(model), unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError(
            f"model={type(model).__name__} is scripted and takes no hooks; attach to the module it was made from."
        )
    optimizers = _checked_optimizers(model, optimizer)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ArgumentError(f"every={every!r} must be a whole number of steps, at least 1; the default is 10.")
    if problem is not None and not isinstance(problem, Problem):
        raise ArgumentError(
            f"problem={type(problem).__name__} must be normscope.Problem(model, loss, batches), or None."
        )
    if problem is not None and unwrapped(problem.model) is not model:
        raise ArgumentError(
            f"problem holds another model, a {type(problem.model).__name__}; make it from the model that is attached "
            "to, and pass forward=lambda model, batch: (output, target) if its call differs."
        )
    if scaler is not None and not hasattr(scaler, "get_scale"):
        raise ArgumentError(f"scaler={type(scaler).__name__} must be a torch.amp.GradScaler, or None.")
    if not isinstance(resume, bool) or (resume and run is None):
        raise ArgumentError(
            f"resume={resume!r} must be True, with run= the folder of the run to go on with, or False to begin one."
        )
    watched = watch(
        model,
        optimizers,
        run=run,
        every=every,
        layers=layers,
        probes=probes,
        problem=problem,
        scaler=scaler,
        reduction=reduction,
        resume=resume,
        size=size,
    )
    return Scope(*watched)


def _number(argument: str, value: Any) -> Any:
    """Return a number, or a copy of a tensor that holds one, which is not waited for."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        held = whole(value)  # of a norm of shards that was not summed nothing is known
        return None if held is None else held.clone()
    if value is None or isinstance(value, numbers.Real):
        return value if value is None else float(value)
    raise ArgumentError(f"{argument}={value!r} must be a number or a tensor of one element, or None.")


def _inner(optimizer: Any) -> Any:
    """Return the optimizer behind a wrapper without step hooks of its own, as those of Accelerate and Lightning."""
    wrapped = getattr(optimizer, "optimizer", None)
    if not isinstance(wrapped, torch.optim.Optimizer):
        return optimizer
    inner = _inner(wrapped)
    theirs = getattr(inner, "_optimizer_step_pre_hooks", None)
    return inner if getattr(optimizer, "_optimizer_step_pre_hooks", theirs) is theirs else optimizer


def _checked_optimizers(model: nn.Module, optimizer: object) -> tuple[torch.optim.Optimizer, ...]:
    optimizers = tuple(map(_inner, optimizer if isinstance(optimizer, (list, tuple)) else (optimizer,)))
    if not optimizers:
        raise ArgumentError("optimizer=() is empty; pass the optimizer, or all that step together.")
    if len({id(item) for item in optimizers}) < len(optimizers):
        raise ArgumentError("optimizer: the same optimizer is there twice; pass each once.")
    held = {id(p) for p in model.parameters()}
    if not held:
        raise ArgumentError(f"model={type(model).__name__} has no parameters, so nothing trains.")
    for item in optimizers:
        if not isinstance(item, torch.optim.Optimizer):
            raise ArgumentError(
                f"optimizer={type(item).__name__} must be a torch.optim.Optimizer or a sequence of them."
            )
        if not hasattr(item, "_optimizer_step_pre_hooks"):
            raise ArgumentError(
                f"optimizer={type(item).__name__} has no step hooks, as it does not call "
                "torch.optim.Optimizer.__init__; pass the optimizer that it wraps."
            )
        if not any(id(p) in held for group in item.param_groups for p in group["params"]):
            raise ArgumentError(
                f"optimizer={type(item).__name__} holds none of the model's {len(held)} parameters: it belongs to "
                "another model, or the model's parameters were replaced after it was made. Make the optimizer from "
                "model.parameters()."
            )
    return optimizers
