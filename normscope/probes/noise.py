"""Noise of normalization layers: how far a held sample moves with its batch, and how noisy the batch statistics are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from normscope.core.site import Site
from normscope.linalg.problem import Problem
from normscope.linalg.protect import undisturbed
from normscope.norms.layer import Norm, Normalization
from normscope.norms.recognize import NormParts
from normscope.probes import hooks, layout
from normscope.probes.disturbance import disturbance, runner, without_affine
from normscope.probes.summary import Row, channel_row
from normscope.probes.transfer import to_host

POINTS, DRAWS = 8, 8  # samples followed in a snapshot, and batches that each is seen in
LARGEST = 256  # samples in such a batch; a larger one is inferred by the law 1 / sqrt(B)
_SHARE = 8  # one of so many members of a batch is followed


def measure(problem: Problem, norms: Mapping[str, NormParts], batch: int) -> dict[str, list[Row]]:
    """Run each normalization layer that crosses the batch on its held inputs, in many batches of the training size.

    Its input is what it gets when the first held batch passes with batch statistics. `snd` is the disturbance with its
    standard error `snd_error`, see `normscope.probes.disturbance.snd`; `relative` is divided by the norm
    of the output. For BatchNorm `mean_noise` is the standard deviation of a batch's mean in units of a channel's, and
    `var_noise` that of its variance relative to the variance, both from the spread of per-sample moments over held
    samples, so that pixels of an image need not be independent.

    Args:
        problem: model, loss and batches.
        norms: normalization layers of the model, by name.
        batch: samples in a forward pass of training.

    Returns:
        Rows of the layers' outputs in phase "noise"; none for a layer that takes more than its input, and none where
        batches hold a single sample.
    """
    layers = crossing(problem.model, norms)
    (first,) = problem.take(1)
    held = layout.batch_size((first,), {})
    rows: dict[str, Row] = {}
    if not layers or held < 2 or batch < 2:
        return {}

    def listen(name: str, args: tuple[Any, ...]) -> None:
        if name in rows or name in busy or len(args) != 1 or not isinstance(args[0], torch.Tensor):
            return
        x = args[0].detach()
        if not layout.why_unmeasured(x) and x.dim() > 1 and x.shape[0] % held == 0:
            busy.add(name)  # the layer is run below, and is heard again
            rows[name] = _layer(name, layers[name], norms[name], x.reshape(held, -1, *x.shape[1:]), batch)

    busy: set[str] = set()
    with with_batch_statistics(problem.model, layers), hooks.listening(layers, listen, inputs=True):
        problem.forward(problem.model, first)
    return {"noise": list(rows.values())}


def crossing(model: nn.Module, norms: Mapping[str, NormParts]) -> dict[str, nn.Module]:
    """Return the normalization layers that may mix the samples of a batch.

    Args:
        model: the model.
        norms: its normalization layers, by name.

    Returns:
        BatchNorm, layers of ours that say so, and those of unknown kind, by name.
    """
    modules = {name: module for name, module in model.named_modules() if name in norms}
    return {name: module for name, module in modules.items() if _may_cross(module, norms[name])}


def whitening(module: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Return how many features a layer whitens together, and from how many values each; nothing for other layers.

    Args:
        module: a normalization layer.
        x: its input.

    Returns:
        Attributes `whitened` and `whitened_from`, pixels counted like samples.
    """
    if not isinstance(module, Norm) or not module.traits.whitens or not module.traits.crosses_batch:
        return {}
    z = module.area.split(x.detach(), module.area.axis(x, module.num_features))
    return {"whitened": int(z.shape[1]), "whitened_from": int(z.shape[2:].numel())}


@contextmanager
def with_batch_statistics(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put some layers in training mode and all else in evaluation mode, and leave no trace, as `undisturbed`.

    Args:
        model: the model.
        layers: the layers.

    Yields:
        Nothing.
    """
    with undisturbed(model):
        for module in model.modules():
            module.training = False  # not eval(): an overridden train() may merge weights or freeze layers
        for layer in layers.values():
            for module in layer.modules():
                module.training = True
        yield


def _may_cross(module: nn.Module, parts: NormParts) -> bool:
    if isinstance(module, Normalization):
        return module.traits.crosses_batch
    return parts.kind in ("batch", "other")


def _layer(name: str, module: nn.Module, parts: NormParts, x: torch.Tensor, batch: int) -> Row:
    """Measure one layer on its input [held, rows of a sample, ...]."""
    draw = torch.Generator().manual_seed(0)
    points = torch.randperm(len(x), generator=draw)[:POINTS]
    run, size = runner(module, without_affine(module, parts), x.device), min(batch, LARGEST)

    def alone(some: torch.Tensor) -> torch.Tensor:
        return run(some.flatten(0, 1)).reshape(len(some), -1)

    found = disturbance(alone, x, points, size, DRAWS, max(1, size // _SHARE), draw)
    smaller = (size / batch) ** 0.5
    scalars = {
        "snd": found.value * smaller,
        "snd_error": found.error * smaller,
        "relative": found.value * smaller / found.scale if found.scale > 0 else float("nan"),
        "batch": float(batch),
    }
    stats = {}
    if parts.kind == "batch":
        mean, var = to_host(_moment_noise(x, parts.axis, batch))
        stats = {"mean_noise": mean, "var_noise": var}
    return channel_row(str(Site(name, 0, "output")), "value", stats, scalars)


def _moment_noise(x: torch.Tensor, axis: int, batch: int) -> list[torch.Tensor]:
    """Return the relative standard deviations of a batch's mean and variance [C], from samples [held, rows, ...]."""
    rows = x.movedim(axis + 1 if axis >= 0 else axis, -1).flatten(1, -2)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    means = rows.mean(1)
    squares = (rows - means.mean(0)).square_().mean(1)
    variance = squares.mean(0)
    return [(means.var(0) / (batch * variance)).sqrt(), (squares.var(0) / batch).sqrt() / variance]
