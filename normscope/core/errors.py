"""Errors that name the argument, the value received, the options and what to try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NormscopeError(Exception):
    """Base of every error that normscope raises on purpose."""


class ArgumentError(NormscopeError, ValueError):
    """An argument has a value that cannot work."""


class Unmeasurable(NormscopeError):
    """Something cannot be measured of this model; the message says why."""


class StoreError(NormscopeError, OSError):
    """A run cannot be written or read: path, schema version or damage."""


def brief(value: object) -> str:
    """Return a value in words: its repr, or its type and the beginning of that where it is large.

    Args:
        value: anything.

    Returns:
        At most about 60 characters.

    >>> brief(3), brief([0] * 100)
    ('3', 'a list ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ...)')
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"a {type(value).__name__} ({text[:34]}...)"


def unknown_name(argument: str, value: object, options: Iterable[str], hint: str = "") -> ArgumentError:
    """Build the error for a name that is not among the options, the closest names first.

    Args:
        argument: name of the argument.
        value: the value received.
        options: every name that would have worked.
        hint: what to try, a sentence.

    Returns:
        The error, to be raised by the caller.

    >>> str(unknown_name("stat", "rsm", ["mean", "rms"]))
    "stat='rsm' is unknown; did you mean 'rms'? Options: mean, rms."
    """
    names = list(options)
    close = difflib.get_close_matches(str(value), names, n=3)
    meant = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    shown = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
    tail = f" {hint}" if hint else ""
    return ArgumentError(f"{argument}={value!r} is unknown; {meant}Options: {shown or 'none'}.{tail}")
