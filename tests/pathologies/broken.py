"""Broken runs: an otherwise healthy run of one of three families with one defect each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import normscope as ns
from normscope import workbench
from normscope.core.record import Record
from tests.pathologies.case import Case
from tests.pathologies.setup import (
    Batch,
    Setup,
    adamw,
    cnn,
    digits,
    group_norm,
    mlp,
    sgd,
    stream,
    transformer,
)

Defect = Callable[[Setup], None]


def module(setup: Setup, name: str) -> Any:
    """Return a module by name."""
    return setup.model.get_submodule(name)


def norms(setup: Setup) -> list[Any]:
    """Return the normalization layers of a setup's model."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return [m for m in setup.model.modules() if isinstance(m, kinds)]


def with_norms(**values: Any) -> Defect:
    """Set attributes of all normalization layers."""

    def change(setup: Setup) -> None:
        for norm in norms(setup):
            for name, value in values.items():
                setattr(norm, name, value)

    return change


def with_rate(factor: float) -> Defect:
    """Multiply all learning rates."""

    def change(setup: Setup) -> None:
        for group in setup.optimizers[0].param_groups:
            group["lr"] *= factor

    return change


def with_batches(make: Callable[[Iterator[Batch]], Iterator[Batch]]) -> Defect:
    """Pass the stream of batches through a function."""

    def change(setup: Setup) -> None:
        setup.batches = make(setup.batches)

    return change


def together(*defects: Defect) -> Defect:
    """Join changes."""

    def change(setup: Setup) -> None:
        for defect in defects:
            defect(setup)

    return change


def lasting(steps: int, every: int = 10) -> Defect:
    """Set the length of the run."""

    def change(setup: Setup) -> None:
        setup.steps, setup.every = steps, every

    return change


# ---- signal, gradient, units -----------------------------------------------------------------------------------------


def scaled_init(gain: float) -> Defect:
    """Multiply each initial weight matrix."""

    def change(setup: Setup) -> None:
        with torch.no_grad():
            for p in setup.model.parameters():
                if p.dim() > 1:
                    p.mul_(gain)

    return change


def shifted_bias(name: str, by: float) -> Defect:
    """Add to the bias of a module."""

    def change(setup: Setup) -> None:
        with torch.no_grad():
            module(setup, name).bias.add_(by)

    return change


def tanh_net() -> Setup:
    """Build a perceptron of tanh units, healthy with Xavier's initialization."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise([784, 48, 48, 48, 48]):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_normal_(linear.weight)
        layers += [linear, nn.Tanh()]
    return mlp(model=nn.Sequential(*layers, nn.Linear(48, 10)))


def zeroed_gain(name: str) -> Defect:
    """Set the gain of a normalization layer to 0 and keep it there."""

    def change(setup: Setup) -> None:
        norm = module(setup, name)
        nn.init.zeros_(norm.weight)
        norm.weight.requires_grad_(False)

    return change


def constant_group(setup: Setup) -> None:
    """Divide by the square root of a variance of 0: filters of zeros before a norm with eps 0."""
    conv, norm = module(setup, "stage1.block1.conv1"), module(setup, "stage1.block1.norm1")
    nn.init.zeros_(conv.weight[:4].data)
    norm.eps = 0.0


def exploding_channel(setup: Setup) -> None:
    """Give one channel of a norm's gain a thousandfold size, where nothing after it takes it away."""
    with torch.no_grad():
        module(setup, "block1.norm2").weight[5] = 3000.0


def fast_queries(setup: Setup) -> None:
    """Give the projections of attention a learning rate a hundred times that of the rest."""
    (optimizer,) = setup.optimizers
    fast = [p for name, p in setup.model.named_parameters() if ".qkv." in name]
    ids = {id(p) for p in fast}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    optimizer.add_param_group({"params": fast, "lr": 100 * optimizer.param_groups[0]["lr"]})


def large_adam_eps(setup: Setup) -> None:
    """Give Adam an eps larger than gradients are."""
    for group in setup.optimizers[0].param_groups:
        group["eps"] = 0.1


def residual_without_norm() -> Setup:
    """Build a deep residual perceptron with normalization, each branch as large as its shortcut."""
    return mlp(model=_residual(nn.LayerNorm))


def without_branch_norms(setup: Setup) -> None:
    """Replace the branches' norms by nothing."""
    for name, _ in list(setup.model.named_modules()):
        if name.endswith("norm"):
            setup.model.get_submodule(name.rpartition(".")[0]).norm = nn.Identity()
    for optimizer in setup.optimizers:
        optimizer.param_groups[1]["params"] = [p for p in setup.model.parameters() if p.dim() <= 1]


class _Residual(nn.Module):
    def __init__(self, width: int, norm: Any) -> None:
        super().__init__()
        self.norm = norm(width)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.linear1.weight)
        nn.init.kaiming_normal_(self.linear2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear2(torch.relu(self.linear1(self.norm(x))))


def _residual(norm: Any, width: int = 32, depth: int = 12) -> nn.Sequential:
    blocks = [_Residual(width, norm) for _ in range(depth)]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 10))


# ---- statistics ------------------------------------------------------------------------------------------------------


def foreign_statistics(setup: Setup) -> None:
    """Keep running statistics of brighter images of lower contrast, as of another data set."""
    for norm in norms(setup):
        norm.momentum = 1e-9
    inputs, _ = next(stream(256, seed=3))
    other = copy.deepcopy(setup.model)
    for norm in (m for m in other.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        other(0.2 * inputs + 3)
    setup.model.load_state_dict(other.state_dict())


def evaluation_mode(setup: Setup) -> None:
    """Train in evaluation mode."""
    setup.model.eval()


def validation_in_training_mode(setup: Setup) -> None:
    """Validate after each step without eval()."""
    model, (images, _) = setup.model, digits()[1]

    def act(step: int) -> None:
        with torch.no_grad():
            model(images[:64] * 3)

    setup.after.append(act)


def checkpointed(setup: Setup) -> None:
    """Run a stage a second time in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    stage = module(setup, "stage2")
    setup.model.stage2 = _Checkpointed(stage, checkpoint)


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, checkpoint: Any) -> None:
        super().__init__()
        self.inner, self.checkpoint = inner, checkpoint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.checkpoint(self.inner, x, use_reentrant=False)


def averaged_with_stale_buffers(setup: Setup) -> Record:
    """Train, and look at the average of the weights, whose buffers are those of the start."""
    average = copy.deepcopy(setup.model)
    for _ in range(setup.steps):
        inputs, targets = next(setup.batches)
        setup.optimizers[0].zero_grad()
        setup.loss(setup.model(inputs), targets).backward()
        setup.optimizers[0].step()
        with torch.no_grad():
            for mean, p in zip(average.parameters(), setup.model.parameters(), strict=True):
                mean.lerp_(p, 0.1)
    return ns.examine(average, setup.loss, [next(setup.batches) for _ in range(12)], progress=False)


class _Pyramid(nn.Module):
    """Levels of one pyramid through one head: bright and coarse, dark and fine."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 16, 3, 2, 1)
        self.conv = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = torch.relu(self.stem_norm(self.stem(x)))
        coarse = 4 * torch.relu(self.down(fine)) + 2
        levels = [torch.relu(self.norm(self.conv(level))).mean((2, 3)) for level in (fine, coarse)]
        return self.head(torch.cat(levels, 1))


class _PyramidOfNorms(_Pyramid):
    def __init__(self) -> None:
        super().__init__()
        self.norm2 = nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = torch.relu(self.stem_norm(self.stem(x)))
        coarse = 4 * torch.relu(self.down(fine)) + 2
        levels = [torch.relu(n(self.conv(v))).mean((2, 3)) for n, v in ((self.norm, fine), (self.norm2, coarse))]
        return self.head(torch.cat(levels, 1))


def pyramid(kind: type[nn.Module] = _Pyramid) -> Setup:
    """Build a network whose head runs at two levels."""
    return mlp(model=kind())


# ---- batches ---------------------------------------------------------------------------------------------------------


def sorted_by_class(size: int = 32) -> Defect:
    """Take batches of one class each."""

    def change(setup: Setup) -> None:
        images, labels = digits()[0]
        order = labels.argsort(stable=True)
        chunks = order[: len(order) // size * size].view(-1, size)
        setup.batches = itertools.cycle((images[index], labels[index]) for index in chunks[torch.randperm(len(chunks))])

    return change


def repeated(times: int) -> Defect:
    """Fill batches with copies of a few samples."""

    def make(batches: Iterator[Batch]) -> Iterator[Batch]:
        for inputs, targets in batches:
            few = torch.arange(len(inputs)) % (len(inputs) // times)
            yield inputs[few], targets[few]

    return with_batches(make)


def alternating(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Take every other batch from images of inverted, weaker contrast."""
    for number, (inputs, targets) in enumerate(batches):
        yield (inputs if number % 2 else 1.5 - 0.5 * inputs), targets


def sized(batch: int, accumulate: int = 1) -> Defect:
    """Set the size of a forward pass's batch."""

    def change(setup: Setup) -> None:
        setup.batches, setup.accumulate = stream(batch), accumulate

    return change


def raw_pixels(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Give pixels of 0 to 255."""
    for inputs, targets in batches:
        yield (inputs + 0.4242) * 78.6, targets


# ---- layers ----------------------------------------------------------------------------------------------------------


def dropout_before_norm() -> Setup:
    """Build a perceptron with dropout after its activations."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise([784, 48, 48, 48]):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return mlp(model=nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(48, 10)))


def moved_dropout(setup: Setup) -> None:
    """Put dropout in front of each norm."""
    layers: list[nn.Module] = []
    for layer in setup.model:  # type: ignore[union-attr]
        if isinstance(layer, nn.Dropout):
            continue
        layers += [nn.Dropout(0.5), layer] if isinstance(layer, nn.BatchNorm1d) else [layer]
    setup.model = nn.Sequential(*layers)
    setup.optimizers = [sgd(setup.model)]


def biased_convolutions(setup: Setup) -> None:
    """Give the convolutions before norms a bias."""
    for child in list(setup.model.modules()):
        if isinstance(child, nn.Conv2d):
            child.bias = nn.Parameter(torch.zeros(child.out_channels))
    setup.optimizers = [sgd(setup.model)]


def one_channel_groups() -> Setup:
    """Build a CNN that ends in maps of one pixel, with four channels a group."""
    return cnn(group_norm, channels=4, blocks=(1, 1, 1, 1, 1), batch=16)


def as_many_groups(setup: Setup) -> None:
    """Make each channel a group."""
    for norm in norms(setup):
        norm.num_groups = norm.num_channels


def without_norm(name: str) -> Defect:
    """Take one normalization layer away."""

    def change(setup: Setup) -> None:
        parent, _, child = name.rpartition(".")
        setattr(module(setup, parent), child, nn.Identity())
        setup.optimizers = [adamw(setup.model)]

    return change


def whitening() -> Setup:
    """Build a CNN with whitening in groups of four."""
    return cnn(
        lambda channels: ns.norms.build("decorrelated-batch", channels, groups=channels // 4), channels=16, blocks=(1,)
    )


def whitening_whole(setup: Setup) -> None:
    """Whiten all features of a perceptron together, from batches smaller than their number."""
    setup.model = workbench.mlp(
        [784, 96, 96, 10], lambda features: ns.norms.build("decorrelated-batch", features, groups=1)
    )
    setup.optimizers, setup.batches = [sgd(setup.model)], stream(64)


# ---- optimization ----------------------------------------------------------------------------------------------------


def all_decayed(decay: float) -> Defect:
    """Decay every parameter alike."""

    def change(setup: Setup) -> None:
        old = setup.optimizers[0]
        settings = {name: old.defaults[name] for name in ("lr", "momentum") if name in old.defaults}
        setup.optimizers = [type(old)(setup.model.parameters(), weight_decay=decay, **settings)]

    return change


def decayed(decay: float) -> Defect:
    """Set the decay of the matrices."""

    def change(setup: Setup) -> None:
        setup.optimizers[0].param_groups[0]["weight_decay"] = decay

    return change


def frozen(name: str) -> Defect:
    """Freeze one module."""

    def change(setup: Setup) -> None:
        module(setup, name).requires_grad_(False)

    return change


def forgotten(name: str) -> Defect:
    """Leave one module's parameters out of the optimizer."""

    def change(setup: Setup) -> None:
        left = {id(p) for p in module(setup, name).parameters()}
        for group in setup.optimizers[0].param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in left]

    return change


def ended_schedule(setup: Setup) -> None:
    """Step a schedule for 20 epochs once a batch."""
    schedule = torch.optim.lr_scheduler.LambdaLR(setup.optimizers[0], lambda step: max(0.0, 1 - step / 20))
    setup.after.append(lambda step: schedule.step())


def clipped(at: float) -> Defect:
    """Clip the gradient norm."""

    def change(setup: Setup) -> None:
        setup.clip = at

    return change


def uncleared(setup: Setup) -> None:
    """Forget zero_grad."""
    setup.clears = False


def tied(setup: Setup) -> None:
    """Tie the output to token embeddings that have torch's standard deviation of 1."""
    setup.model.head.weight = setup.model.embedding.token.weight  # type: ignore[union-attr]
    setup.optimizers = [adamw(setup.model)]


def dropped_rate(setup: Setup) -> None:
    """Train to equilibrium with strong decay and drop the learning rate to a tenth."""
    setup.optimizers = [sgd(setup.model, lr=0.2, decay=0.02)]
    lasting(300)(setup)

    def act(step: int) -> None:
        if step == 200:
            with_rate(0.1)(setup)

    setup.before.append(act)


def full_batch() -> Setup:
    """Build a perceptron that plain gradient descent trains on one batch."""
    setup = mlp(None, width=32, depth=3)
    batch = next(stream(256))
    setup.batches, setup.held = itertools.repeat(batch), batch
    setup.optimizers = [torch.optim.SGD(setup.model.parameters(), lr=0.02)]
    return setup


def half_precision(dtype: torch.dtype) -> Callable[[], Setup]:
    """Build a perceptron under autocast, with a gradient scaler for float16."""

    def build() -> Setup:
        setup = mlp(nn.LayerNorm)
        setup.autocast = dtype
        setup.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if dtype == torch.float16 else None
        return setup

    return build


def overflowing(setup: Setup) -> None:
    """Multiply the first layer's weight so that its output is beyond 65504."""
    with torch.no_grad():
        module(setup, "layer2.linear").weight.mul_(1e6)


def bf16_weights(rate: float) -> Defect:
    """Keep the weights themselves in bfloat16, with a learning rate too small for them."""

    def change(setup: Setup) -> None:
        setup.model.bfloat16()
        setup.optimizers = [adamw(setup.model, lr=rate)]

    return change


# a family with another norm, by name
GN, LN, RMS = group_norm, nn.LayerNorm, nn.RMSNorm
CNN_GN = partial(cnn, GN)
MLP_LN, MLP_NONE, DEEP = partial(mlp, LN), partial(mlp, None), partial(mlp, None, width=32, depth=16)
LM_RMS = partial(transformer, RMS)
DRIFT = ("mismatch.running-statistics", "mismatch.never-updated", "mismatch.train-eval-gap", "mismatch.momentum")
RATE = ("training.learning-rate", "run.diverged", "scale.effective-rate")
SIGNAL, GRADIENT = ("propagation.signal-exploding",), ("propagation.gradient-exploding",)
FADING = ("propagation.signal-vanishing", "propagation.gradient-vanishing")

BROKEN: tuple[Case, ...] = (
    Case("rate-30x-cnn", "cnn", cnn, with_rate(30), RATE),
    Case("rate-30x-mlp", "mlp", MLP_NONE, with_rate(30), RATE),
    Case("rate-30x-transformer", "transformer", transformer, with_rate(30), RATE),
    Case("schedule-ended", "cnn", cnn, ended_schedule, ("training.learning-rate",)),
    Case("rate-low-cnn", "cnn", cnn, with_rate(1e-5), ("training.learning-rate",)),
    Case("rate-low-transformer", "transformer", LM_RMS, with_rate(1e-4), ("training.learning-rate",)),
    Case("exploding-init", "mlp", DEEP, scaled_init(10), SIGNAL + GRADIENT),
    Case("vanishing-init", "mlp", DEEP, scaled_init(0.5), FADING),
    Case("dead-relus", "mlp", mlp, shifted_bias("layer2.norm", -8), ("propagation.dead-units",), ("layer2.*",)),
    Case(
        "dead-relus-cnn",
        "cnn",
        CNN_GN,
        shifted_bias("stage2.block1.norm1", -8),
        ("propagation.dead-units",),
        ("stage2.block1.*",),
    ),
    Case("saturation", "mlp", tanh_net, scaled_init(12), ("propagation.saturated-units",)),
    Case(
        "norm-missing",
        "transformer",
        partial(transformer, layers=3),
        without_norm("block2.norm2"),
        ("structure.missing-norm",),
        ("block2*",),
    ),
    Case("gain-zero", "mlp", mlp, zeroed_gain("layer2.norm"), ("scale.gain-collapse",), ("layer2.norm*",)),
    Case("eps-large", "mlp", mlp, with_norms(eps=0.1), ("propagation.eps-dominates", "structure.eps")),
    Case("eps-large-transformer", "transformer", LM_RMS, with_norms(eps=0.1), ("structure.eps",)),
    Case("eps-zero", "cnn", CNN_GN, constant_group, ("propagation.non-finite",), ("stage1.block1.norm1*",)),
    Case(
        "momentum-0", "cnn", cnn, with_norms(momentum=0.0), ("mismatch.momentum", "mismatch.never-updated"), ("*norm*",)
    ),
    Case("momentum-small", "mlp", mlp, with_norms(momentum=1e-4), ("mismatch.momentum",), ("*norm*",)),
    Case("momentum-1", "cnn", cnn, with_norms(momentum=1.0), ("mismatch.momentum",), ("*norm*",)),
    Case("foreign-statistics", "cnn", cnn, foreign_statistics, DRIFT, ("*norm*",)),
    Case("evaluation-mode", "cnn", cnn, evaluation_mode, ("mismatch.evaluation-mode",), ("*norm*",)),
    Case("updated-twice", "mlp", mlp, validation_in_training_mode, ("mismatch.updated-twice",), ("*norm*",)),
    Case("updated-twice-checkpoint", "cnn", cnn, checkpointed, ("mismatch.updated-twice",), ("stage2*norm*",)),
    Case("stale-buffers", "cnn", cnn, lambda setup: None, DRIFT, ("*norm*",), averaged_with_stale_buffers),
    Case("shared-norm", "cnn", pyramid, lambda setup: None, ("structure.shared-norm", *DRIFT), ("norm*",)),
    Case("batch-2", "mlp", mlp, sized(2), ("noise.small-batch",), ("*norm*",)),
    Case(
        "batch-2-cnn",
        "cnn",
        partial(cnn, blocks=(1, 1, 1)),
        together(sized(2), lasting(160)),
        ("noise.small-batch",),
        ("*norm*",),
    ),
    Case("accumulation", "mlp", mlp, sized(2, 8), ("noise.small-batch",), ("*norm*",)),
    Case("sorted", "cnn", cnn, sorted_by_class(), ("noise.batches-not-random",)),
    Case("sorted-mlp", "mlp", mlp, sorted_by_class(), ("noise.batches-not-random",)),
    Case("duplicates", "mlp", mlp, repeated(8), ("noise.batches-not-random", "noise.small-batch")),
    Case("two-domains", "cnn", cnn, with_batches(alternating), ("noise.batches-not-random", *DRIFT)),
    Case("dropout-before-norm", "mlp", dropout_before_norm, moved_dropout, ("structure.dropout-before-norm",)),
    Case("gain-decay", "cnn", cnn, all_decayed(5e-4), ("scale.gain-decay",), ("*norm*",)),
    Case(
        "no-decay",
        "mlp",
        mlp,
        together(decayed(0.0), with_rate(4), lasting(400)),
        ("scale.decay", "scale.effective-rate"),
    ),
    Case("decay-100x", "cnn", cnn, together(decayed(0.5), lasting(200)), ("training.decay",)),
    Case(
        "decay-100x-transformer",
        "transformer",
        transformer,
        together(decayed(10.0), lasting(200)),
        ("training.decay",),
    ),
    Case("bias-before-norm", "cnn", cnn, biased_convolutions, ("scale.bias-before-norm",), ("*conv*",)),
    Case("whitening-small-batch", "mlp", mlp, whitening_whole, ("noise.whitening-batch",), ("*norm*",)),
    Case("one-value-groups", "cnn", one_channel_groups, as_many_groups, ("structure.few-values",), ("stage5*",)),
    Case(
        "fp16-overflow",
        "mlp",
        half_precision(torch.float16),
        overflowing,
        ("propagation.non-finite", "run.skipped-steps"),
        (),
    ),
    Case(
        "frozen-layer",
        "transformer",
        transformer,
        frozen("block1.mlp.expand"),
        ("training.untrained",),
        ("block1.mlp.expand*",),
    ),
    Case(
        "forgotten-layer",
        "cnn",
        cnn,
        forgotten("stage2.block1.conv2"),
        ("optimizer.missing-parameters",),
        ("stage2.block1.conv2*",),
    ),
    Case("always-clipped", "transformer", transformer, clipped(1e-3), ("training.clipping",)),
    Case("always-clipped-mlp", "mlp", MLP_LN, clipped(0.01), ("training.clipping",)),
    Case("uncleared", "mlp", MLP_LN, uncleared, ("training.uncleared-gradients",)),
    Case("raw-pixels", "mlp", MLP_NONE, with_batches(raw_pixels), ("training.input-scale",)),
    Case(
        "exploding-channel",
        "transformer",
        transformer,
        exploding_channel,
        ("propagation.outlier-channels",),
        ("block1.*",),
    ),
    Case("no-norm-at-depth", "mlp", residual_without_norm, without_branch_norms, SIGNAL + GRADIENT),
    Case("tied-scaled", "transformer", transformer, tied, ("training.initial-loss",), ("head*",)),
    Case("rate-dropped", "mlp", mlp, dropped_rate, ("scale.equilibrium",), ("*linear*",)),
    Case(
        "too-sharp", "mlp", full_batch, together(with_rate(25), lasting(80, 4)), ("curvature.edge-of-stability", *RATE)
    ),
    Case("fast-queries", "transformer", transformer, fast_queries, ("attention.logits-grow",), ("block*.attention*",)),
    Case("large-adam-eps", "transformer", transformer, large_adam_eps, ("precision.adam-eps",)),
    Case(
        "bf16-stuck",
        "transformer",
        LM_RMS,
        bf16_weights(1e-5),
        ("training.stuck-weights", "optimizer.decay-lost", "optimizer.gains-stuck"),
    ),
)
