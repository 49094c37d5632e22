"""Factories: functions of the user's that a command finds by name, as pkg.mod:factory, and calls without arguments."""

from __future__ import annotations

import argparse
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from normscope.core.errors import ArgumentError, NormscopeError, unknown_name

_OURS = str(Path(__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)
_CALLING = torch.nn.modules.module.__file__  # between a call of a module and its forward method
_INSTALLED = (_OURS, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


def reference(text: str) -> str:
    """Check that a text reads MODULE:NAME, for argparse."""
    module, colon, name = text.partition(":")
    if colon and name.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return text
    hint = ""
    if module.endswith(".py"):
        path = Path(module).with_suffix("")
        hint = f"; for the file {module} write {'.'.join(path.parts)}:{name or 'NAME'}"
    raise argparse.ArgumentTypeError(
        f"factory={text!r} must be MODULE:NAME, as pkg.mod:factory: an importable module, a colon, a function{hint}"
    )


@contextmanager
def called(text: str, returns: tuple[str, ...], optional: tuple[str, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Import and call a factory; the current folder is importable meanwhile.

    Args:
        text: MODULE:NAME.
        returns: names of what the factory returns, in order.
        optional: names of what it may return after that.

    Yields:
        What it returned, None for what is optional and was not.

    Raises:
        ArgumentError: if the factory cannot be found or called, returns anything else, or if what it returned raises an
            error while the context lasts.
    """
    with importable():
        made = _checked(text, _raising(text, "called", found(text)), returns, optional)
        try:
            yield made
        except Exception as error:
            told = None if isinstance(error, NormscopeError) else _told(error)
            if told is None:
                raise
            raise ArgumentError(f"factory={text!r}: {told}. What it returns must fit together.") from error


@contextmanager
def importable() -> Iterator[None]:
    """Make the current folder importable while the context lasts, as it is for `python -m`."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


def found(text: str) -> Callable[..., Any]:
    """Import the module of MODULE:NAME and look the function up."""
    name = text.partition(":")[2]
    module = _imported(text)
    value = getattr(module, name, None)
    if callable(value):
        return value  # type: ignore[no-any-return]  # whatever it returns is checked
    if hasattr(module, name):
        raise ArgumentError(
            f"factory={text!r} is of type {type(value).__name__}, which cannot be called; wrap it in a function "
            "without arguments."
        )
    names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    options = [f"{module.__name__}:{key}" for key in names]
    raise unknown_name("factory", text, options, f"It was looked for in {module.__file__}.")


def _imported(text: str) -> ModuleType:
    path = text.partition(":")[0]
    try:
        return _raising(text, "imported", lambda: importlib.import_module(path))  # type: ignore[no-any-return]
    except ArgumentError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{path}.".startswith(f"{missing.name}."):
            raise ArgumentError(
                f"factory={text!r}: there is no module {missing.name!r} in {Path.cwd()} or among the installed "
                "packages; run the command in the folder that holds it, and write dots for folders, as pkg.mod."
            ) from missing
        raise


def _raising(text: str, done: str, call: Callable[[], Any]) -> Any:
    """Call what is the user's; its error is told with the place it comes from."""
    try:
        return call()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())  # torch writes several lines
        told = f"{type(error).__name__}: {said} ({last.filename}, line {last.lineno})"
        raise ArgumentError(
            f"factory={text!r} cannot be {done}: {told}. "
            f"It must work in Python as {text.replace(':', '.')}(), without arguments."
        ) from error


def _told(error: Exception) -> str | None:
    """Say which function of the user's failed, how and where; None for an error that is normscope's own."""
    trace = traceback.walk_tb(error.__traceback__)
    frames = [(frame.f_code.co_filename, frame.f_code.co_qualname, line) for frame, line in trace]
    last = max((i for i, (file, *_) in enumerate(frames) if file.startswith(_OURS)), default=-1)
    called = [frame for frame in frames[last + 1 :] if frame[0] != _CALLING]
    if not called or (called[0][0].startswith(_INSTALLED) and not called[0][0].startswith(_TORCH)):
        return None
    file, _, line = next((frame for frame in reversed(called) if not frame[0].startswith(_INSTALLED)), called[-1])
    said = " ".join(str(error).split())  # torch writes several lines
    return f"{called[0][1]}() failed with {type(error).__name__}: {said} ({file}, line {line})"


def _checked(text: str, value: object, returns: tuple[str, ...], optional: tuple[str, ...]) -> tuple[Any, ...]:
    most = len(returns) + len(optional)
    if len(returns) == 1 and not isinstance(value, (tuple, list)):
        value = (value,)  # a single thing need be in no tuple
    if isinstance(value, (tuple, list)) and len(returns) <= len(value) <= most:
        return (*value, *[None] * (most - len(value)))
    got = f"{len(value)} values" if isinstance(value, (tuple, list)) else f"a value of type {type(value).__name__}"
    may = "".join(f"[, {name}" for name in optional) + "]" * len(optional)
    raise ArgumentError(f"factory={text!r} returned {got}; it must return ({', '.join(returns)}{may}).")
