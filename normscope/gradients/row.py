"""A row of the table of optimizers: what it is called, how it is made, what its effective learning rate is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

# The effective learning rate on scale-invariant weights of norm |w|: what times the gradient (or the direction) at
# w / |w| gives the turn of w / |w| by one step.
STEPS: Final[Mapping[str, Callable[[Mapping[str, Any], float], float]]] = {
    "lr/|w|^2": lambda group, norm: float(group["lr"]) / norm**2,
    "lr/|w|": lambda group, norm: float(group["lr"]) / norm,
    "lr trust": lambda group, norm: float(group["lr"]) * float(group.get("trust_coefficient", 1.0)),
    "lr": lambda group, norm: float(group["lr"]),
}


@dataclass(frozen=True)
class Row:
    """One published method.

    Attributes:
        name: the catalog's name after the colon; where that stands for two methods, the method's own.
        source: key of the bibliography, as "S106".
        make: `make(params, *, lr, ...)`, an optimizer class or a function.
        step: which effective learning rate applies, a key of `STEPS`: "lr/|w|^2" for steps in proportion to the
            gradient, "lr/|w|" for steps of a length that the gradient does not decide, "lr trust" for steps in
            proportion to the weights, "lr" for weights whose norm is fixed or does not matter.
        provides: the catalog's full names, as "optim:lars".
        aliases: other names.
        keys: recorded numbers that it reproduces, files of tests/reference/other.
        around: the transform whose inner optimizer the option `optimizer` chooses; its options are accepted as well.
    """

    name: str
    source: str
    make: Callable[..., torch.optim.Optimizer]
    step: str
    provides: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    around: type[torch.optim.Optimizer] | None = None

    def settings(self, inner: type[torch.optim.Optimizer] | None = None) -> dict[str, inspect.Parameter]:
        """Return the settings that `build` takes.

        Args:
            inner: the optimizer that makes the steps of a transform, that of the row by default.

        Returns:
            Parameters by name.
        """
        found = dict(inspect.signature(self.make).parameters)
        if self.around is not None:
            inside = inspect.signature(inner or found["optimizer"].default).parameters
            found = {**inside, **inspect.signature(self.around).parameters, **found}
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        return {name: p for name, p in found.items() if p.kind not in kinds and name != "params"}

    def effective_rate(self, group: Mapping[str, Any], norm: float) -> float:
        """Return the effective learning rate of scale-invariant weights.

        Args:
            group: their parameter group.
            norm: their norm.

        Returns:
            The rate, by `step`.
        """
        return STEPS[self.step](group, norm)
