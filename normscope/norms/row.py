"""A row of the table of methods: what it is called, how it is made, where it comes from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int, torch.Generator], tuple[Any, ...]]

WORDS = ("area", "operation", "recovery", "population")


def image(num_features: int, generator: torch.Generator) -> tuple[Tensor]:
    """Return a small batch of images `(6, C, 4, 5)` whose channels differ in mean and scale."""
    x = torch.randn(6, num_features, 4, 5, generator=generator, dtype=torch.float64)
    steps = torch.linspace(0.5, 2, num_features, dtype=torch.float64).reshape(-1, 1, 1)
    return (x * steps + steps - 1,)


def tokens(num_features: int, generator: torch.Generator) -> tuple[Tensor]:
    """Return a small batch of sequences `(6, 5, C)`."""
    return (torch.randn(6, 5, num_features, generator=generator, dtype=torch.float64) + 0.3,)


def labelled(num_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images and a label below 3 for each."""
    return *image(num_features, generator), torch.arange(6) % 3


@dataclass(frozen=True)
class Row:
    """One published method.

    Attributes:
        name: the catalog's name after the colon, or a name of ours for a method of later years.
        source: key of the bibliography, as "S007" or "ioffe2015".
        make: `make(num_features, *, ...)`; of eps, momentum, affine and groups it takes those that the method has, with
            the method's defaults, and its own settings by keyword.
        provides: the catalog's full names, as "layer:batch".
        aliases: other names.
        parts: words for area, operation, recovery and population of a method that is no composition.
        keys: recorded numbers that it reproduces, files of tests/reference.
        inputs: arguments of forward for tests, from the number of features and a generator, in float64.
        options: arguments of make that tests need, as (("classes", 3),).
        features: number of features in tests.
    """

    name: str
    source: str
    make: Callable[..., nn.Module]
    provides: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    parts: tuple[str, str, str, str] | None = None
    keys: tuple[str, ...] = ()
    inputs: Inputs = image
    options: tuple[tuple[str, Any], ...] = ()
    features: int = 8

    def settings(self) -> dict[str, inspect.Parameter]:
        """Return the keyword arguments of `make`."""
        parameters = inspect.signature(self.make).parameters
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    def example(self) -> nn.Module:
        """Make the layer that tests use."""
        return self.make(self.features, **dict(self.options))

    def words(self) -> dict[str, str]:
        """Return a word for area, operation, recovery and population."""
        if self.parts is not None:
            return dict(zip(WORDS, self.parts, strict=True))
        layer = self.example()
        return {word: type(getattr(layer, word)).__name__.lower() for word in WORDS}

    def __repr__(self) -> str:
        """Write the call that builds it, with the method's defaults."""
        shown = [f"{name}={p.default!r}" for name, p in self.settings().items() if p.default is not p.empty]
        needed = [f"{name}=..." for name, p in self.settings().items() if p.default is p.empty]
        return f"build({self.name!r}, {', '.join(['num_features', *needed, *shown])})  # {self.source}"
