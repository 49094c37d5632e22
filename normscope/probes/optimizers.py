"""Optimizers: the settings of their parameter groups, as they will be used in the step that begins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch


def settings(optimizer: torch.optim.Optimizer, among: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """Return learning rate, momentum and decay of each parameter group.

    Args:
        optimizer: the optimizer.
        among: all optimizers of the run; of several of one class the label says which.

    Returns:
        One mapping a group: optimizer, group, lr, momentum (beta_1 where there are betas), decay.
    """
    return [
        {
            "optimizer": label(optimizer, among),
            "group": number,
            "lr": known(group.get("lr")),
            "momentum": known(group.get("momentum", _first(group.get("betas")))),
            "decay": known(group.get("weight_decay")),
        }
        for number, group in enumerate(optimizer.param_groups)
    ]


def _first(betas: Any) -> Any:
    return betas[0] if isinstance(betas, (tuple, list)) and betas else betas


def label(optimizer: torch.optim.Optimizer, among: Sequence[torch.optim.Optimizer]) -> str:
    """Return the class of an optimizer, with its number where there are several of that class."""
    kind = type(optimizer).__name__
    alike = [other for other in among if type(other).__name__ == kind]
    return kind if len(alike) == 1 else f"{kind} {next(i for i, other in enumerate(alike) if other is optimizer)}"


def owner(parameter: torch.Tensor, among: Sequence[torch.optim.Optimizer]) -> tuple[str, int | None]:
    """Return optimizer and group that hold a parameter; ("", None) where none does."""
    for optimizer, number in holding(parameter, among):
        return label(optimizer, among), number
    return "", None


def holding(
    parameter: torch.Tensor, among: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[torch.optim.Optimizer, int]]:
    """Yield each optimizer that holds a parameter, with the number of its group."""
    for optimizer in among:
        for number, group in enumerate(optimizer.param_groups):
            if any(p is parameter for p in group["params"]):
                yield optimizer, number


# optimizers whose step is known, by the class of torch that defines it
_RULES = {"SGD": "sgd", "Adam": "adam", "AdamW": "adam", "Muon": "muon"}


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimizer steps by the rule of torch's Adam or AdamW."""
    return _rule(optimizer) == "adam"


def _rule(optimizer: torch.optim.Optimizer) -> str:
    step = type(optimizer).step
    name = str(getattr(step, "__qualname__", "")).partition(".")[0]
    return _RULES.get(name, "") if str(getattr(step, "__module__", "")).startswith("torch.optim") else ""


def rule(parameter: torch.Tensor, among: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Return by which rule a parameter is updated, as far as it is known.

    Args:
        parameter: the parameter.
        among: the optimizers of the run.

    Returns:
        rule ("sgd", "adam" or "muon"; "" where step is not one of torch's), decoupled (whether decay multiplies the
        weight instead of joining the gradient), nesterov and dampening of the momentum; empty for no owner.
    """
    for optimizer, number in holding(parameter, among):
        group = optimizer.param_groups[number]
        name = str(getattr(type(optimizer).step, "__qualname__", "")).partition(".")[0]
        return {
            "rule": _rule(optimizer),
            "decoupled": name in ("AdamW", "Muon") or bool(group.get("decoupled_weight_decay", False)),
            "nesterov": bool(group.get("nesterov", False)),
            "dampening": known(group.get("dampening", 0)) or 0,
        }
    return {}


def known(value: Any) -> Any:
    """Return a number for the store: None stays unknown; NaN becomes infinity, both say "not finite"."""
    if value is None or isinstance(value, (str, int)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # a schedule object, an integer beyond any float
        return None
    return math.inf if math.isnan(number) else number
