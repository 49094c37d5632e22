"""Awkward models: one tuple of cases, each a model, its optimizers and a training step, on which every law is checked."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from normscope.probes.problem import Problem


@dataclass(frozen=True)
class Job:
    """A training run: `step()` does one iteration, as a user would write it."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    step: Callable[[], object]
    scaler: Any = None
    problem: Problem | None = None


@dataclass(frozen=True)
class Case:
    """An awkward model and the sites by which one sees that it was understood."""

    name: str
    build: Callable[[], Job]
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()  # sites whose gradient must have been recorded
    steps: int = 4
    skipped: tuple[int, ...] = ()  # steps that the gradient scaler skipped
    finite: bool = True  # whether all that was recorded must be finite where it is defined
    raises: type[Exception] | None = None  # the user's own error, in the last step


class CaseError(Exception):
    """The user's own error."""


def loss_of(output: object) -> torch.Tensor:
    """Return a loss for anything that a model returns."""
    if hasattr(output, "__dataclass_fields__"):
        output = [getattr(output, name) for name in output.__dataclass_fields__]
    parts = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    return sum((t - 0.1).abs().pow(2).mean().to(torch.float64) for t in parts)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, momentum=0.9, weight_decay=1e-3)


def job(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float32, held: bool = False, **others: Any) -> Job:
    """Train on random inputs, drawn at every step from torch's own generator, so that a moved random state shows."""
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(torch.randn(*shape, dtype=dtype))).backward()
        optimizer.step()

    if held:
        batch = torch.linspace(-1, 1, int(np.prod(shape)), dtype=dtype).reshape(shape)
        others["problem"] = Problem(model, lambda output, _: loss_of(output.clone().requires_grad_()), [(batch, 0)])
    return Job(model, (optimizer,), step, **others)


class Wrap(nn.Module):
    """A model whose forward is a function of its parts."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


# ---- what modules return ---------------------------------------------------------------------------------------------


@dataclass
class Pair:
    logits: torch.Tensor
    hidden: torch.Tensor


def _pair(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.tanh(x @ self.weight[: x.shape[1]])
    return hidden.sum(1, keepdim=True), hidden


class Returns(nn.Linear):
    """A layer that returns what it computes in some structure."""

    def __init__(self, pack: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        super().__init__(6, 6)
        self.pack = pack

    def forward(self, x: torch.Tensor) -> Any:
        return self.pack(*_pair(self, x))


def dict_output() -> Job:
    body = Returns(lambda logits, hidden: {"logits": logits, "hidden": hidden, "note": "text", "a/input": hidden * 2})
    return job(Wrap(lambda m, x: m.body(x)["hidden"] + m.body(x)["a/input"], body=body), 5, 6)


def nested_output() -> Job:
    body = Returns(lambda logits, hidden: (logits, [hidden, {"deep": (hidden * 2,)}], None))
    return job(Wrap(lambda m, x: m.body(x), body=body), 5, 6)


class OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))

    def forward(self) -> torch.Tensor:
        return self.weight


def integer_output() -> Job:
    choose = Wrap(lambda m, x: x.argmax(1))
    return job(
        Wrap(lambda m, x: m.embed(m.choose(m.lin(x))), lin=nn.Linear(6, 6), choose=choose, embed=nn.Embedding(6, 4)),
        5,
        6,
    )


class ComplexLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.complex64) @ self.weight


def scalar_output() -> Job:
    loss = Wrap(lambda m, x: x.square().mean())
    return job(Wrap(lambda m, x: m.loss(m.lin(x)), lin=nn.Linear(6, 6), loss=loss), 5, 6)


def nested_tensor() -> Job:
    """A module that returns a nested tensor, which has no shape."""
    ragged = Wrap(lambda m, x: torch.nested.as_nested_tensor([x[:2], x[2:]]))
    joined = Wrap(lambda m, x: x.to_padded_tensor(0.0))

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return m.last(m.joined(m.ragged(m.lin(x))))

    return job(Wrap(run, lin=nn.Linear(6, 6), ragged=ragged, joined=joined, last=nn.Linear(6, 2)), 5, 6)


def inference_tensor() -> Job:
    """A frozen trunk under inference mode, and a module that passes on what it returned."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            features = m.trunk(x)
        return m.head(m.passed(features).clone())

    return job(Wrap(run, trunk=nn.Linear(6, 6), passed=nn.Identity(), head=nn.Linear(6, 2)), 5, 6)


# ---- how modules are called ------------------------------------------------------------------------------------------


def inplace_relu() -> Job:
    return job(
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 2)), 16, 6, held=True
    )


def shared_twice() -> Job:
    return job(Wrap(lambda m, x: m.a(torch.relu(m.a(x))), a=nn.Linear(6, 6)), 5, 6)


def shared_alias() -> Job:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared))
    return job(model, 5, 6)


def tied_weights() -> Job:
    model = Wrap(
        lambda m, x: m.decode(m.norm(m.embed(x))),
        embed=nn.Embedding(9, 6),
        norm=nn.LayerNorm(6),
        decode=nn.Linear(6, 9),
    )
    model.decode.weight = model.embed.weight
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(torch.randint(0, 9, (4, 5)))).backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def gru_cell() -> Job:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(x.shape[0], 4)
        for _ in range(40):
            state = m.cell(x, state)
        return state

    return job(Wrap(run, cell=nn.GRUCell(6, 4)), 5, 6)


def attention() -> Job:
    model = Wrap(
        lambda m, x: m.norm(x + m.attention(x, x, x)[0]),
        attention=nn.MultiheadAttention(8, 2, dropout=0.1),
        norm=nn.LayerNorm(8),
    )
    return job(model, 5, 3, 8)


def functional_container() -> Job:
    block = Wrap(lambda m, x: torch.relu_(m.norm(m.lin(x)) + x), lin=nn.Linear(6, 6), norm=nn.BatchNorm1d(6))
    return job(nn.Sequential(block, nn.Linear(6, 2)), 8, 6)


def checkpointed(reentrant: bool) -> Job:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = m.first(x)
        return m.last(checkpoint(m.block, hidden, use_reentrant=reentrant))

    block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.ReLU(), nn.Linear(6, 6))
    return job(Wrap(run, first=nn.Linear(6, 6), block=block, last=nn.Linear(6, 2)), 8, 6)


def keywords_only() -> Job:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.last(input=m.norm(input=m.lin(input=x)))

    return job(Wrap(run, lin=nn.Linear(6, 6), norm=nn.LayerNorm(6), last=nn.Linear(6, 2)), 5, 6)


def stochastic_depth() -> Job:
    """A block that is skipped at random: by Python's generator and by numpy's."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        for block in (m.one, m.two):
            keep = random.random() < 0.7 or np.random.rand() < 0.2
            x = block(x) if keep else x
        return m.last(x)

    def block() -> nn.Module:
        return Wrap(lambda m, x: x + m.inner(x), inner=nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)))

    return job(Wrap(run, one=block(), two=block(), last=nn.Linear(6, 2)), 5, 6, held=True)


def training_step() -> Job:
    """A model whose own forward is never called."""
    model = Wrap(lambda m: None, body=nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), head=nn.Linear(6, 2))
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model.head(torch.relu(model.body(torch.randn(8, 6))))).backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def raises_once() -> Job:
    calls = []

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        hidden = m.lin(x)
        if len(calls) == 4:
            raise CaseError("on purpose")
        return m.norm(hidden)

    return job(Wrap(run, lin=nn.Linear(6, 6), norm=nn.BatchNorm1d(6)), 5, 6)


def width_changes() -> Job:
    """A module without parameters whose output changes its rank and width from step to step."""
    calls: list[int] = []

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return m.passed(m.lin(x)[:, : 2 + len(calls) % 3].reshape((1, 5, -1) if len(calls) % 2 else (5, -1)))

    return job(Wrap(run, lin=nn.Linear(6, 6), passed=nn.Identity()), 5, 6)


# ---- parameters ------------------------------------------------------------------------------------------------------


def sparse_embedding() -> Job:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(torch.randint(0, 9, (3, 4)))).backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def lazy_linear() -> Job:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    return job(model, 5, 6)


def frozen_parameters() -> Job:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model[0].requires_grad_(False)
    return job(model, 5, 6)


def integer_parameter() -> Job:
    """A frozen integer parameter, as quantized weights are, that the optimizer was given too."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    model[0].code = nn.Parameter(torch.arange(6), requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(torch.randn(5, 6))).backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def frozen_norm() -> Job:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    model[1].running_var.fill_(4.0)
    model[1].eval()
    return job(model, 5, 6)


class ReassignedNorm(nn.Module):
    """A batch normalization that replaces its buffers instead of writing into them, and counts in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-5
        self.weight, self.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
        self.register_buffer("running_mean", torch.zeros(6))
        self.register_buffer("running_var", torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0)
            self.running_mean = (0.9 * self.running_mean + 0.1 * mean).detach()
            self.running_var = (0.9 * self.running_var + 0.1 * var).detach()
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


class MergingLinear(nn.Linear):
    """A low-rank adapter that merges into its weight when it is set to evaluation."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.low = nn.Parameter(torch.randn(6, 1) * 0.1)
        self.merged = False

    def train(self, mode: bool = True) -> MergingLinear:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.low.data @ self.low.data.T
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.merged else self.weight + self.low @ self.low.T
        return nn.functional.linear(x, weight, self.bias)


# ---- precision and memory --------------------------------------------------------------------------------------------


def autocast() -> Job:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2))
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model(torch.randn(16, 6)))
        loss.backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def channels_last() -> Job:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.GroupNorm(2, 6), nn.Conv2d(6, 2, 1)
    )
    model = model.to(memory_format=torch.channels_last)
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))).backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def expanded_gradient() -> Job:
    """A sum as loss gives a gradient of stride 0."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 3, 5, 5)).sum().backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def anomaly() -> Job:
    base = inplace_relu()

    def step() -> None:
        with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
            warnings.simplefilter("ignore")
            base.step()

    return Job(base.model, base.optimizers, step)


# ---- loops -----------------------------------------------------------------------------------------------------------


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.ReLU(), nn.Linear(6, 2))


def called_twice() -> Job:
    model = _mlp()
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        loss_of([model(torch.randn(8, 6)), model(torch.randn(4, 6))]).backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def accumulation(times: int = 3) -> Job:
    model = _mlp()
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(times):
            (loss_of(model(torch.randn(8, 6))) / times).backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def gan(critic: int = 1) -> Job:
    """Two optimizers; the critic may step several times a step of the generator."""
    parts = nn.ModuleDict({
        "g": nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)),
        "d": nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)),
    })
    make, judge = parts["g"], parts["d"]
    optimizers = (torch.optim.Adam(make.parameters(), 1e-2), torch.optim.Adam(judge.parameters(), 1e-2))

    def step() -> None:
        for _ in range(critic):
            optimizers[1].zero_grad()
            (judge(make(torch.randn(8, 3)).detach()).mean() - judge(torch.randn(8, 6)).mean()).backward()
            optimizers[1].step()
        optimizers[0].zero_grad()
        (-judge(make(torch.randn(8, 3))).mean()).backward()
        optimizers[0].step()

    return Job(parts, optimizers, step)


def gradient_penalty() -> Job:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        x = torch.randn(8, 6, requires_grad=True)
        score = model(x)
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        (score.mean() + (slope.norm(dim=1) - 1).square().mean()).backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def lbfgs() -> Job:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)

    def step() -> None:
        x = torch.randn(8, 6)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model(x))
            loss.backward()
            return loss

        optimizer.step(closure)

    return Job(model, (optimizer,), step)


def adam_closure() -> Job:
    model = _mlp()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(torch.randn(8, 6)))
        loss.backward()
        return loss

    return Job(model, (optimizer,), lambda: optimizer.step(closure=closure))


def selective_checkpointing() -> Job:
    """Checkpointing that keeps the results of some operations, which it finds again by their order."""
    mixed = Wrap(lambda m, x: (x * 1.5).clone() * x.mean(1, keepdim=True).abs() + x.sum(1, keepdim=True))
    block = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.2), nn.GELU(), mixed, nn.Linear(6, 6))
    saved = ("aten.mul", "aten.mean", "aten.clone", "aten.abs", "aten.sum", "aten.addmm")

    def policy(_context: object, operation: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
        must = str(operation).startswith(saved)
        return CheckpointPolicy.MUST_SAVE if must else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    run = lambda m, x: m.last(checkpoint(m.block, m.first(x), use_reentrant=False, context_fn=contexts))  # noqa: E731
    return job(Wrap(run, first=nn.Linear(6, 6), block=block, last=nn.Linear(6, 2)), 8, 6)


def dry_runs() -> Job:
    """Operations counted, and shapes found out with fake tensors, between the steps."""
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    base = job(model, 5, 6)
    counts: list[int] = []

    def step() -> None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(torch.empty(7, 6)).sum()
        with FlopCounterMode(display=False) as counter:
            base.step()
        counts.append(counter.get_total_flops())
        assert counts[-1] == 2 * 5 * 6 * (6 + 2) * 3 - 2 * 5 * 6 * 6  # forward, weights, inputs but the first

    return Job(model, base.optimizers, step)


def scaler(fused: bool = False, count: int = 1) -> Job:
    """A GradScaler that skips the steps with an infinite loss."""
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    halves = (model.parameters(),) if count == 1 else (model[0].parameters(), model[2].parameters())
    optimizers = tuple(torch.optim.Adam(half, 1e-2, fused=fused) for half in halves)
    scale = torch.amp.GradScaler("cpu", init_scale=1024.0)
    calls: list[int] = []

    def step() -> None:
        calls.append(1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model(torch.randn(8, 6)))
        if len(calls) in (2, 5):
            loss = loss * float("inf") if count == 1 else loss + 1e300 * model[0].weight.abs().sum().double() * 1e300
        scale.scale(loss).backward()
        for optimizer in optimizers:
            scale.step(optimizer)
        scale.update()

    return Job(model, optimizers, step, scaler=scale)


def per_sample_gradients() -> Job:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    base = job(model, 5, 6)

    def sample_loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().mean()

    def step() -> None:
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        torch.func.vmap(torch.func.grad(sample_loss), (None, 0))(parameters, torch.randn(4, 6))
        base.step()

    return Job(model, base.optimizers, step)


def averaged_copy() -> Job:
    model = _mlp()
    base = job(model, 8, 6)
    copies: list[nn.Module] = []

    def step() -> None:
        base.step()
        copies[:] = copies or [copy.deepcopy(model)]
        copies[0](torch.randn(3, 6)).sum().backward()

    return Job(model, base.optimizers, step)


def evaluation_with_gradients() -> Job:
    """Evaluation between the steps, by a user who forgot no_grad."""
    model = _mlp()
    base = job(model, 8, 6)

    def step() -> None:
        model.eval()
        for _ in range(12):
            model(torch.randn(3, 6))
        model.train()
        base.step()

    return Job(model, base.optimizers, step)


def traced() -> Job:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    base = job(model, 5, 6)

    def step() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(model, torch.randn(2, 6))
        base.step()

    return Job(model, base.optimizers, step)


def sharpness_aware() -> Job:
    """Two backward passes a step, the second at moved weights."""
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    optimizer = sgd(model)

    def step() -> None:
        x = torch.randn(8, 6)
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        moves = [0.05 * p.grad for p in model.parameters()]
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.add_(move)
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.sub_(move)
        optimizer.step()

    return Job(model, (optimizer,), step)


def added_group() -> Job:
    """A part that is unfrozen, and given to the optimizer, in the middle of the run."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model[1].parameters(), 0.1)
    calls: list[int] = []

    def step() -> None:
        calls.append(1)
        if len(calls) == 2:
            optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
        model.zero_grad()
        loss_of(model(torch.randn(5, 6))).backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def truncated_time() -> Job:
    """Backward twice through one graph, and a state carried from step to step."""
    cell = nn.LSTM(6, 4)
    optimizer = sgd(cell)
    carried: list[Any] = [None]

    def step() -> None:
        optimizer.zero_grad()
        output, (h, c) = cell(torch.randn(3, 2, 6), carried[0])
        output.square().mean().backward(retain_graph=True)
        output.abs().mean().backward()
        optimizer.step()
        carried[0] = (h.detach(), c.detach())

    return Job(cell, (optimizer,), step)


def empty_batch() -> Job:
    sizes = [0, 5, 0, 5]
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(sizes[0], 6)).square().sum().backward()
        optimizer.step()
        sizes.append(sizes.pop(0))

    return Job(model, (optimizer,), step)


def not_a_number() -> Job:
    """A run that has diverged."""
    base = inplace_relu()

    def step() -> None:
        base.step()
        with torch.no_grad():
            base.model[0].weight[0, 0] = float("nan")

    return Job(base.model, base.optimizers, step)


CASES = (
    Case(
        "in-place ReLU after a norm",
        inplace_relu,
        ("1/output", "2/output", "1/input", "1/running", "1/weight"),
        gradients=("1/output",),
    ),
    Case(
        "shared module called twice",
        shared_twice,
        ("a/output", "a#1/output"),
        ("a#2/output", "/output"),
        ("a/output", "a#1/output"),
    ),
    Case(
        "shared module under two names",
        shared_alias,
        ("0.0/output", "0.0#1/output"),
        ("0/output", "1/output", "1.0/output"),
    ),
    Case("tied weights", tied_weights, ("embed/weight", "decode/output", "norm/input"), ("decode/weight",)),
    Case(
        "dict output",
        dict_output,
        ("body/output.logits", "body/output.hidden", "body#1/output.a/input"),
        ("body/output.note",),
    ),
    Case(
        "dataclass output",
        lambda: job(Returns(Pair), 5, 6),
        ("/output.logits", "/output.hidden"),
        gradients=("/output.hidden",),
    ),
    Case("nested output", nested_output, ("body/output.0", "body/output.1.1.deep.0"), ("body/output.2", "/output.0")),
    Case("LSTM", lambda: job(nn.LSTM(6, 4), 3, 5, 6), ("/output.0", "/output.1.0", "/output.1.1", "/weight_ih_l0")),
    Case(
        "GRU cell in a loop",
        gru_cell,
        ("cell/output", "cell#7/output"),
        ("cell#8/output",),
        ("cell/output", "cell#7/output"),
    ),
    Case(
        "multi-head attention",
        attention,
        ("attention/output.0", "attention.out_proj/weight"),
        ("attention.out_proj/output",),
    ),
    Case(
        "weight normalization",
        lambda: job(nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.ReLU()), 5, 6),
        ("0/output", "0.parametrizations.weight/original0"),
        ("0.parametrizations.weight.0/output",),
        ("0/output",),
    ),
    Case(
        "spectral normalization",
        lambda: job(nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6)), nn.ReLU()), 5, 6, held=True),
        ("0/output",),
        ("0.parametrizations.weight.0/output",),
    ),
    Case(
        "checkpointing",
        lambda: checkpointed(False),
        ("block.1/output", "block.1/running"),
        ("block/output",),
        ("block.1/output", "block.4/output"),
    ),
    Case(
        "reentrant checkpointing",
        lambda: checkpointed(True),
        ("block.1/output", "block.1/running"),
        ("block/output",),
        ("block.1/output",),
    ),
    Case(
        "selective checkpointing",
        selective_checkpointing,
        ("block.4/output", "block.1/input"),
        ("block/output",),
        ("block.0/output",),
    ),
    Case("dry runs", dry_runs, ("1/output",), ("1#1/output",)),
    Case("two optimizers under a scaler, one skips", lambda: scaler(count=2), ("0/output",), steps=7, finite=False),
    Case("frozen batch normalization", frozen_norm, ("1/running", "1/input")),
    Case(
        "nested containers",
        lambda: job(nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.ReLU())), 5, 6),
        ("0.0.0/output",),
        ("0.0/output", "0/output", "/output"),
    ),
    Case(
        "container with functional operations",
        functional_container,
        ("0.lin/output", "0.norm/output", "1/output"),
        ("0/output",),
    ),
    Case("no normalization", lambda: job(nn.Linear(6, 2), 5, 6, held=True), ("/output", "/weight")),
    Case("bf16 autocast", autocast, ("0/output", "1/output", "3/input"), gradients=("0/output",)),
    Case("channels last", channels_last, ("1/output", "3/input"), gradients=("0/output",)),
    Case("called twice before a backward", called_twice, ("0/output",), ("0#1/output",)),
    Case(
        "two optimizers",
        gan,
        ("g.0/output", "d.2/output", "d#1.0/output".replace("d#1.0", "d.0#1")),
        gradients=("g.0/output",),
    ),
    Case("two optimizers, one steps thrice", lambda: gan(3), ("g.0/output", "d.2/output")),
    Case("gradient accumulation", accumulation, ("0/output",), ("0#1/output",)),
    Case("long gradient accumulation", lambda: accumulation(20), ("0/output",), ("0#1/output",)),
    Case("LBFGS closure", lbfgs, ("0/output", "0/weight"), gradients=("0/output",)),
    Case("Adam with a closure", adam_closure, ("0/output", "0/weight"), gradients=("0/output",)),
    Case("gradient scaler that skips", scaler, ("0/output",), steps=7, skipped=(1, 4), finite=False),
    Case(
        "fused optimizer under a gradient scaler",
        lambda: scaler(fused=True),
        ("0/output",),
        steps=7,
        skipped=(1, 4),
        finite=False,
    ),
    Case("gradient penalty", gradient_penalty, ("0/output", "1/output"), gradients=("0/output",)),
    Case(
        "complex layer",
        lambda: job(nn.Sequential(nn.Linear(6, 6), ComplexLayer()), 5, 6),
        ("0/output", "1/output", "1/weight"),
    ),
    Case("integer output", integer_output, ("lin/output", "choose/output", "embed/output")),
    Case("scalar output", scalar_output, ("loss/output",), gradients=("loss/output",)),
    Case("nested tensor", nested_tensor, ("lin/output", "ragged/output", "last/output")),
    Case("inference tensor", inference_tensor, ("passed/output", "head/output"), ("trunk/output",)),
    Case("empty batch", empty_batch, ("0/output", "1/input"), finite=False),
    Case("sparse gradients", sparse_embedding, ("0/output", "0/weight")),
    Case("lazy layers", lazy_linear, ("0/output", "0/weight", "1/running")),
    Case("frozen parameters", frozen_parameters, ("0/output", "1/output"), gradients=("1/output",)),
    Case("integer parameter", integer_parameter, ("0/output", "0/weight"), ("0/code",)),
    Case(
        "module that returns its parameter",
        lambda: job(Wrap(lambda m, x: x @ m.own().T, own=OwnParameter()), 5, 6),
        ("own/output", "own/weight"),
    ),
    Case("float64", lambda: job(_mlp().double(), 8, 6, dtype=torch.float64), ("1/input", "0/output")),
    Case("bf16 weights", lambda: job(_mlp().bfloat16(), 8, 6, dtype=torch.bfloat16), ("1/input", "0/output")),
    Case("stochastic depth", stochastic_depth, ("one.inner.0/output", "last/output"), ("one.inner/output",), steps=8),
    Case("module that raises once", raises_once, ("lin/output", "norm/output"), raises=CaseError),
    Case("root forward never called", training_step, ("body.1/output", "head/output"), ("body/output",)),
    Case("per-sample gradients", per_sample_gradients, ("1/output",), ("1#1/output",)),
    Case("copied model runs too", averaged_copy, ("0/output",), ("0#1/output",)),
    Case("evaluation with gradients", evaluation_with_gradients, ("0/output",), ("0#1/output",)),
    Case("traced during the run", traced, ("1/output",), ("1#1/output",)),
    Case("sharpness-aware steps", sharpness_aware, ("1/output",)),
    Case("group added during the run", added_group, ("0/output", "0/weight")),
    Case("truncated backpropagation in time", truncated_time, ("/output.0",)),
    Case("keyword arguments only", keywords_only, ("norm/input", "norm/output")),
    Case("shape changes from step to step", width_changes, ("passed/output",)),
    Case("gradient of stride 0", expanded_gradient, ("1/output",), gradients=("1/output",)),
    Case("anomaly detection", anomaly, ("1/output",), gradients=("1/output",)),
    Case(
        "buffers replaced, not written",
        lambda: job(nn.Sequential(nn.Linear(6, 6), ReassignedNorm()), 5, 6, held=True),
        ("1/output", "1/running"),
    ),
    Case(
        "weights merged in evaluation",
        lambda: job(nn.Sequential(MergingLinear(), nn.BatchNorm1d(6)), 5, 6, held=True),
        ("0/output", "1/running"),
    ),
    Case("diverged run", not_a_number, ("1/output",), finite=False),
)
