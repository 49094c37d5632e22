"""Together: what a session exchanges with those of the other ranks, and what it makes do with once it is alone.

Every rank samples the same steps, so all come to an exchange at the same place of the training. What has been summed
is that of one process on the joined batch. A rank that is alone, because the others did not attach, are at another step
or were lost, goes on with what it measures itself: its share of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from normscope.probes.joining import Item, joined
from normscope.probes.ranks import LostError, Ranks
from normscope.probes.transfer import to_host

LAST_PATIENCE = 10.0  # seconds for which the end of a run waits for the others

Step = dict[str, Any]  # what is known of a step, as `Store.step` takes it


class Together:
    """The exchanges of one session.

    Args:
        ranks: the ranks.
        sharded: whether each rank holds a part of the parameters.
        tell: what to do with a message about the ranks.
    """

    def __init__(self, ranks: Ranks, sharded: bool, tell: Callable[[str], None]) -> None:
        """Start with nothing exchanged; see the class."""
        self._ranks, self._sharded, self._tell = ranks, sharded, tell
        self._waiting: list[Step] = []  # steps whose sums are not known
        self._last: Step | None = None  # the last of the exchange before: its loss may have been told since
        self._differed = False

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._ranks.size

    @property
    def writes(self) -> bool:
        """Whether this rank writes the record."""
        return self._ranks.rank == 0

    @property
    def waiting(self) -> int:
        """Number of steps whose sums are not known."""
        return len(self._waiting)

    def hold(self, row: Step) -> None:
        """Keep a step until its sums are known."""
        self._waiting.append(row)

    def holds(self, row: Step) -> bool:
        """Tell whether a step will come out of an exchange."""
        return any(row is known for known in (*self._waiting, self._last))

    def leave(self) -> None:
        """Exchange nothing any more."""
        self._ranks.leave()

    def exchange(self, step: int, items: Sequence[Item] = ()) -> tuple[list[np.ndarray | None], list[Step]]:
        """Join what all ranks have measured, and sum what they know of the steps since the last time.

        Args:
            step: the step.
            items: states of this rank.

        Returns:
            The joint states, that of this rank where another has none, None for a part of a sum whose rest is missing;
            and the steps to be written. The loss of the last one is this rank's until the next exchange.
        """
        return self._exchange(step, items, ends=False)

    def finish(self, step: int, items: Sequence[Item] = ()) -> tuple[list[np.ndarray | None], list[Step]]:
        """Exchange what still waits, as `exchange` does, if the others answer soon, and leave."""
        self._ranks.patience = LAST_PATIENCE
        waits = self._waiting or self._last is not None
        own: list[np.ndarray | None] = [item.state for item in items]
        found = self._exchange(step, items, ends=True) if waits else (own, [])
        self._ranks.end()
        return found

    @np.errstate(all="ignore")  # a diverged run holds infinities
    def _exchange(self, step: int, items: Sequence[Item], ends: bool) -> tuple[list[np.ndarray | None], list[Step]]:
        rows, self._waiting = self._waiting, []
        own = [isinstance(row["grad_norm"], list) for row in rows]
        on_host(rows)
        told = [*([] if self._last is None else [self._last]), *(rows if ends else rows[:-1])]
        losses = np.array([[row["loss"] or 0.0, row["loss"] is not None] for row in told]).reshape(-1, 2)
        sizes = np.array([[row["batch_size"] or 0, row["grad_norm"] or 0.0] for row in rows]).reshape(-1, 2)
        sizes[:, 1] **= 2
        offered = [Item("losses", "sum", losses), Item(f"steps {ends}", "sum", sizes), *items]
        states, missing = self._joined(offered, step)
        found = [None if place in missing and offered[place].kind == "sum" else s for place, s in enumerate(states)]
        for row, (total, number) in zip(told, losses if found[0] is None else found[0], strict=True):
            row["loss"] = total / number if number else None
        for row, mine, (batch, square) in zip(rows, own, sizes if found[1] is None else found[1], strict=True):
            alone = found[1] is None
            row["batch_size"] = int(batch * (self.size if alone else 1)) or None
            if self._sharded and mine:
                row["grad_norm"] = None if alone else math.sqrt(square) if square >= 0 else square
        written = [*([] if self._last is None else [self._last]), *rows]
        self._last = rows[-1] if rows and not ends else None
        return found[2:], written

    def _joined(self, items: Sequence[Item], step: int) -> tuple[list[np.ndarray], list[int]]:
        """Return joint states, and the places of those that are this rank's own."""
        alone: tuple[list[np.ndarray], list[int]] = [item.state for item in items], list(range(len(items)))
        try:
            self._ranks.join()
            if not self._ranks.together:
                return alone
            states, missing = joined(self._ranks, items, step)
        except LostError as error:
            self._tell(f"from step {step} on rank {self._ranks.rank} of {self.size} measures alone: {error}")
            return alone
        if missing and not self._differed:
            self._differed = True
            self._tell(
                f"the ranks measured different things at step {step}, as {items[missing[0]].key}: what not all have is "
                "recorded as rank 0 has it"
            )
        return states, missing


def on_host(rows: Sequence[Step], more: Sequence[torch.Tensor] = ()) -> list[np.ndarray]:
    """Turn tensors in steps into numbers, and a list of squares into the root of their sum.

    Args:
        rows: the steps.
        more: further tensors, for the same transfer.

    Returns:
        These on the host.
    """
    items = ((row, name, value) for row in rows for name, value in row.items())
    waiting = [item for item in items if isinstance(item[2], (list, torch.Tensor))]
    tensors = [value if isinstance(value, list) else [value] for _, _, value in waiting]
    host = iter(to_host([*(t.reshape(-1)[:1] for group in tensors for t in group), *more]))
    for (row, name, _), group in zip(waiting, tensors, strict=True):
        total = sum(float(next(host)[0]) for _ in group)
        row[name] = math.sqrt(total) if isinstance(row[name], list) and total >= 0 else total
    return list(host)
