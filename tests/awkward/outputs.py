"""Awkward by what their modules return."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.awkward.base import Job, Wrap, job


@dataclass
class Pair:
    logits: torch.Tensor
    hidden: torch.Tensor


def _pair(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.tanh(x @ self.weight[: x.shape[1]])
    return hidden.sum(1, keepdim=True), hidden


class Returns(nn.Linear):
    """A layer that returns what it computes in some structure."""

    def __init__(self, pack: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        super().__init__(6, 6)
        self.pack = pack

    def forward(self, x: torch.Tensor) -> Any:
        return self.pack(*_pair(self, x))


def dict_output() -> Job:
    body = Returns(lambda logits, hidden: {"logits": logits, "hidden": hidden, "note": "text", "a/input": hidden * 2})
    return job(Wrap(lambda m, x: m.body(x)["hidden"] + m.body(x)["a/input"], body=body), 5, 6)


def nested_output() -> Job:
    body = Returns(lambda logits, hidden: (logits, [hidden, {"deep": (hidden * 2,)}], None))
    return job(Wrap(lambda m, x: m.body(x), body=body), 5, 6)


class OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))

    def forward(self) -> torch.Tensor:
        return self.weight


def integer_output() -> Job:
    choose = Wrap(lambda m, x: x.argmax(1))
    return job(
        Wrap(lambda m, x: m.embed(m.choose(m.lin(x))), lin=nn.Linear(6, 6), choose=choose, embed=nn.Embedding(6, 4)),
        5,
        6,
    )


class ComplexLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.complex64) @ self.weight


def scalar_output() -> Job:
    loss = Wrap(lambda m, x: x.square().mean())
    return job(Wrap(lambda m, x: m.loss(m.lin(x)), lin=nn.Linear(6, 6), loss=loss), 5, 6)


def nested_tensor() -> Job:
    """A module that returns a nested tensor, which has no shape."""
    ragged = Wrap(lambda m, x: torch.nested.as_nested_tensor([x[:2], x[2:]]))
    joined = Wrap(lambda m, x: x.to_padded_tensor(0.0))

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return m.last(m.joined(m.ragged(m.lin(x))))

    return job(Wrap(run, lin=nn.Linear(6, 6), ragged=ragged, joined=joined, last=nn.Linear(6, 2)), 5, 6)


def inference_tensor() -> Job:
    """A frozen trunk under inference mode, and a module that passes on what it returned."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            features = m.trunk(x)
        return m.head(m.passed(features).clone())

    return job(Wrap(run, trunk=nn.Linear(6, 6), passed=nn.Identity(), head=nn.Linear(6, 2)), 5, 6)
