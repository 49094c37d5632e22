"""Trial: one training run of a comparison: made, seeded, attached, timed, and read into a few numbers."""

from __future__ import annotations

import inspect
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from normscope.core.errors import ArgumentError, brief
from normscope.core.finding import Verdict
from normscope.core.record import Record
from normscope.core.schedule import is_sampled
from normscope.core.store import FILE_NAME
from normscope.diagnostics import diagnose
from normscope.linalg.protect import random_states, restored
from normscope.metrics.digest import curve, digest, profile
from normscope.metrics.trial import Trial
from normscope.probes.hooks import Hooks
from normscope.scope.attach import Scope, attach
from normscope.scope.watch import unwrapped

RATE_NAMES = ("lr", "learning_rate")  # of an argument of `fit`
_UNATTACHED = "fit did not call attach: nothing but its metrics is known"


@dataclass(frozen=True)
class Task:
    """A trial to be run.

    Attributes:
        entry: name of the entry.
        make: makes the model; called with seed= where it takes that.
        fit: trains it; called as fit(model, attach), with lr= and seed= where it takes them.
        rate: learning rate, None to leave it to `fit`.
        seed: of weights and data.
        folder: of the record, None to keep it in memory.
        options: settings of `attach` that `fit` may override.
        setting: what it is run with, as text by name.
    """

    entry: str
    make: Callable[..., nn.Module]
    fit: Callable[..., Mapping[str, Any]]
    rate: float | None
    seed: int
    folder: Path | None
    options: Mapping[str, Any]
    setting: Mapping[str, str] = field(default_factory=dict)


def run(task: Task) -> Trial:
    """Run a trial; what the user's functions raise is its reason to have failed.

    Args:
        task: what to run.

    Returns:
        The trial.
    """
    if task.folder is not None:
        _clear(task.folder)
    place: dict[str, Any] = {
        "entry": task.entry,
        "rate": float("nan") if task.rate is None else task.rate,
        "seed": task.seed,
        "setting": dict(task.setting),
    }
    bound = Bound(task.folder, task.options)
    try:
        with random_states(nn.Module()):
            _seed(task.seed)
            model = _made(task)
            _seed(task.seed)  # again: an entry that draws more weights must not see other data
            metrics = _metrics(task.fit(model, bound, **arguments(task)))
            bound.finish()
        measured, notes = bound.measure()
        if bound.scope is None:
            return Trial(**place, metrics=metrics, measured=measured, notes=(*notes, _UNATTACHED))
        record = bound.scope.record()
        told = tuple((f.id, f.verdict.value, f.message) for f in diagnose(record) if f.verdict in _BAD)
        return Trial(
            **place,
            metrics=metrics,
            measured=measured | _numbers(record, told),
            curve=tuple(curve(record)),
            profile=tuple(profile(record)),
            findings=told,
            notes=notes,
        )
    except Exception as error:  # the other trials go on
        return Trial(**place, reason=_reason(error))
    finally:
        bound.finish()


_BAD = (Verdict.FAILURE, Verdict.WARNING)


def _numbers(record: Record, told: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    counts = {f"{word.value}s": float(sum(verdict == word.value for _, verdict, _ in told)) for word in _BAD}
    return digest(record) | counts


def arguments(task: Task) -> dict[str, Any]:
    """Return what `fit` takes of learning rate and seed, by keyword."""
    taken = accepted(task.fit, (*RATE_NAMES, "seed"))
    rates = {name: task.rate for name in RATE_NAMES if name in taken and task.rate is not None}
    return rates | ({"seed": task.seed} if "seed" in taken else {})


def accepted(function: Callable[..., Any], names: Sequence[str]) -> dict[str, inspect.Parameter]:
    """Return those of the names that a function takes by keyword, with what its signature says of them.

    Args:
        function: any callable; of one without a signature nothing is known.
        names: the names.

    Returns:
        Parameters by name; one that takes any keyword takes none of them by name.

    >>> list(accepted(lambda model, attach, lr=0.1: {}, ("lr", "seed")))
    ['lr']
    """
    try:
        found = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: found[name] for name in names if name in found and found[name].kind in keyword}


class Bound:
    """The `attach` that `fit` is given: the usual arguments, the run's folder bound."""

    def __init__(self, folder: Path | None, options: Mapping[str, Any]) -> None:
        """Bind the folder and the settings that `fit` may override."""
        self.folder, self.options = folder, options
        self.scope: Scope | None = None
        self._clock = Clock()
        self._hooks: Hooks | None = None

    def __call__(self, model: nn.Module, optimizer: Any, **options: Any) -> Scope:
        """Attach, as `normscope.attach` does.

        Args:
            model: the model.
            optimizer: its optimizer, or several.
            **options: settings of `attach` but `run`.

        Returns:
            The scope.

        Raises:
            ArgumentError: a run is given, or attach is called twice.
        """
        if "run" in options:
            raise ArgumentError(f"run={options['run']!r}: compare chooses the folder of each run; leave run= out.")
        if self.scope is not None:
            raise ArgumentError("attach was called twice in one call of fit; a trial is one run, attach once.")
        settings = {**self.options, **options}
        self.scope = attach(model, optimizer, run=self.folder, **settings)
        self._clock.every, self._clock.model = settings.get("every", 10), unwrapped(model)
        held = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
        self._hooks = Hooks(self._clock, unwrapped(model), (), held[:1])
        return self.scope

    def finish(self) -> None:
        """Detach, where `fit` has not."""
        if self._hooks is not None:
            self._hooks.remove()
        if self.scope is not None:
            self.scope.close()

    def measure(self) -> tuple[dict[str, float], tuple[str, ...]]:
        """Return steps a second and bytes of saved activations, and notes on what could not be measured."""
        measured = {"throughput": self._clock.throughput()}
        if self._clock.begun is None:
            return measured, ()
        try:
            return measured | {"memory": float(self._clock.begun.saved_bytes())}, ()
        except Exception as error:  # a model that runs only inside the user's loop
            return measured, (f"saved activations were not counted: {type(error).__name__}: {error}",)


@dataclass(frozen=True)
class Pass:
    """The first forward pass of training: the model, what it was called with, and how."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    training: tuple[bool, ...]
    autocast: Mapping[str, torch.dtype]

    def saved_bytes(self) -> int:
        """Run it again and count the bytes that autograd keeps for backward, of storages that are no parameters.

        Without checkpointing all of them are alive at the end of the forward pass, so that this is their peak.

        Returns:
            Bytes; each storage counts once.
        """
        known = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with restored(self.model), torch.enable_grad(), _autocast(self.autocast):
            for module, training in zip(self.model.modules(), self.training, strict=True):
                module.training = training
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = self.model(*self.args, **self.kwargs)
        del output  # it keeps the storages apart until all are counted
        return sum(sizes.values())


@contextmanager
def _autocast(types: Mapping[str, torch.dtype]) -> Iterator[None]:
    for device, dtype in types.items():
        with torch.autocast(device, dtype):
            yield
        return
    yield


class Clock:
    """Hears passes and steps: when each step ends, and what the first training pass was called with."""

    active = False

    def __init__(self) -> None:
        """Begin without a step."""
        self.every = 10
        self.begun: Pass | None = None
        self._ends: list[float] = []
        self.model: nn.Module | None = None

    def on_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> None:
        """Hold what the first training pass was called with."""
        if self.begun is None and training and torch.is_grad_enabled() and self.model is not None:
            kinds = {t.device.type for t in self.model.parameters()}
            types = {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
            modes = tuple(module.training for module in self.model.modules())
            self.begun = Pass(self.model, args, dict(kwargs), modes, types)

    def on_forward(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: object) -> None:
        """Hear nothing of single modules."""

    def before_step(self, optimizer: torch.optim.Optimizer, has_closure: bool) -> None:
        """Hear nothing before a step."""

    def after_step(self, optimizer: torch.optim.Optimizer, has_closure: bool) -> None:
        """Note when a step ends."""
        self._ends.append(time.perf_counter())

    def throughput(self) -> float:
        """Return steps a second: the median over steps that were not sampled, nor followed a sampled one."""
        durations = np.diff(self._ends)
        steps = np.arange(1, len(durations) + 1)
        plain = [not is_sampled(int(i), self.every) and not is_sampled(int(i) - 1, self.every) for i in steps]
        chosen = durations[plain] if any(plain) else durations
        return float(1 / np.median(chosen)) if len(chosen) and np.median(chosen) > 0 else float("nan")


def _made(task: Task) -> nn.Module:
    takes = accepted(task.make, ("seed",))
    model = task.make(**({"seed": task.seed} if takes else {}))
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"makers[{task.entry!r}] returned {brief(model)}; it must return a torch.nn.Module.")
    return model


def _metrics(returned: object) -> dict[str, float]:
    if not isinstance(returned, Mapping) or not returned:
        raise ArgumentError(f"fit returned {brief(returned)}; it must return {{metric: value}} with at least one.")
    try:
        return {
            str(name): float(value.detach() if isinstance(value, torch.Tensor) else value)
            for name, value in returned.items()
        }
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"fit returned {brief(returned)}; every value must be a number ({error}).") from error


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _reason(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"


def _clear(folder: Path) -> None:
    """Take away the record of a run that broke off; nothing else in the folder is touched."""
    for suffix in ("", "-wal", "-shm"):
        Path(folder, f"{FILE_NAME}{suffix}").unlink(missing_ok=True)
