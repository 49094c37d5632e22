"""The outputs of a network with the statistics of each batch in place of the stored ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from normscope import workbench

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def logits(model: nn.Module, images: Tensor, batch: int | None = None) -> Tensor:
    """Return the outputs, with the stored statistics or, if a batch size is given, with those of each batch.

    Args:
        model: the network; a copy is run.
        images: the inputs; with a batch size the incomplete last batch is left out.
        batch: examples that share statistics.

    Returns:
        Logits, [examples, classes].
    """
    if batch is None:
        return torch.as_tensor(model(images))
    running = copy.deepcopy(model).train()
    return torch.cat([running(part) for part in torch.split(images[: len(images) // batch * batch], batch)])


def scores(outputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return loss in nats and accuracy of the outputs of the first examples."""
    targets = labels[: len(outputs)]
    return float(workbench.cross_entropy(outputs, targets)), float(workbench.accuracy(outputs, targets))
