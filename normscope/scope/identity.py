"""Identity: a text that says what a function does, so that a changed one is noticed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn

_DEEPEST = 6


def described(value: object) -> str:
    """Return the same text for what is the same: of functions code, defaults and what they close over.

    What a function calls by a global name is not followed; a change there is not noticed.

    Args:
        value: a function, a partial, an object that is called, or a setting.

    Returns:
        Name and hash, or the value itself where it is a plain one.

    >>> described(lambda: 1) == described(lambda: 1), described(lambda: 1) == described(lambda: 2)
    (True, False)
    """
    text = _text(value, 0)
    if isinstance(value, (str, int, float, type(None), tuple, list)) and len(text) <= 80:
        return text
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _text(value: Any, depth: int) -> str:
    if depth > _DEEPEST:
        return type(value).__qualname__
    deeper = functools.partial(_text, depth=depth + 1)
    if value is None or isinstance(value, (str, int, float, complex, bytes)):
        return repr(value)
    if isinstance(value, (tuple, list, set, frozenset)):
        items = map(deeper, value)
        return f"{type(value).__name__}({', '.join(sorted(items) if isinstance(value, (set, frozenset)) else items)})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{deeper(key)}: {deeper(item)}' for key, item in value.items())})"
    if isinstance(value, functools.partial):
        return f"partial({deeper(value.func)}, {deeper(value.args)}, {deeper(value.keywords)})"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = (
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if torch.is_tensor(value) else value
        )
        return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    if isinstance(value, CodeType):
        return f"code({value.co_code.hex()}, {deeper(value.co_names)}, {deeper(value.co_consts)})"
    return _object(value, depth)


def _object(value: Any, depth: int) -> str:
    deeper = functools.partial(_text, depth=depth + 1)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"function({deeper([value.__code__, value.__defaults__, value.__kwdefaults__, cells])})"
    if isinstance(value, type):
        foreign = value.__module__.partition(".")[0] in ("torch", "builtins", "normscope")
        methods = {} if foreign else {name: item for name, item in vars(value).items() if inspect.isfunction(item)}
        return f"class({value.__module__}.{value.__qualname__}, {deeper(methods)})"
    if inspect.ismethod(value):
        return f"method({deeper(value.__func__)}, {deeper(value.__self__)})"
    if isinstance(value, nn.Module):
        return f"module({deeper(type(value))}, {deeper(value.state_dict())})"
    if dataclasses.is_dataclass(value):
        return f"object({deeper(type(value))}, {deeper(dict(vars(value)))})"
    attributes = vars(value) if hasattr(value, "__dict__") else {}
    return f"object({deeper(type(value))}, {deeper(dict(attributes))})"
