"""Population: a held batch run with batch statistics and with running statistics, and how far the outputs lie apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from normscope.core.site import Site
from normscope.linalg.problem import Problem
from normscope.linalg.protect import undisturbed
from normscope.norms.recognize import NormParts
from normscope.probes import hooks, layout, moments
from normscope.probes.summary import Row, channel_row
from normscope.probes.transfer import to_host

MAX_BATCHES = 4  # held batches that a snapshot runs


def measure(problem: Problem, norms: Mapping[str, NormParts]) -> dict[str, list[Row]]:
    """Run held batches in both modes of normalization; all else is in evaluation mode, dropout off.

    gap = |y_batch - y_population|_2 / |y_batch|_2 over the model's outputs.

    Args:
        problem: model, loss and batches.
        norms: normalization layers of the model, by name.

    Returns:
        Rows by phase: "batch" and "population".
    """
    layers = {name: module for name, module in problem.model.named_modules() if name in norms}
    batches = problem.take(MAX_BATCHES)
    with undisturbed(problem.model):
        for module in problem.model.modules():
            module.training = False  # not eval(): an overridden train() may merge weights or freeze layers
        population, population_loss, outputs = _run(problem, batches, layers, norms)
        for name, module in layers.items():
            module.training = norms[name].has_running
        batch, batch_loss, reference = _run(problem, batches, layers, norms)
    difference = sum(float((a - b).square().sum()) for a, b in zip(outputs, reference, strict=True))
    norm = sum(float(b.square().sum()) for b in reference)
    gap = (difference / norm) ** 0.5 if norm > 0 else float("nan")
    root = str(Site("", 0, "output"))
    samples = float(sum(output.shape[0] if output.dim() else 1 for output in outputs))
    end = {"loss": population_loss, "gap": gap, "n": samples}
    return {
        "batch": [*batch, channel_row(root, "value", {}, {"loss": batch_loss, "n": samples})],
        "population": [*population, channel_row(root, "value", {}, end)],
    }


def _run(
    problem: Problem, batches: Iterable[Any], layers: Mapping[str, nn.Module], norms: Mapping[str, NormParts]
) -> tuple[list[Row], float, list[torch.Tensor]]:
    collected: dict[str, moments.Moments] = {}

    def listen(name: str, output: object) -> None:
        for slot, tensor in layout.tensors(output):
            if not layout.why_unmeasured(tensor):
                site = str(Site(name, 0, slot))
                state = moments.observe(layout.channeled(tensor, norms[name].axis))
                collected[site] = moments.merge(collected[site], state) if site in collected else state

    losses, outputs = [], []
    with hooks.listening(layers, listen):
        for batch in batches:
            output, target = problem.forward(problem.model, batch)
            losses.append(problem.loss(output, target).detach().reshape(()))
            outputs += [t.detach().double() for _, t in layout.tensors(output) if t.dtype.is_floating_point][:1]
    found = [moments.Moments(state.n, *to_host((state.mean, state.var))) for state in collected.values()]
    rows = [
        channel_row(site, "value", moments.compute(state), {})
        for site, state in zip(collected, moments.states(found), strict=True)
    ]
    return rows, float(np.mean(to_host(losses))), outputs
