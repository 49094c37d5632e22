"""Checks of arguments that several functions take."""

from __future__ import annotations

from collections.abc import Iterable

from normscope.core.errors import ArgumentError, unknown_name
from normscope.linalg.operator import Operator
from normscope.linalg.problem import Problem


def checked_operator(problem: object, operator: str) -> Operator:
    """Return the operator of a problem.

    Args:
        problem: the problem.
        operator: which matrix.

    Returns:
        A new operator, at the present parameters.

    Raises:
        ArgumentError: if the problem is none.
    """
    if not isinstance(problem, Problem):
        raise ArgumentError(f"problem={type(problem).__name__} must be normscope.Problem(model, loss, batches).")
    return problem.operator(operator)


def checked_count(argument: str, value: object, least: int, hint: str = "") -> int:
    """Return a whole number.

    Args:
        argument: its name.
        value: what was received.
        least: the smallest that works.
        hint: what to try, a sentence.

    Returns:
        The number.

    Raises:
        ArgumentError: if it is none, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{argument}={value!r} must be a whole number, at least {least}.{' ' * bool(hint)}{hint}")
    return value


def check_name(argument: str, value: object, options: Iterable[str]) -> None:
    """Refuse a name that is not among the options, with an ArgumentError."""
    if value not in (names := list(options)):
        raise unknown_name(argument, value, names)
