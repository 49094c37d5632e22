"""A small classifier of digits with BatchNorm, its statistics replaced or not at inference."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from normscope import workbench

Pair = tuple[Tensor, Tensor]


def digits(seed: int, examples: int = 4000) -> tuple[Pair, Pair]:
    """Return a training pair of so many MNIST digits and the test pair of 1000."""
    (images, labels), test = workbench.split(*workbench.mnist(), seed)
    return (images[:examples], labels[:examples]), test


def classifier(train: Pair, seed: int, *, batch: int, epochs: int, rate: float = 0.1, width: int = 100) -> nn.Module:
    """Train a perceptron, 784-width-width-10, with BatchNorm and SGD with momentum; in evaluation mode afterwards.

    Args:
        train: images and labels.
        seed: of initialization and batches.
        batch: examples in a batch.
        epochs: passes over the data.
        rate: learning rate for batches of 64 and more; proportional to smaller ones.
        width: hidden units.

    Returns:
        The network.
    """
    torch.manual_seed(seed)
    model = workbench.mlp((784, width, width, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate * min(1.0, batch / 64), momentum=0.5)
    batches = workbench.batches(*train, batch, torch.Generator().manual_seed(seed))
    steps = epochs * (len(train[0]) // batch)
    workbench.fit(model, optimizer, batches, workbench.cross_entropy, steps=steps, progress=False)
    return model.eval()


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
