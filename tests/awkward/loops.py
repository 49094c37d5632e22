"""Awkward by how they are trained."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from tests.awkward.base import Job, Wrap, job, loss_of, mlp, sgd
from tests.awkward.calls import inplace_relu


def called_twice() -> Job:
    model = mlp()
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        loss_of([model(torch.randn(8, 6)), model(torch.randn(4, 6))]).backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def accumulation(times: int = 3) -> Job:
    model = mlp()
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
    model = mlp()
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
    model = mlp()
    base = job(model, 8, 6)
    copies: list[nn.Module] = []

    def step() -> None:
        base.step()
        copies[:] = copies or [copy.deepcopy(model)]
        copies[0](torch.randn(3, 6)).sum().backward()

    return Job(model, base.optimizers, step)


def moving_average() -> Job:
    """An exponential moving average of the weights, kept by torch's own copy and run between the steps."""
    model = mlp()
    base = job(model, 8, 6)
    copies: list[AveragedModel] = []

    def step() -> None:
        base.step()
        copies[:] = copies or [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)]
        copies[0].update_parameters(model)
        copies[0](torch.randn(3, 6)).sum().backward()

    return Job(model, base.optimizers, step)


def clipping() -> Job:
    model = mlp()
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(torch.randn(8, 6))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()

    return Job(model, (optimizer,), step)


def adapted() -> Job:
    """The loss is that of weights after a step of their own, put into the model by a functional call."""
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        x, parameters = torch.randn(8, 6), dict(model.named_parameters())
        slopes = torch.autograd.grad(loss_of(model(x)), list(parameters.values()), create_graph=True)
        moved = {name: p - 0.1 * slope for (name, p), slope in zip(parameters.items(), slopes, strict=True)}
        loss_of(torch.func.functional_call(model, moved, (x,))).backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def evaluation_with_gradients() -> Job:
    """Evaluation between the steps, by a user who forgot no_grad."""
    model = mlp()
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
