"""Layers with a branch for each part of the batch: the examples of a domain, a class or a passport."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normscope.norms.area import Instance
from normscope.norms.average import LOCAL, Average


def present(part: Tensor, average: Average, training: bool) -> bool:
    """Tell whether a part of the batch has examples, in training on any rank."""
    if average is LOCAL or not training:
        return len(part) > 0
    return float(average.count(Instance().split(part).movedim(0, -1).unsqueeze(0))) > 0


def by_branch(
    x: Tensor,
    labels: Tensor,
    branches: Sequence[Callable[[Tensor], Tensor]],
    average: Average = LOCAL,
    training: bool = False,
) -> Tensor:
    """Pass each example through the branch that its label names.

    A branch without examples is left out, unless another rank has some.

    Args:
        x: `(N, *)`.
        labels: `(N,)`, which branch.
        branches: functions of a part of the batch.
        average: how the branches average, on one process or across ranks.
        training: branches take statistics of their part.

    Returns:
        A tensor of the shape of x.
    """
    # examples are moved only where they do not stand in the order of the branches
    order = labels.argsort(stable=True)
    sorted_already = bool((labels[1:] >= labels[:-1]).all())
    counts = labels.bincount(minlength=len(branches)).tolist()
    parts = torch.split(x if sorted_already else x.index_select(0, order), counts)
    done = [
        branch(part) if present(part, average, training) else part for branch, part in zip(branches, parts, strict=True)
    ]
    y = torch.cat(done)
    return y if sorted_already else y.index_select(0, order.argsort())
