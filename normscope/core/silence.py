"""Silence: marks passes that are the toolkit's own, so that an attached scope does not take them for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SILENT: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def silence() -> Iterator[None]:
    """Keep hooks of attached scopes quiet while the context lasts.

    Yields:
        Nothing.
    """
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)


def is_silent() -> bool:
    """Tell whether the model is run by the toolkit itself.

    Returns:
        Whether it is.

    >>> with silence():
    ...     is_silent()
    True
    >>> is_silent()
    False
    """
    return _SILENT.get()
