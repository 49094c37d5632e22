"""Attach: one line that watches a training run, and the scope that it returns."""

from __future__ import annotations

import atexit
import numbers
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import normscope  # what judges is resolved when asked for: it loads pandas and scipy, training should not
from normscope.core.errors import ArgumentError, unknown_name
from normscope.core.store import Store, check_run
from normscope.linalg.problem import Problem
from normscope.norms.recognize import find_norms
from normscope.probes import parameters
from normscope.probes.hooks import Hooks
from normscope.scope.session import ON_REQUEST, PROBES, Session

if TYPE_CHECKING:
    from normscope.core.finding import Finding
    from normscope.core.record import Record

Layers = str | type[nn.Module] | Iterable[str | type[nn.Module]]


class Scope:
    """A running attachment: `findings()`, `report()`, `record()`, `step()`, `close()`; made by `attach`."""

    def __init__(self, session: Session, hooks: Hooks, path: Path | None, summary: str) -> None:
        """Hold the parts; use `attach`."""
        self._session, self._hooks, self._path, self._summary = session, hooks, path, summary
        self._closed = False
        atexit.register(self.close)

    def step(self, loss: Any = None, grad_norm: Any = None, batch: int | None = None) -> None:
        """Tell what normscope cannot see; optional. Call it before or after the optimizer's step.

        Args:
            loss: the loss, a number or a scalar tensor; a tensor is not waited for.
            grad_norm: norm of the parameter gradients before clipping, as `clip_grad_norm_` returns it.
            batch: number of samples, where it is not the first dimension of the model's first input.

        What is not a single number is an ArgumentError.
        """
        if not self._closed:
            values = {"loss": _number("loss", loss), "grad_norm": _number("grad_norm", grad_norm)}
            self._session.annotate(values | {"batch_size": _number("batch", batch)})

    def record(self) -> Record:
        """Return what has been recorded so far."""
        if not self._closed:
            self._session.settle()
            self._session.flush()
        elif self._path is not None:
            return normscope.load(self._path)
        return self._session.store.record()

    def findings(self) -> list[Finding]:
        """Judge what has been recorded so far: findings, worst first."""
        return normscope.diagnose(self.record())

    def report(self, path: str | Path | None = None) -> Path:
        """Write report.html with its Markdown and JSON twins beside it.

        Args:
            path: the page; report.html in the run's folder by default.

        Returns:
            The path of the page.

        Raises:
            ArgumentError: if the run is kept in memory and no path is given.
        """
        if path is None and self._path is None:
            raise ArgumentError("path=None: a run kept in memory has no folder; pass a path, as 'report.html'.")
        record = self.record()
        return normscope.write_report(
            record, normscope.diagnose(record), path if path is not None else Path(str(self._path), "report.html")
        )

    def close(self) -> None:
        """Detach: remove every hook, write what waits. A second call does nothing."""
        self._close(measure=True)

    def _close(self, measure: bool) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
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
) -> Scope:
    """Attach to a training run; nothing else in it changes.

    Steps are counted by the optimizers' own step hooks. On sampled steps per-channel statistics of every layer's output
    and of its gradient, norms of weights, gradients and updates, and the state of normalization layers are recorded; on
    every step the gradient norm. Training is bit-identical with and without.

    Args:
        model: the model.
        optimizer: its optimizer, or several; with several a step ends when all have stepped.
        run: folder of the record, new; None keeps it in memory.
        every: a step is sampled if its index is a multiple of this.
        layers: which modules to watch: a glob over module paths ("layer3.*"), a module type, or a sequence of these; a
            match brings the modules below it. All by default.
        probes: which of "moments", "tails", "parameters", "normalization", "covariance", "invariance", "noise",
            "noise-scale", "population"; all by default. On request "correlation", with "covariance": the correlations
            of each layer's input.
        problem: loss and held batches for what compares training with evaluation, and a weight with its double.
        scaler: the `torch.amp.GradScaler`, so that its scale is undone and skipped steps are known.
        reduction: how the loss joins the samples of a batch, "mean" or "sum".

    Returns:
        The scope; a context manager that detaches at its end.

    Raises:
        ArgumentError: if an argument cannot work. A run that cannot be written is a StoreError.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model={type(model).__name__} must be a torch.nn.Module.")
    model = _unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError(
            f"model={type(model).__name__} is scripted and takes no hooks; attach to the module it was made from."
        )
    optimizers = _checked_optimizers(model, optimizer)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ArgumentError(f"every={every!r} must be a whole number of steps, at least 1; the default is 10.")
    _check_reduction(reduction)
    if problem is not None and not isinstance(problem, Problem):
        raise ArgumentError(
            f"problem={type(problem).__name__} must be normscope.Problem(model, loss, batches), or None."
        )
    if problem is not None and _unwrapped(problem.model) is not model:
        raise ArgumentError(
            f"problem holds another model, a {type(problem.model).__name__}; make it from the model that is attached "
            "to, and pass forward=lambda model, batch: (output, target) if its call differs."
        )
    if scaler is not None and not hasattr(scaler, "get_scale"):
        raise ArgumentError(f"scaler={type(scaler).__name__} must be a torch.amp.GradScaler, or None.")
    chosen = _checked_probes(probes)
    modules = _selected(model, layers)
    norms = {name: parts for name, parts in find_norms(model).items() if name in modules}
    owned = {name: p for name, p in parameters.named(model).items() if _owner(name) in modules}
    check_run(run)
    path = None if run is None else Path(run).resolve()  # the program may change its folder
    name = "run" if path is None else path.name
    facts = {
        "every": every,
        "reduction": reduction,
        "probes": list(chosen),
        "problem": problem is not None,
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters.named(model).values() if not is_lazy(p)),
        "modules": len(modules),
        "norms": len(norms),
    }
    store = Store(path, name, _provenance(model) | facts)
    session = Session(
        modules,
        norms,
        owned,
        optimizers,
        store,
        every=every,
        probes=chosen,
        problem=problem,
        scaler=scaler,
        reduction=reduction,
    )
    hooks = Hooks(session, model, modules.items(), optimizers)
    return Scope(session, hooks, path, f"{type(model).__name__}, {len(modules)} modules, {len(norms)} norms")


def _number(argument: str, value: Any) -> Any:
    """Return a number, or a copy of a tensor that holds one, which is not waited for."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach().clone()
    if value is None or isinstance(value, numbers.Real):
        return value if value is None else float(value)
    raise ArgumentError(f"{argument}={value!r} must be a number or a tensor of one element, or None.")


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module behind torch.compile's wrapper, whose names and hooks are the user's."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def _checked_optimizers(model: nn.Module, optimizer: object) -> tuple[torch.optim.Optimizer, ...]:
    optimizers = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
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


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise unknown_name("reduction", reduction, ("mean", "sum"), "It says how the loss joins the samples.")


def _checked_probes(probes: str | Iterable[str] | None) -> tuple[str, ...]:
    if probes is None:
        return PROBES
    options = PROBES + ON_REQUEST
    if not isinstance(probes, Iterable):
        raise ArgumentError(f"probes={probes!r} must be a name or a sequence of names; options: {', '.join(options)}.")
    chosen = (probes,) if isinstance(probes, str) else tuple(probes)
    for probe in chosen:
        if probe not in options:
            raise unknown_name("probes", probe, options)
    if not chosen:
        raise ArgumentError(f"probes=() is empty; options: {', '.join(options)}; None takes all.")
    return chosen


def _selected(model: nn.Module, layers: Layers | None) -> dict[str, nn.Module]:
    """Return the watched modules by name: no parametrizations, whose outputs are weights."""
    modules = {
        name: module
        for name, module in model.named_modules()
        if "parametrizations" not in name.split(".") and not isinstance(module, torch.jit.ScriptModule)
    }
    if layers is None:
        return modules
    wanted = (layers,) if isinstance(layers, (str, type)) or not isinstance(layers, Iterable) else tuple(layers)
    if not wanted:
        raise ArgumentError(f"layers={layers!r} is empty; None watches all layers.")
    roots: set[str] = set()
    for want in wanted:
        if isinstance(want, str):
            found = {name for name in modules if fnmatchcase(name, want)}
        elif isinstance(want, type) and issubclass(want, nn.Module):
            found = {name for name, module in modules.items() if isinstance(module, want)}
        else:
            raise ArgumentError(f"layers={want!r} must be a glob over module paths or a subclass of torch.nn.Module.")
        if not found:
            options = sorted({*modules, *(type(module).__name__ for module in modules.values())} - {""})
            raise unknown_name("layers", want, options, "It matches no module; a glob is matched against whole paths.")
        roots |= found
    return {name: module for name, module in modules.items() if any(_below(name, root) for root in roots)}


def _below(name: str, root: str) -> bool:
    return name == root or not root or name.startswith(root + ".")


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0].partition(".parametrizations")[0]


def _provenance(model: nn.Module) -> dict[str, object]:
    device = next((str(p.device) for p in model.parameters()), "cpu")
    return {
        "versions": {
            "normscope": _version("normscope"),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "seed": torch.initial_seed(),
        "device": device,
        "threads": torch.get_num_threads(),
        "revision": _revision(),
        "command": " ".join(sys.argv),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _revision() -> str:
    command = ("git", "rev-parse", "--short", "HEAD")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
