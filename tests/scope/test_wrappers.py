"""Models and optimizers inside the wrappers of training systems."""

import re

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.errors import ArgumentError


def job():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    return model, torch.optim.SGD(model.parameters(), 0.1)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()


class Wrapped(torch.optim.Optimizer):
    """Wraps an optimizer as Accelerate does: no hooks of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class Sharing(torch.optim.SGD):
    """Wraps an optimizer as Lightning does: with the same attributes, hooks among them."""

    def __init__(self, optimizer):
        self.__dict__ = {**optimizer.__dict__, "optimizer": optimizer}

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Averaging(torch.optim.Optimizer):
    """Has hooks of its own and uses an optimizer for a part of its step."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure=None):
        self.optimizer.step(closure)
        self.optimizer.step()


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (Wrapped, "SGD"),
        (Sharing, "SGD"),
        (lambda optimizer: Wrapped(Wrapped(optimizer)), "SGD"),
        (Averaging, "Averaging"),
    ],
    ids=["wrapped", "sharing", "twice", "its own hooks"],
)
def test_the_optimizer_that_steps_is_heard(wrap, name):
    model, optimizer = job()
    wrapped = wrap(optimizer)
    with ns.attach(model, wrapped, every=1) as scope:
        train(model, wrapped)
    record = scope.record()
    assert record.steps.tolist() == [0, 1, 2]
    assert record.context["optimizer"].unique().tolist() == [name]
    assert not optimizer._optimizer_step_pre_hooks


def test_data_parallel_on_one_device_is_the_model_itself():
    model, optimizer = job()
    parallel = nn.DataParallel(model)
    with ns.attach(parallel, optimizer, every=1) as scope:
        train(parallel, optimizer)
    assert {"0/output", "1/running", "2/weight"} <= set(scope.record().sites["site"])


@pytest.mark.parametrize("compiled", [False, True])
def test_data_parallel_on_several_devices_is_refused_with_the_reason(compiled):
    model, optimizer = job()
    parallel = nn.DataParallel(model)
    parallel.device_ids = [0, 1]
    wrapped = torch.compile(parallel, backend="eager") if compiled else parallel
    said = "model=DataParallel runs a copy of the model on each of 2 devices, and copies carry no hooks; use torch.nn."
    with pytest.raises(ArgumentError, match=re.escape(said)):
        ns.attach(wrapped, optimizer)


def test_a_distributed_model_is_watched_under_the_users_names(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, optimizer = job()
        parallel = nn.parallel.DistributedDataParallel(model)
        with ns.attach(parallel, optimizer, every=1) as scope:
            train(parallel, optimizer)
    finally:
        torch.distributed.destroy_process_group()
    record = scope.record()
    assert {"0/output", "1/running", "2/weight"} <= set(record.sites["site"])
    assert record.context["batch_size"].tolist() == [8, 8, 8]
    assert ("0/output", "gradient") in {(block.site, block.role) for block in record.blocks}
