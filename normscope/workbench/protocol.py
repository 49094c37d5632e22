"""Protocol: the small work on which normalization layers are compared, the same for each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from normscope.core.errors import unknown_name
from normscope.linalg.problem import Problem
from normscope.norms.conversion import convert
from normscope.workbench.data import Pair, batches, mnist, split, text, windows
from normscope.workbench.models import mlp, residual_cnn, transformer
from normscope.workbench.train import accuracy, cross_entropy, evaluate, fit

VERSION = 1  # of what follows: another optimizer, model or split is another protocol
CONTEXT = 64
_HELD = {"mlp": 256, "resnet": 96, "transformer": 32}
_EVALUATED = 250
NONE = "none"
GROUPS = 4  # of "group": at its own 32 a layer of 48 features has groups of one or two


@dataclass(frozen=True)
class Protocol:
    """A reference model on bundled data: what is trained, how long, and with which learning rates.

    Attributes:
        model: "mlp", "resnet" or "transformer".
        steps: training steps.
        batch: samples in a batch.
        rates: the grid of learning rates.
        shape: of an input of a norm with 8 channels, for checking a layer alone.
    """

    model: str
    steps: int
    batch: int
    rates: tuple[float, ...]
    shape: tuple[int, ...]

    def make(self, norm: Norm) -> nn.Module:
        """Make the reference model with its norms replaced; all else has the same weights whatever the norm."""
        return norm.put(_MODELS[self.model]())

    def fit(self, model: nn.Module, attach: Callable[..., Any], lr: float, seed: int) -> dict[str, float]:
        """Train a model and evaluate it on data that were held out.

        Args:
            model: the model.
            attach: what `compare` gives.
            lr: learning rate, constant.
            seed: of the order of the data.

        Returns:
            test_loss, in nats, and test_accuracy.
        """
        train, test = _data(self.model)
        generator = torch.Generator().manual_seed(seed)
        if self.model == "transformer":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
            stream = windows(train[0], self.batch, CONTEXT, generator)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
            stream = batches(*train, self.batch, generator)
        held = _HELD[self.model]
        problem = Problem(model, cross_entropy, [(test[0][:held], test[1][:held])])
        with attach(model, optimizer, problem=problem) as scope:

            def tell(step: int, loss: float) -> None:
                scope.step(loss=loss)

            fit(model, optimizer, stream, cross_entropy, steps=self.steps, on_step=tell, progress=False)
        parts = list(zip(*(torch.split(tensor, _EVALUATED) for tensor in test), strict=True))
        return {
            "test_loss": evaluate(model, parts, cross_entropy),
            "test_accuracy": evaluate(model, parts, accuracy),
        }

    def facts(self) -> dict[str, Any]:
        """Return what identifies it, for records of its runs."""
        return {"version": VERSION, **asdict(self)}


@dataclass(frozen=True)
class Norm:
    """A normalization by name.

    Attributes:
        name: of the table of methods, or "none", or MODULE:NAME of a layer that is made from a number of features.
        options: settings of the method, as (("groups", 8),).
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def put(self, model: nn.Module) -> nn.Module:
        """Replace the norms of a model."""
        if self.name == NONE or ":" in self.name:
            return convert(model, to=self.layer)
        known = {"groups": GROUPS} if self.name in ("group", "gn") else {}
        return convert(model, to=self.name, **{**known, **dict(self.options)})

    def layer(self, num_features: int) -> nn.Module:
        """Make the user's layer, or one that does nothing."""
        if self.name == NONE:
            return nn.Identity()
        module, _, name = self.name.partition(":")
        made: nn.Module = getattr(importlib.import_module(module), name)(num_features, **dict(self.options))
        return made


@dataclass(frozen=True)
class Make:
    """What makes the model of an entry; it can go to another process."""

    protocol: Protocol
    norm: Norm

    def __call__(self) -> nn.Module:
        """Make the model."""
        return self.protocol.make(self.norm)


def _mlp() -> nn.Module:
    return mlp([784, 48, 48, 48, 48, 10])


def _resnet() -> nn.Module:
    return residual_cnn(8, (1, 1, 1))


def _transformer() -> nn.Module:
    return transformer(len(text()[1]), width=64, layers=2, heads=4, context=CONTEXT)


_MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": _mlp, "resnet": _resnet, "transformer": _transformer}
PROTOCOLS: tuple[Protocol, ...] = (
    Protocol("mlp", steps=150, batch=128, rates=(0.01, 0.05, 0.25), shape=(6, 8)),
    Protocol("resnet", steps=80, batch=32, rates=(0.01, 0.05, 0.25), shape=(6, 8, 4, 5)),
    Protocol("transformer", steps=150, batch=16, rates=(3e-4, 1e-3, 3e-3), shape=(6, 5, 8)),
)


def protocol(model: str) -> Protocol:
    """Return the protocol of a model.

    Args:
        model: "mlp", "resnet" or "transformer".

    Returns:
        The protocol; an unknown name is an ArgumentError.
    """
    found = {item.model: item for item in PROTOCOLS}
    _require(model, found)
    return found[model]


def _require(model: str, options: Collection[str]) -> None:
    if model not in options:
        raise unknown_name("model", model, options)


@cache
def _data(model: str) -> tuple[Pair, Pair]:
    """Return training and test data: digits, or the first nine tenths of a text and windows of the rest."""
    if model != "transformer":
        return split(*mnist(), seed=0)
    tokens, _ = text()
    cut = len(tokens) * 9 // 10
    return (tokens[:cut], tokens[:cut]), next(
        windows(tokens[cut:], _EVALUATED, CONTEXT, torch.Generator().manual_seed(1))
    )
