"""A small classifier of images with BatchNorm, trained: what statistics at inference are studied on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.workbench.data import batches
from normscope.workbench.models import mlp
from normscope.workbench.train import cross_entropy, fit


def classifier(
    train: tuple[Tensor, Tensor], seed: int, *, batch: int = 64, epochs: int = 8, rate: float = 0.1, width: int = 100
) -> nn.Sequential:
    """Train a perceptron with two hidden layers and BatchNorm by SGD with momentum 0.5.

    Args:
        train: images [m, ...] and labels [m], ten classes.
        seed: of initialization and batches; torch's global seed is set to it.
        batch: examples in a batch.
        epochs: passes over the data.
        rate: learning rate for batches of 64 and more; proportional to the size of smaller ones.
        width: hidden units of each layer.

    Returns:
        The network, in evaluation mode.

    Raises:
        ArgumentError: epochs is below 1.
    """
    if epochs < 1:
        raise ArgumentError(f"epochs={epochs!r} trains nothing; try 8.")
    images, labels = train
    torch.manual_seed(seed)
    model = mlp((images[0].numel(), width, width, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate * min(1.0, batch / 64), momentum=0.5)
    drawn = batches(images, labels, batch, torch.Generator().manual_seed(seed))
    fit(model, optimizer, drawn, cross_entropy, steps=epochs * (len(images) // batch), progress=False)
    return model.eval()
