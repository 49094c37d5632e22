"""Spikes made on purpose: a healthy run whose loss jumps once, from a known cause that begins in a known tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normscope import workbench
from tests.pathologies.case import Case
from tests.pathologies.setup import Batch, Setup, adamw, cnn, group_norm, mlp, transformer

AT = 200  # the step at which the cause begins, late enough that the run has settled
STEPS = 260
Defect = Callable[[Setup], None]


class Attention(nn.Module):
    """Causal self-attention with a projection each for queries and keys, and a norm of each if wanted."""

    def __init__(self, width: int, heads: int, norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def long(setup: Setup, optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None) -> Setup:
    """Make a setup long enough, and give it another optimizer if wanted."""
    setup.steps, setup.every = STEPS, 20
    setup.held = tuple(part[:32] for part in setup.held)  # type: ignore[assignment]  # a pair
    if optimizer is not None:
        setup.optimizers = [optimizer(setup.model)]
    return setup


def mlp_adamw() -> Setup:
    """Build a perceptron without norms, with AdamW."""
    return long(mlp(None, batch=128), partial(adamw, lr=1e-2))


def cnn_sgd() -> Setup:
    """Build the residual CNN with SGD."""
    return long(cnn())


def mlp_sgd() -> Setup:
    """Build the perceptron with SGD."""
    return long(mlp())


def averages(batch: int = 32, places: int = 16) -> Iterator[Batch]:
    """Return digits, and at each place the mean of those up to it, rounded: what attention alone can know."""
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(8, (batch, places), generator=generator)
        yield tokens, (tokens.cumsum(1) / torch.arange(1, places + 1)).round().long()


def decoder(norm: bool = True) -> Setup:
    """Build a decoder with AdamW that averages, with separate projections for queries and keys, normed if wanted."""
    model = workbench.transformer(8, 32, 2, 4, 16)
    for block in (model.block1, model.block2):
        block.attention = Attention(32, 4, norm)
    return long(Setup(model, [adamw(model, lr=1e-2)], averages(), next(averages(256))))


def acts(setup: Setup, act: Callable[[], None], steps: Sequence[int] = (AT,)) -> None:
    """Act before some steps."""
    setup.before.append(lambda now: act() if now in steps else None)


def stale(glob: str, factor: float = 1000) -> Defect:
    """Make some gradients small until the step: their second moments are far too small from there on."""

    def change(setup: Setup) -> None:
        now = [1 / factor]
        for name, parameter in setup.model.named_parameters():
            if fnmatchcase(name, glob):
                parameter.register_hook(lambda g: g * now[0])
        acts(setup, partial(now.__setitem__, 0, 1.0))

    return change


def spoiled(spoil: Callable[[Any, Any], Batch], parts: int = 1) -> Defect:
    """Spoil the batch of the step, or the last of several parts of it, as of one rank."""

    def change(setup: Setup) -> None:
        whole, setup.accumulate = setup.batches, parts

        def make() -> Iterator[Batch]:
            for i, batch in enumerate(whole):
                yield spoil(*batch) if i == (AT + 1) * parts - 1 else batch

        setup.batches = make()

    return change


def not_divided(inputs: torch.Tensor, targets: torch.Tensor) -> Batch:
    """Return inputs in another unit, as of images that were not divided by 255."""
    return inputs * 50, (targets + 3) % 10


def shifted(inputs: torch.Tensor, targets: torch.Tensor) -> Batch:
    """Return targets of other sequences, as of a shard whose labels were written in another order."""
    return inputs, 7 - targets.roll(1, 0)


def apart(setup: Setup, *globs: str) -> dict[str, Any]:
    """Put the tensors whose name matches one of some globs into a parameter group of their own, and return it."""
    optimizer = setup.optimizers[0]
    chosen = [p for name, p in setup.model.named_parameters() if any(fnmatchcase(name, glob) for glob in globs)]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if all(p is not q for q in chosen)]
    optimizer.add_param_group({**optimizer.param_groups[0], "params": chosen})
    return optimizer.param_groups[-1]


def rate(factor: float, *globs: str) -> Defect:
    """Multiply the learning rate at the step, of all tensors or of those whose name matches a glob."""

    def change(setup: Setup) -> None:
        groups = [apart(setup, *globs)] if globs else setup.optimizers[0].param_groups

        def act() -> None:
            for group in groups:
                group["lr"] *= factor

        acts(setup, act)

    return change


def ramp(setup: Setup) -> None:
    """Let the learning rate grow by 8 percent a step, as a range test that nobody stopped."""

    def act() -> None:
        for group in setup.optimizers[0].param_groups:
            group["lr"] *= 1.08

    acts(setup, act, range(AT - 40, STEPS))


def grows(*globs: str, by: float) -> Defect:
    """Give some tensors a decay of the wrong sign for a while: they grow by a fraction at each step."""

    def change(setup: Setup) -> None:
        group = apart(setup, *globs)
        acts(setup, partial(group.__setitem__, "weight_decay", -by / group["lr"]), (AT - 20,))
        acts(setup, partial(group.__setitem__, "weight_decay", 0.0), (AT + 30,))

    return change


def overflows(name: str) -> Defect:
    """Let the gradient of one tensor be infinite at the step."""

    def change(setup: Setup) -> None:
        now = [1.0]
        setup.model.get_parameter(name).register_hook(lambda g: g * now[0])
        acts(setup, partial(now.__setitem__, 0, float("inf")))

    return change


def written(name: str, factor: float) -> Defect:
    """Multiply a weight outside the optimizer, as a faulty device or a wrong checkpoint of one layer does."""

    def change(setup: Setup) -> None:
        acts(setup, lambda: setup.model.get_parameter(name).data.mul_(factor))

    return change


def _spike(name: str, family: str, build: Callable[[], Setup], change: Defect, kind: str, *at: str) -> Case:
    return Case(f"spike-{name}", family, build, change, (f"spikes.{kind}",), at)


SPIKES: tuple[Case, ...] = (
    _spike("stale-layer", "mlp", mlp_adamw, stale("layer?.*"), "second-moment", "layer*"),
    _spike("stale-block", "transformer", decoder, stale("block2.*"), "second-moment", "block2.*"),
    _spike("stale-mlp", "transformer", decoder, stale("block?.mlp.*"), "second-moment", "block?.mlp.*"),
    _spike(
        "qk-growth",
        "transformer",
        partial(decoder, False),
        grows("*.q_proj.*", "*.k_proj.*", by=0.1),
        "attention",
        "*_proj/*",
    ),
    _spike("qk-gains", "transformer", decoder, grows("*.q_norm.*", "*.k_norm.*", by=0.15), "attention", "*_norm/*"),
    _spike("bad-batch-cnn", "cnn", cnn_sgd, spoiled(not_divided), "data"),
    _spike("bad-batch-text", "transformer", decoder, spoiled(shifted), "data"),
    _spike("bad-rank", "mlp", mlp_sgd, spoiled(not_divided, 4), "data"),
    _spike("rate-jump-mlp", "mlp", mlp_sgd, rate(30), "schedule"),
    _spike("rate-jump-decoder", "transformer", decoder, rate(30), "schedule"),
    _spike("rate-ramp", "cnn", cnn_sgd, ramp, "schedule"),
    _spike("rate-of-one-layer", "transformer", decoder, rate(200, "block2.mlp.expand.*"), "schedule", "block2.mlp.*"),
    _spike("overflow", "cnn", cnn_sgd, overflows("stage2.block1.conv1.weight"), "overflow", "stage2.block1.conv1/*"),
    _spike(
        "overflow-decoder", "transformer", decoder, overflows("block1.attention.v_proj.weight"), "overflow", "block1.*"
    ),
    _spike("written-weight", "cnn", cnn_sgd, written("stage2.block1.conv2.weight", -20), "outside", "stage2.*"),
    _spike("exploding-gain", "transformer", decoder, grows("norm.weight", by=0.15), "instability", "norm/*"),
)


def small_batches() -> Setup:
    """Build the perceptron with batches of 16."""
    return long(mlp(batch=16))


def warmed() -> Setup:
    """Build the decoder with a warm-up of 60 steps and a cosine to the end."""
    setup = decoder()
    optimizer = setup.optimizers[0]
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=60)
    rest = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 60)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, rest], [60])
    setup.after.append(lambda step: schedule.step())
    return setup


CALM: tuple[Case, ...] = tuple(
    Case(f"calm-{name}", family, build)
    for name, family, build in (
        ("cnn", "cnn", cnn_sgd),
        ("cnn-group", "cnn", lambda: long(cnn(group_norm))),
        ("cnn-adamw", "cnn", lambda: long(cnn(), adamw)),
        ("mlp", "mlp", mlp_sgd),
        ("mlp-adamw", "mlp", mlp_adamw),
        ("mlp-small-batches", "mlp", small_batches),
        ("decoder", "transformer", decoder),
        ("decoder-no-qk-norm", "transformer", partial(decoder, False)),
        ("decoder-warmed", "transformer", warmed),
        ("text", "transformer", lambda: long(transformer())),
    )
)
