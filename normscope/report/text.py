"""Text: numbers, names and sources as people read them. Names of layers are not trusted anywhere."""

from __future__ import annotations

import math
import numbers
import re

from normscope.core.errors import ArgumentError
from normscope.core.source import cite

_SHOWN = 8


def number(value: object) -> str:
    """Write a number with four significant digits; text stays as it is.

    Args:
        value: a number, a text, a list of them, or None.

    Returns:
        The text.

    >>> number(272474), number(0.000012345), number(float("nan")), number([0.5, 1e9])
    ('272,474', '1.234e-5', 'NaN', '0.5, 1e9')
    """
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        more = f", … ({len(value)} in all)" if len(value) > _SHOWN else ""
        return ", ".join(number(item) for item in value[:_SHOWN]) + more
    if isinstance(value, (bool, str)) or not isinstance(value, numbers.Real):
        return str(value)
    real = float(value)
    if not math.isfinite(real):
        return "NaN" if math.isnan(real) else f"{'-' if real < 0 else ''}∞"
    if abs(real) < 1e7 and (real == int(real) or abs(real) >= 1e4):
        return f"{real:,.0f}"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    digits, _, exponent = f"{real:.4g}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def breakable(name: str) -> list[str]:
    """Cut a name after its dots and slashes, where a line may end.

    Args:
        name: name of a site.

    Returns:
        The parts; joined they are the name.

    >>> breakable("layer1.bn/output")
    ['layer1.', 'bn/', 'output']
    """
    return re.findall(r"[^./]*[./]|[^./]+", name)


def words(name: str) -> str:
    """Write the name of a number of the evidence as words."""
    return name.replace("_", " ")


def source(key: str) -> tuple[str, str]:
    """Resolve where a number comes from.

    Args:
        key: a key of the bibliography, or a text as "identity: ...".

    Returns:
        Title and year with the address ("" where there is none), or the text itself.
    """
    try:
        work = cite(key)
    except ArgumentError:
        return key, ""
    address = work.url if work.url.startswith(("https://", "http://")) else ""
    return f"{work.title} ({work.year})", address
