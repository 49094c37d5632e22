"""Sinks: the scalars and findings of a record in the tracker that is in use already; each write adds what is new."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import pandas as pd

from normscope.core.errors import ArgumentError
from normscope.core.finding import Finding, Verdict, worst_first
from normscope.core.record import Record
from normscope.metrics import conditioning, tables

_CONTEXT = {"loss": "loss", "grad_norm": "gradient_norm", "lr": "learning_rate"}


class RecordSink(ABC):
    """Writes what a record has of new steps, under `normscope/`.

    These are loss, gradient norm and learning rate; of each layer the rms of its output (signal) and of its gradient,
    kappa50 of its input, and the angle by which the step turns each weight; and the number of findings of each verdict.

    Args:
        layers: glob over module paths, as "layer3.*".
    """

    def __init__(self, layers: str = "*") -> None:
        """Begin with nothing written; see the class."""
        self.layers = layers
        self._last: dict[str, int] = {}  # by tag: eigenvalues are known later than the rest of their step

    def write(self, record: Record, findings: Sequence[Finding] = ()) -> None:
        """Write what was not written before.

        Args:
            record: the record so far of one run, as `scope.record()` or `normscope.load`.
            findings: what is judged of it, as `scope.findings()`.
        """
        steps: dict[int, dict[str, float]] = {}
        for tag, series in _scalars(record, self.layers).items():
            fresh = series[series.index > self._last.get(tag, -1)].dropna()
            for step, value in zip(fresh.index.tolist(), fresh.tolist(), strict=True):
                steps.setdefault(step, {})[f"normscope/{tag}"] = value
                self._last[tag] = step
        for step in sorted(steps):
            self._write_scalars(step, steps[step])
        if findings and self._last:
            self._write_findings(max(self._last.values()), findings)

    @abstractmethod
    def _write_scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    @abstractmethod
    def _write_findings(self, step: int, findings: Sequence[Finding]) -> None: ...


class TensorBoardSink(RecordSink):
    """Writes into a `torch.utils.tensorboard.SummaryWriter`, or tensorboardX's: anything with add_scalar and add_text.

    Args:
        writer: the writer.
        layers: glob over module paths, as "layer3.*".

    Raises:
        ArgumentError: if it has no such methods.
    """

    def __init__(self, writer: Any, layers: str = "*") -> None:
        """Check the writer; see the class."""
        super().__init__(layers)
        if not (hasattr(writer, "add_scalar") and hasattr(writer, "add_text")):
            raise ArgumentError(
                f"writer={type(writer).__name__} has no add_scalar and add_text; pass a "
                "torch.utils.tensorboard.SummaryWriter, or use LoggerSink for what has .log(values, step=)."
            )
        self.writer = writer

    def _write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def _write_findings(self, step: int, findings: Sequence[Finding]) -> None:
        self._write_scalars(step, _counts(findings))
        self.writer.add_text("normscope/findings", _told(findings), step)


class LoggerSink(RecordSink):
    """Writes into anything with `.log(values, step=)`: a Weights & Biases run, an `accelerate.Accelerator`, your own.

    A W&B run drops steps that are older than its own last one. Where you log to it yourself, pass `steps=False`, and
    `run.define_metric("normscope/*", step_metric="normscope/step")`: the step is then logged as a value.

    Args:
        logger: the logger.
        layers: glob over module paths, as "layer3.*".
        steps: whether to pass `step=`; "normscope/step" is among the values either way.

    Raises:
        ArgumentError: if it has no such method.
    """

    def __init__(self, logger: Any, layers: str = "*", *, steps: bool = True) -> None:
        """Check the logger; see the class."""
        super().__init__(layers)
        if not callable(getattr(logger, "log", None)):
            raise ArgumentError(
                f"logger={type(logger).__name__} has no log(values, step=); pass a W&B run, an Accelerator or "
                "the like, or use TensorBoardSink for a SummaryWriter."
            )
        self.logger, self.steps = logger, steps

    def _write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        place = {"step": step} if self.steps else {}
        self.logger.log({**values, "normscope/step": step}, **place)

    def _write_findings(self, step: int, findings: Sequence[Finding]) -> None:
        self._write_scalars(step, _counts(findings))


def _scalars(record: Record, layers: str) -> dict[str, pd.Series]:
    """Return series by tag, indexed by step."""
    context = tables.context(record)
    found = {f"run/{name}": context[column] for column, name in _CONTEXT.items()}
    frames = {
        "signal_rms": tables.table(record, "rms"),
        "gradient_rms": tables.table(record, "rms", role="gradient"),
        "kappa50": conditioning.condition_numbers(record),
        "angle": tables.table(record, "angle", slot="*", role="update"),
    }
    for name, frame in frames.items():
        for site in map(str, frame):
            if fnmatchcase(tables.module_of(site), layers):
                found[f"{name}/{site}"] = frame[site]
    return found


def _counts(findings: Sequence[Finding]) -> dict[str, float]:
    return {f"normscope/findings/{v.value}": float(sum(f.verdict is v for f in findings)) for v in Verdict}


def _told(findings: Sequence[Finding]) -> str:
    """Write the findings that are not ok as Markdown."""
    worst = [finding for finding in worst_first(findings) if finding.verdict is not Verdict.OK]
    lines = [f"- **{f.verdict.value}** `{f.id}` {f'`{f.site}`' if f.site else ''}: {f.message}" for f in worst]
    return "\n".join(lines) or "All is ok."
