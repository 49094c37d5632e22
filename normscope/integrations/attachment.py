"""Attachment: what the callbacks of all frameworks share: attach when training begins, tell, detach at its end."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from normscope.core.errors import unknown_name
from normscope.core.finding import Finding
from normscope.core.record import Record
from normscope.scope.attach import Scope, attach
from normscope.scope.watch import ranks_of

_OURS = ("model", "optimizer", "run", "resume")


class Sink(Protocol):
    """What takes a record while it grows: see `normscope.integrations.sinks`."""

    def write(self, record: Record, findings: Sequence[Finding] = ()) -> None:
        """Write what is new."""


class Attachment:
    """Attaches to the trainings of one callback, one after another.

    Args:
        run: folder of the record; None keeps it in memory.
        sinks: what gets the record at the end of each epoch and of training.
        settings: other arguments of `normscope.attach`.

    Raises:
        ArgumentError: if attach has no such argument.
    """

    def __init__(self, run: str | Path | None, sinks: Sequence[Sink], settings: Mapping[str, Any]) -> None:
        """Check the settings; nothing is attached yet."""
        options = [name for name in inspect.signature(attach).parameters if name not in _OURS]
        for name in settings:
            if name not in options:
                raise unknown_name("setting", name, options, "It is an argument of normscope.attach.")
        self.run, self.sinks, self.settings = run, tuple(sinks), dict(settings)
        self.scope: Scope | None = None

    def begin(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        first: bool,
        resumed: bool,
        scaler: Any = None,
    ) -> None:
        """Attach; a training that was resumed from a checkpoint goes on with the record that the folder holds.

        Args:
            model: the model, in the wrapper of data parallelism where it is known.
            optimizers: its optimizers.
            first: whether this is the first of several processes; the others attach to a parallel model alone.
            resumed: whether the training was resumed.
            scaler: the gradient scaler, or None.
        """
        self.end()
        if not first and ranks_of(model) == 1:
            return
        settings = {"scaler": scaler, **self.settings}
        self.scope = attach(model, optimizers, run=self.run, resume=resumed and self.run is not None, **settings)

    def publish(self) -> None:
        """Give the sinks what is new."""
        if self.scope is not None and self.sinks:
            record, findings = self.scope.record(), self.scope.findings()
            for sink in self.sinks:
                sink.write(record, findings)

    def end(self, error: BaseException | None = None) -> None:
        """Detach and give the sinks the rest; the scope stays for its findings and its report."""
        if self.scope is not None and not self.scope.closed:
            self.scope.__exit__(None if error is None else type(error), error, None)
            self.publish()
