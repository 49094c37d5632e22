"""Background: one thread that takes eigenvalues beside the training; numpy releases the interpreter meanwhile.

Jobs read arrays that nobody else holds and return numbers, so training cannot notice them. The thread starts with the
first job. A process forks only while no job runs: a lock that LAPACK holds at a fork would stay locked in the child.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Key = tuple[str, str]


class Background(Generic[T]):
    """Runs jobs one after the other; what waits is bounded, one job a key."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: deque[tuple[Key, Future[T]]] = deque()
        _ALIVE.add(self)

    def submit(self, key: Key, job: Callable[[], T]) -> None:
        """Add a job; if the last one of the same key still waits, it is waited for: training outruns the thread."""
        last = next((future for known, future in reversed(self._jobs) if known == key), None)
        if last is not None:
            wait((last,))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="normscope")
        self._jobs.append((key, self._pool.submit(job)))

    def finished(self) -> list[tuple[Key, Future[T]]]:
        """Return keys and futures of the jobs that are done, each once, in the order of submission."""
        done = []
        while self._jobs and self._jobs[0][1].done():
            done.append(self._jobs.popleft())
        return done

    def settle(self) -> None:
        """Wait for all jobs and end the thread; a later job begins another."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


_ALIVE: weakref.WeakSet[Background[Any]] = weakref.WeakSet()


def _settle_all() -> None:
    for background in tuple(_ALIVE):
        background.settle()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_settle_all)
