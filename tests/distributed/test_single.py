"""A sharded model on one rank, and on a part of the ranks."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import normscope as ns
from normscope.core.errors import ArgumentError
from normscope.scope import watch


@pytest.fixture
def model(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    yield fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    torch.distributed.destroy_process_group()


def test_one_rank_has_all_of_a_sharded_model(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    norms = [p.full_tensor().norm().item() for p in model.parameters()]
    with ns.attach(model, optimizer, every=1) as scope:
        model(torch.randn(8, 3)).square().mean().backward()
        squares = [p.grad.full_tensor().square().sum().item() for p in model.parameters()]
        optimizer.step()
    record = scope.record()
    assert record.events["message"].tolist() == []
    found = [record.series(f"{site}/{slot}", "norm")[0] for site in "012" for slot in ("weight", "bias")]
    np.testing.assert_allclose(found, norms, rtol=1e-6)
    np.testing.assert_allclose(record.context["grad_norm"].astype(float), sum(squares) ** 0.5, rtol=1e-6)
    assert repr(scope).startswith("Scope(Sequential, 4 modules, 1 norms, closed")


def test_a_model_sharded_over_a_part_of_the_ranks_is_refused(model, monkeypatch):
    monkeypatch.setattr(watch, "world", lambda: 4)
    said = "model=Sequential is sharded over 1 of 4 ranks; call fully_shard with a mesh of all of them, or train"
    with pytest.raises(ArgumentError, match=re.escape(said)):
        ns.attach(model, torch.optim.SGD(model.parameters(), 0.1))
