"""Silence: marks passes that are the toolkit's own, so that an attached scope does not take them for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_NOBODY = object()
_HEARD: ContextVar[object] = ContextVar("heard", default=None)  # None: everybody hears


@contextmanager
def silence(but: object = _NOBODY) -> Iterator[None]:
    """Keep hooks of attached scopes quiet while the context lasts.

    Args:
        but: the one listener that hears nevertheless.

    Yields:
        Nothing.
    """
    token = _HEARD.set(but)
    try:
        yield
    finally:
        _HEARD.reset(token)


def is_silent(listener: object = None) -> bool:
    """Tell whether the model is run by the toolkit itself, for others than this listener.

    Args:
        listener: who asks.

    Returns:
        Whether it is.

    >>> with silence():
    ...     is_silent()
    True
    >>> is_silent()
    False
    """
    heard = _HEARD.get()
    return heard is not None and heard is not listener
