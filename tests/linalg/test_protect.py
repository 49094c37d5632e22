"""What runs a model leaves no trace: of buffers, attributes, generators and the user's hooks."""

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.linalg.protect import restored
from normscope.probes.snapshots import SNAPSHOTS

LOSS = nn.functional.cross_entropy
BATCH = (torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4)


class Keeper(nn.Module):
    """Keeps what a module may keep: a buffer that overlaps itself, counters, tensors and generators of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(1, 4).expand(3, 4))
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.calls, self.average = 0, torch.zeros(4)
        self.torch, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.python, self.old = random.Random(1), np.random.RandomState(1)

    def forward(self, x):
        self.calls += 1
        y = self.norm(self.linear(x)) * self.mask[0]
        self.average.mul_(0.9).add_(y.detach().mean(0))
        self.last = y.detach()
        noise = self.numpy.normal() + self.python.random() + self.old.normal()
        return y + 1e-3 * torch.randn(y.shape, generator=self.torch) + 1e-6 * noise


def trace(model):
    """Return everything that a forward pass changes."""
    plain = (model.calls, hasattr(model, "last"), model.average.tolist(), model.norm.running_mean.tolist())
    states = (model.torch.get_state().tolist(), model.numpy.bit_generator.state, model.python.getstate())
    return plain, states, model.old.get_state()[1].tolist(), int(model.norm.num_batches_tracked), model.training


RUNS = {
    "examine": lambda model: ns.examine(model, LOSS, [BATCH], progress=False),
    "attach": lambda model: ns.attach(
        model, torch.optim.SGD(model.parameters(), 0.0), problem=ns.Problem(model, LOSS, [BATCH])
    )._session._snapshots(set(SNAPSHOTS), ends=True),
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_that_a_module_keeps_is_changed(name):
    model = Keeper()
    before = trace(model)
    RUNS[name](model)
    assert trace(model) == before


def test_curvature_leaves_no_trace_whether_it_is_refused_or_not():
    model = Keeper()
    before = trace(model)
    with suppress(ns.ArgumentError):  # the noise in its output may be seen
        ns.trace(ns.Problem(model, LOSS, [BATCH]), 3)
    assert trace(model) == before


def test_hooks_of_parameters_are_not_fired():
    model, fired = nn.Linear(4, 4), []
    model.weight.register_hook(fired.append)
    model.bias.register_post_accumulate_grad_hook(fired.append)
    problem = ns.Problem(model, LOSS, [(BATCH[0].repeat(8, 1), BATCH[1].repeat(8))])
    with ns.attach(model, torch.optim.SGD(model.parameters(), 0.1), every=1, problem=problem) as scope:
        scope._session._snapshots(set(SNAPSHOTS), ends=True)
    ns.examine(model, LOSS, [BATCH], progress=False)
    ns.trace(problem, 3)
    assert fired == []
    LOSS(model(BATCH[0]), BATCH[1]).backward()
    assert len(fired) == 2


def test_a_loss_with_parameters_keeps_its_own_gradients():
    head = nn.Linear(4, 4)
    ns.examine(nn.Linear(4, 4), lambda output, target: LOSS(head(output), target), [BATCH], progress=False)
    assert head.weight.grad is None


class Restless(nn.Module):
    """Writes where a look must leave no trace."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.norm.running_mean = torch.zeros(1).expand(4)
        self.norm.running_var = torch.ones(1).expand(4)
        self.register_buffer("cache", torch.full((1,), float("nan")).expand(4))
        self.register_buffer("zero", torch.tensor([-0.0]))

    def forward(self, x):
        self.zero.zero_()
        if not hasattr(self, "extra"):
            self.extra = nn.BatchNorm1d(4)
            self.register_buffer("table", torch.ones(4))
        self.linear.weight.requires_grad_(False)
        return self.extra(self.linear(x))


def test_what_a_forward_adds_goes_and_what_overlaps_itself_or_is_minus_zero_stays():
    model = Restless()
    with restored(model):
        model(torch.randn(8, 4))
        model.norm.running_mean.as_strided((1,), (1,)).fill_(3.0)
    assert [name for name, _ in model.named_modules()] == ["", "linear", "norm"]
    assert [name for name, _ in model.named_buffers()] == [
        "cache",
        "zero",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]
    assert torch.signbit(model.zero).all()
    assert model.cache.isnan().all()
    assert model.norm.running_mean.tolist() == [0.0] * 4
    assert model.linear.weight.requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_scripted_modules_inside_keep_their_statistics_and_modes():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model = nn.Sequential(scripted, nn.BatchNorm1d(4))
    before = {name: b.clone() for name, b in model.named_buffers()}
    with restored(model):
        model(torch.randn(8, 4))
        model.eval()
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(module.training for module in model.modules())
