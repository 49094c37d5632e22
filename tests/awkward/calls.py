"""Awkward by how their modules are called."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.awkward.base import CaseError, Job, Wrap, job, loss_of, sgd


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


def checkpointed_attention() -> Job:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.last(checkpoint(m.block, m.first(x), use_reentrant=False))

    block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
    return job(Wrap(run, first=nn.Linear(6, 8), block=block, last=nn.Linear(8, 2)), 4, 5, 6)


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
