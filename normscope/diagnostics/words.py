"""Words: numbers and counts as messages write them."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """Write a count with its noun.

    >>> count(1, "layer"), count(3, "layer")
    ('1 layer', '3 layers')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def fold(factor: float) -> str:
    """Write a factor in two digits.

    >>> fold(2.345), fold(89123.0)
    ('2.3-fold', '8.9e4-fold')
    """
    return f"{factor:.2g}-fold".replace("e+0", "e").replace("e+", "e")
