"""A recorded number and how to make the layer that reproduces it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parents[2] / "reference"


@cache
def recorded(key: str) -> dict[str, torch.Tensor]:
    with np.load(FOLDER / f"{key}.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "fiub"}


def call(layer: Any, x: torch.Tensor, step: str, data: dict[str, torch.Tensor]) -> torch.Tensor:
    """The usual forward; step is "1", "2", "3" or "_eval"."""
    return layer(x)


@dataclass(frozen=True)
class Key:
    """How one recorded file is reproduced.

    key: file of tests/reference.
    make: makes the layer (float64 and training mode are set by the test).
    names: recorded name of a parameter or buffer -> name in our state_dict, where they differ; shapes are adapted.
    put, take: change recorded values before loading, our values before comparing: {our name: function(value, data)}.
    stacked: {our name: function(data, "state0" or "state3") -> list of tensors} for what they keep in several pieces.
    call: forward with extra inputs, see `call`.
    skip: recorded entries that are not compared -> reason, as {"state3/a": "...", "y_eval": "..."}.
    different: why the file is deliberately not reproduced at all; "" for reproduced.
    rtol: relative to the largest entry.
    """

    key: str
    make: Callable[[], torch.nn.Module]
    names: dict[str, str] = field(default_factory=dict)
    put: dict[str, Callable[..., torch.Tensor]] = field(default_factory=dict)
    take: dict[str, Callable[..., torch.Tensor]] = field(default_factory=dict)
    stacked: dict[str, Callable[..., list[torch.Tensor]]] = field(default_factory=dict)
    call: Callable[..., torch.Tensor] = call
    skip: dict[str, str] = field(default_factory=dict)
    different: str = ""
    rtol: float = 1e-9


@cache
def recorded_once(key: str) -> dict[str, torch.Tensor]:
    with np.load(FOLDER / "other" / f"{key}.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "fiub"}


def call_once(layer: Any, x: torch.Tensor, data: dict[str, torch.Tensor], *, training: bool) -> torch.Tensor:
    return layer(x)


@dataclass(frozen=True)
class Once:
    """How a file of tests/reference/other is reproduced: one training step and an evaluation.

    names: recorded name without prefix (param_, grad_, buf0_, buf1_) -> name in our state_dict, where they differ.
    call: forward with extra inputs, see `call_once`.
    Other fields as in `Key`; a file with other entries has a test of its own beside those of its family.
    """

    key: str
    make: Callable[[], torch.nn.Module]
    names: dict[str, str] = field(default_factory=dict)
    call: Callable[..., torch.Tensor] = call_once
    skip: dict[str, str] = field(default_factory=dict)
    different: str = ""
    rtol: float = 1e-9
