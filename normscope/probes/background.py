"""Background: one thread that takes eigenvalues beside the training; numpy releases the interpreter meanwhile.

Jobs read arrays that nobody else holds and return numbers, so training cannot notice them. The thread starts with the
first job; where none can be had, as at the end of the interpreter, a job runs at once. A process forks only while no
job runs, from whichever thread: a lock that LAPACK holds at a fork would stay locked in the child.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_LOCK = threading.RLock()  # held while a job is submitted, while all are waited for, and during a fork


class Background(Generic[T]):
    """Runs jobs one after the other; what waits is bounded, one job a key."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: deque[tuple[Hashable, Future[T]]] = deque()
        _ALIVE.add(self)

    def submit(self, key: Hashable, job: Callable[[], T]) -> None:
        """Add a job; if the last one of the same key still waits, it is waited for: training outruns the thread."""
        with _LOCK:
            last = next((future for known, future in reversed(self._jobs) if known == key), None)
            if last is not None:
                wait((last,))
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="normscope")
            try:
                future = self._pool.submit(job)
            except RuntimeError:  # no thread can be started any more
                self.settle()
                future = _done(job)
            self._jobs.append((key, future))

    def finished(self, leave: int = 0) -> list[tuple[Hashable, Future[T]]]:
        """Return keys and futures of the jobs that are done, in the order of submission, but not of the last few."""
        done = []
        while len(self._jobs) > leave and self._jobs[0][1].done():
            done.append(self._jobs.popleft())
        return done

    def settle(self) -> None:
        """Wait for all jobs and end the thread; a later job begins another."""
        with _LOCK:
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None


def _done(job: Callable[[], T]) -> Future[T]:
    """Run a job here and return what a thread would have."""
    future: Future[T] = Future()
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
    return future


_ALIVE: weakref.WeakSet[Background[Any]] = weakref.WeakSet()


def _before_fork() -> None:
    _LOCK.acquire()  # until the fork is over, so that no thread submits between
    for background in tuple(_ALIVE):
        background.settle()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_before_fork, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)
