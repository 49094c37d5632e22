"""What a row of the table of architectures consists of."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def squares(output: Any) -> Tensor:
    """Return a loss for anything that a model returns: the sum of the mean squares."""
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([(t - 0.1).square().mean() for t in tensors]).sum()


@dataclass(frozen=True)
class Architecture:
    """A third-party model with random weights, and what is known of it beforehand.

    Attributes:
        name: name of the row.
        package: what holds the classes.
        make: the model, made from the package.
        inputs: keyword arguments of forward, drawn from torch's own generator.
        norms: how many normalization layers of each kind its definition has, counted by hand.
        loss: the loss of an output.
    """

    name: str
    package: str
    make: Callable[[Any], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    norms: Mapping[str, int]
    loss: Callable[[Any], Tensor] = squares

    def build(self) -> nn.Module:
        """Make the model; warnings of its package are not ours."""
        package = imported(self.package)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.make(package).train()


def imported(name: str) -> ModuleType:
    """Import a package, whose warnings are not ours; skip where it is not installed."""
    pytest.importorskip(name.partition(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def own_loss(output: Any) -> Tensor:
    """Return the loss that the model itself has computed."""
    return output.loss


def classes(output: Tensor) -> Tensor:
    """Return the cross-entropy of logits against classes in turn."""
    flat = output.flatten(2).mean(2) if output.ndim > 2 else output
    return nn.functional.cross_entropy(flat, torch.arange(len(flat)) % flat.shape[1])
