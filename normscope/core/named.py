"""A table of rows found by name or alias."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar

from normscope.core.errors import ArgumentError, unknown_name


class HasName(Protocol):
    """What a row needs."""

    @property
    def name(self) -> str:
        """The name."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names."""


R = TypeVar("R", bound=HasName)


class Named(Mapping[str, R]):
    """Name to row, in the order of the table; aliases, and names as torch writes them, are found but not listed."""

    def __init__(self, rows: tuple[R, ...], head: str, line: Callable[[R], str]) -> None:
        """Index the rows by name and alias.

        Args:
            rows: the rows.
            head: what print writes first after the number of rows.
            line: what print writes beside a row's name.

        Raises:
            ArgumentError: two rows have the same name.
        """
        self._rows = {row.name: row for row in rows}
        self._aliases = {alias: row for row in rows for alias in row.aliases}
        self._head, self._line = head, line
        self._meant = {_plain(key): row for key, row in [*self._aliases.items(), *self._rows.items()]}
        names = [name for row in rows for name in (row.name, *row.aliases)]
        if len(names) > len(set(names)):
            raise ArgumentError(f"rows share the names {sorted({n for n in names if names.count(n) > 1})}.")

    def __getitem__(self, name: str) -> R:
        """Return a row by name or alias; an unknown name is an ArgumentError with the closest names."""
        found = self._rows.get(name) or self._aliases.get(name) or self._meant.get(_plain(name))
        if found is None:
            raise unknown_name("name", name, [*self._rows, *self._aliases], "print(zoo) lists them with their parts.")
        return found

    def __contains__(self, name: object) -> bool:
        """Tell whether a name or an alias is known."""
        return name in self._rows or name in self._aliases or (isinstance(name, str) and _plain(name) in self._meant)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._rows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def __repr__(self) -> str:
        """Write a line for each row."""
        lines = (f"{name:<28}{self._line(row)}" for name, row in self._rows.items())
        return f"{len(self)} {self._head}\n" + "\n".join(lines)


def _plain(name: object) -> str:
    """Return a name without what people write differently: case, separators, "norm" and the rank at the end.

    >>> _plain("BatchNorm2d"), _plain("layer_norm"), _plain("batch-renorm")
    ('batch', 'layer', 'batchre')
    """
    plain = re.sub(r"[-_ ]", "", str(name).lower())
    return re.sub(r"(norm|normalization)?(1d|2d|3d)?$", "", plain) or plain
