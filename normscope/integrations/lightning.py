"""Lightning: a callback for `lightning.pytorch` and for `pytorch_lightning`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from normscope.integrations.attachment import Attachment, Sink
from normscope.scope.attach import Scope

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback  # type: ignore[assignment]


class NormscopeCallback(Callback):  # type: ignore[misc]  # Lightning is no dependency
    """Attaches normscope to the module while the trainer fits it.

    A fit that continues from a checkpoint (`trainer.fit(..., ckpt_path=)`) goes on with the record of `run`. The loss
    is that of the step, the mean where gradients are accumulated; the gradient scaler is the trainer's. Of several
    processes the first one records, what all have measured.

    Args:
        run: folder of the record; None keeps it in memory.
        sinks: `normscope.integrations.sinks` that get the record at the end of each epoch and of the fit.
        **settings: every, layers, probes, problem, scaler, reduction: see `normscope.attach`.

    Attributes:
        scope: the scope of the current or the last fit, None before; `callback.scope.findings()`, `.report()`.

    An unknown setting is an ArgumentError.
    """

    def __init__(self, run: str | Path | None = None, *, sinks: Sequence[Sink] = (), **settings: Any) -> None:
        """Check the settings; see the class."""
        super().__init__()
        self._attachment = Attachment(run, sinks, settings)
        self._loss: torch.Tensor | None = None
        self._step = 0

    @property
    def scope(self) -> Scope | None:
        """The scope of the current or the last fit."""
        return self._attachment.scope

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: checkpoints are restored and optimizers made."""
        self._loss, self._step = None, trainer.global_step
        self._attachment.begin(
            trainer.model if isinstance(trainer.model, DistributedDataParallel) else pl_module,
            trainer.optimizers,
            first=trainer.is_global_zero,
            resumed=trainer.global_step > 0,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell the loss of a step when it has been taken: the sum over its batches, each divided by their number."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if trainer.global_step != self._step:
            if self.scope is not None:
                self.scope.step(loss=self._loss)
            self._loss, self._step = None, trainer.global_step

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the sinks what is new."""
        self._attachment.publish()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach."""
        self._attachment.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach from a fit that broke off."""
        self._attachment.end(exception)
