"""Layers with a branch for each part of the batch: the examples of a domain, a class or a passport."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normscope.core.errors import ArgumentError
from normscope.norms.area import Instance
from normscope.norms.average import LOCAL, Average


def members(domain: Tensor | int | None, count: int, domains: int, default: int | None) -> Tensor:
    """Return the domain of each example `(N,)`.

    Args:
        domain: labels `(N,)`, one domain for the whole batch, or None for the default.
        count: N.
        domains: number of domains.
        default: the domain that None stands for; None if there is none.

    Returns:
        The labels.

    Raises:
        ArgumentError: there is no domain, not one for each example, or one out of range.
    """
    chosen = default if domain is None else domain
    if chosen is None:
        raise ArgumentError(f"domain=None: say which of the {domains} domains an example is from, layer(x, labels).")
    labels = torch.as_tensor(chosen).reshape(-1)
    if labels.numel() not in {1, count}:
        raise ArgumentError(f"domain has {labels.numel()} labels for a batch of {count}; give one for each, or one.")
    if int(labels.min()) < 0 or int(labels.max()) >= domains:
        raise ArgumentError(f"domain={labels.tolist()} must be from 0 to {domains - 1}; build with more domains.")
    return labels.expand(count)


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
