"""Healthy runs: varied in width, depth, norm, optimizer and batch size; none may get a warning."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import normscope as ns
from tests.pathologies.broken import half_precision, lasting, module, norms, together
from tests.pathologies.case import Case
from tests.pathologies.setup import Batch, Setup, adamw, cnn, group_norm, mlp, transformer


def noisy_labels(setup: Setup) -> None:
    """Replace half of the labels by random ones, which is no matter of normalization."""
    generator = torch.Generator().manual_seed(5)

    def make(batches: Iterator[Batch]) -> Iterator[Batch]:
        for inputs, targets in batches:
            random = torch.randint(10, targets.shape, generator=generator)
            yield inputs, torch.where(torch.rand(targets.shape, generator=generator) < 0.5, random, targets)

    setup.batches = make(setup.batches)


def frozen_statistics(setup: Setup) -> None:
    """Train to the end of a schedule, then keep BatchNorm in evaluation mode, as detectors do."""
    for step in range(160):
        inputs, targets = next(setup.batches)
        for group in setup.optimizers[0].param_groups:
            group["lr"] = 0.05 * (1 - step / 160)
        setup.optimizers[0].zero_grad()
        setup.loss(setup.model(inputs), targets).backward()
        setup.optimizers[0].step()
    for norm in norms(setup):
        norm.eval()
    for group in setup.optimizers[0].param_groups:
        group["lr"] = 0.002


def annealed(setup: Setup) -> None:
    """Let the learning rate fall along a cosine after a warm-up."""
    optimizer, warm = setup.optimizers[0], 10
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setup.steps - warm),
        ],
        [warm],
    )
    setup.after.append(lambda step: schedule.step())


def with_adamw(lr: float) -> Any:
    """Train with AdamW."""

    def change(setup: Setup) -> None:
        setup.optimizers = [adamw(setup.model, lr=lr, decay=0.01)]

    return change


def with_muon(setup: Setup) -> None:
    """Train the matrices of the blocks with Muon and the rest with AdamW."""
    matrices = [p for name, p in setup.model.named_parameters() if p.dim() == 2 and name.startswith("block")]
    others = [p for p in setup.model.parameters() if all(p is not m for m in matrices)]
    setup.optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1), torch.optim.AdamW(others, lr=2e-3)]


def massive(setup: Setup) -> None:
    """Give the first token huge values in two channels of the residual stream, as trained language models have."""
    with torch.no_grad():
        module(setup, "embedding.place").weight[0, 3] = 300.0
        module(setup, "embedding.place").weight[0, 7] = -150.0


def clipped_at_first(setup: Setup) -> None:
    """Clip at a norm that only the first steps exceed."""
    setup.clip = 2.0


def head_alone(setup: Setup) -> None:
    """Fine-tune the head of a frozen network in evaluation mode."""
    frozen_statistics(setup)
    setup.model.requires_grad_(False)
    module(setup, "head").requires_grad_(True)
    setup.model.eval()
    setup.optimizers = [torch.optim.SGD(module(setup, "head").parameters(), lr=0.05, momentum=0.9)]


def regression() -> Setup:
    """Build a perceptron that predicts a number from digits."""
    setup = mlp(nn.LayerNorm)
    setup.model.head = nn.Linear(48, 1)  # type: ignore[union-attr]
    setup.optimizers = [adamw(setup.model, lr=1e-3, decay=0.01)]
    setup.loss = lambda output, target: ((output[:, 0] - target.float()) ** 2).mean()
    return setup


def lbfgs_free() -> Setup:
    """Build a small perceptron without normalization, initialized for its ReLUs, with plain gradient descent."""
    setup = mlp(None, width=64, depth=2)
    for layer in setup.model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    setup.optimizers = [torch.optim.SGD(setup.model.parameters(), lr=0.05)]
    return setup


def zoo(name: str, **options: Any) -> Any:
    """Return a factory of a layer of the table."""
    return lambda channels: ns.norms.build(name, channels, **options)


HEALTHY: tuple[Case, ...] = (
    Case("healthy-cnn", "cnn", cnn),
    Case("healthy-cnn-wide", "cnn", partial(cnn, channels=16, blocks=(1, 1), batch=64), lasting(60)),
    Case("healthy-cnn-deep", "cnn", partial(cnn, channels=8, blocks=(3, 3, 3), batch=32), lasting(60, 6)),
    Case("healthy-cnn-group", "cnn", partial(cnn, group_norm)),
    Case("healthy-cnn-16", "cnn", partial(cnn, batch=16), lasting(160)),
    Case("healthy-cnn-annealed", "cnn", cnn, together(lasting(200), annealed)),
    Case("healthy-cnn-adamw", "cnn", cnn, with_adamw(2e-3)),
    Case("healthy-cnn-frozen-statistics", "cnn", cnn, frozen_statistics),
    Case("healthy-cnn-head", "cnn", cnn, head_alone),
    Case("healthy-cnn-noisy-labels", "cnn", cnn, noisy_labels),
    Case("healthy-cnn-iterative", "cnn", partial(cnn, zoo("iterative", groups=2)), lasting(60)),
    Case("healthy-cnn-clipped", "cnn", cnn, clipped_at_first),
    Case("healthy-mlp", "mlp", mlp),
    Case("healthy-mlp-layer", "mlp", partial(mlp, nn.LayerNorm, width=64, depth=6)),
    Case("healthy-mlp-rms-adamw", "mlp", partial(mlp, nn.RMSNorm), with_adamw(3e-3)),
    Case("healthy-mlp-256", "mlp", partial(mlp, batch=256, width=96), lasting(60)),
    Case("healthy-mlp-noisy-labels", "mlp", mlp, noisy_labels),
    Case("healthy-mlp-plain", "mlp", lbfgs_free),
    Case("healthy-mlp-regression", "mlp", regression),
    Case("healthy-mlp-bf16", "mlp", half_precision(torch.bfloat16)),
    Case("healthy-mlp-fp16", "mlp", half_precision(torch.float16)),
    Case("healthy-transformer", "transformer", transformer),
    Case("healthy-transformer-rms", "transformer", partial(transformer, nn.RMSNorm, layers=4)),
    Case("healthy-transformer-muon", "transformer", partial(transformer, width=48), with_muon),
    Case("healthy-transformer-annealed", "transformer", transformer, together(lasting(240), annealed)),
    Case("healthy-transformer-massive", "transformer", transformer, massive),
    Case("healthy-transformer-32", "transformer", partial(transformer, batch=32), lasting(60)),
)
