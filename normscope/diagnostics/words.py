"""Words: numbers and counts as messages write them."""

from __future__ import annotations


def count(number: float, noun: str) -> str:
    """Write a count with its noun.

    Args:
        number: the count.
        noun: its singular, whose plural takes an s.

    Returns:
        Both, in singular or plural.

    >>> count(1, "layer"), count(3, "layer")
    ('1 layer', '3 layers')
    """
    return f"{number:.0f} {noun}" if number == 1 else f"{number:.0f} {noun}s"


def fold(factor: float) -> str:
    """Write a factor in two digits.

    Args:
        factor: a positive factor.

    Returns:
        The factor with "-fold".

    >>> fold(2.345), fold(89123.0)
    ('2.3-fold', '8.9e4-fold')
    """
    return f"{factor:.2g}-fold".replace("e+0", "e").replace("e+", "e")
