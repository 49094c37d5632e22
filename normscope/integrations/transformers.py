"""Transformers: a callback for the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from normscope.integrations.attachment import Attachment, Sink
from normscope.scope.attach import Scope


class NormscopeCallback(TrainerCallback):  # type: ignore[misc]  # transformers is no dependency
    """Attaches normscope to the model while the Trainer trains it.

    A training that continues from a checkpoint (`trainer.train(resume_from_checkpoint=)`) goes on with the record of
    `run`. The Trainer tells its loss every `logging_steps` steps, as their mean, and the gradient norm before clipping:
    with `logging_steps=1` the record has both of every step. Of several processes the first one records:
    what all have measured where parameters are sharded, else its own share, as the Trainer hides its wrapper.

    Args:
        run: folder of the record; None keeps it in memory.
        sinks: `normscope.integrations.sinks` that get the record at the end of each epoch and of training.
        **settings: every, layers, probes, problem, scaler, reduction: see `normscope.attach`. In float16 pass
            scaler=trainer.accelerator.scaler, by `trainer.add_callback`.

    Attributes:
        scope: the scope of the current or the last training, None before; `callback.scope.findings()`, `.report()`.

    An unknown setting is an ArgumentError.
    """

    def __init__(self, run: str | Path | None = None, *, sinks: Sequence[Sink] = (), **settings: Any) -> None:
        """Check the settings; see the class."""
        self._attachment = Attachment(run, sinks, settings)

    @property
    def scope(self) -> Scope | None:
        """The scope of the current or the last training."""
        return self._attachment.scope

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach: checkpoints are loaded and the optimizer made."""
        self._attachment.begin(
            kwargs["model"],
            (kwargs["optimizer"],),
            first=state.is_world_process_zero,
            resumed=state.global_step > 0,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Tell the loss and the gradient norm that the Trainer logs of its steps."""
        if self.scope is not None and logs and "loss" in logs:
            self.scope.step(loss=logs["loss"], grad_norm=logs.get("grad_norm"))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the sinks what is new."""
        self._attachment.publish()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach."""
        self._attachment.end()
