"""Awkward by their parameters, precision or memory."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from tests.awkward.base import Job, job, loss_of, sgd
from tests.awkward.calls import inplace_relu


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
