"""Trigger: which steps of the flight recorder are kept for good, beyond the last ones."""

from __future__ import annotations

import math
from collections import deque

from normscope.core.robust import MIN_HISTORY, WINDOW, logarithm, robust_z
from normscope.core.schedule import RING

FIRES = 6.0  # robust standard deviations of log loss or log gradient norm; what is kept is judged later
AFTER = 64  # steps that are kept after one that fires
MOST = 16  # times that it fires in a run


class Trigger:
    """Watches loss and gradient norm, and says which steps may be forgotten.

    A step fires where one of them is not finite, or more than `FIRES` robust standard deviations above the `WINDOW`
    steps before it. The `RING` steps up to it and the `AFTER` steps that follow are then kept.

    Args:
        step: the first step that it sees.
    """

    def __init__(self, step: int) -> None:
        """Start with nothing seen; see the class."""
        self._seen: tuple[deque[float], ...] = (deque(maxlen=WINDOW), deque(maxlen=WINDOW))
        self._kept: list[tuple[int, int]] = []  # first and last step, in order
        self._next = step

    def see(self, step: int, loss: float | None, grad_norm: float | None) -> None:
        """Look at a step that has ended.

        Args:
            step: its index.
            loss: its loss, None where it is not known.
            grad_norm: its gradient norm, None where it is not known.
        """
        fires = False
        for value, seen in zip((loss, grad_norm), self._seen, strict=True):
            if value is None:
                continue
            if not math.isfinite(value):
                fires = True
                continue
            log = logarithm(value)
            fires |= len(seen) >= MIN_HISTORY and robust_z(log, seen) > FIRES
            seen.append(log)
        last = self._kept[-1][1] if self._kept else -1
        if fires and step > last and len(self._kept) < MOST:
            self._kept.append((max(step - RING + 1, last + 1), step + AFTER))

    def passed(self, step: int) -> list[tuple[int, int]]:
        """Return the steps that may be forgotten now and were not named before.

        Args:
            step: the last step that has ended.

        Returns:
            First and last step of each stretch, those within `RING` of `step` and those kept left out.
        """
        end, stretches = step - RING, []
        for first, last in (*self._kept, (end + 1, end + 1)):
            if self._next < min(first, end + 1):
                stretches.append((self._next, min(first, end + 1) - 1))
            self._next = max(self._next, min(last + 1, end + 1))
        return stretches
