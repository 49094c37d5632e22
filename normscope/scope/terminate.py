"""Terminate: runs that a scheduler ends are closed before the process goes, as nothing at its exit would do it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Protocol
from weakref import WeakSet


class _Closes(Protocol):
    def end(self) -> None:
        """Write what waits, without measuring anything."""


_OPEN: WeakSet[_Closes] = WeakSet()


def close_on_terminate(scope: _Closes) -> None:
    """Have a scope closed on SIGTERM, where nobody else handles that signal; the process then ends as it would have.

    Args:
        scope: what has `end`.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    _OPEN.add(scope)


def closed(scope: _Closes) -> None:
    """Forget a scope; after the last one the signal does what it did before."""
    _OPEN.discard(scope)
    ours = signal.getsignal(signal.SIGTERM) is _terminate
    if not _OPEN and ours and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    del frame
    for scope in list(_OPEN):
        scope.end()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
