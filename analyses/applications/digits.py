"""The digits that the figures of this chapter train on."""

from __future__ import annotations

from torch import Tensor

from normscope import workbench

Pair = tuple[Tensor, Tensor]


def digits(seed: int, examples: int) -> tuple[Pair, Pair]:
    """Return a training pair of so many MNIST digits and the test pair of 1000."""
    (images, labels), test = workbench.split(*workbench.mnist(), seed)
    return (images[:examples], labels[:examples]), test
