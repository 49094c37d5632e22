"""A spike of a transformer, told alike whether it is trained plainly, compiled, sharded or in bfloat16 weights."""

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import normscope as ns
from normscope.metrics import tables
from tests.distributed.launch import launch
from tests.pathologies import spikes
from tests.pathologies.setup import adamw

AT, STEPS, FACTOR = 80, 100, 500
WAYS = {
    "plain": (1, False, False),
    "compiled": (1, True, False),
    "bfloat16": (1, False, True),
    "sharded": (2, False, False),
    "all": (2, True, True),
}


def spiked(rank, folder, size, compiled, coarse):
    """Train a decoder whose learning rate of one layer is raised, and return what is told of it."""
    torch.manual_seed(0)
    setup = spikes.decoder()
    model = setup.model.bfloat16() if coarse else setup.model
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for block in (model.block1, model.block2, model):
            fully_shard(block, mesh=mesh)
    setup.optimizers = [adamw(model, lr=1e-2)]
    group = spikes.apart(setup, "block2.mlp.expand.*")
    runs = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer, batches = setup.optimizers[0], spikes.averages()
    with ns.attach(runs, optimizer, run=f"{folder}/run", every=20, probes=("parameters", "flight")) as scope:
        for step in range(STEPS):
            x, y = (part[rank::size] for part in next(batches))
            if step == AT:
                group["lr"] *= FACTOR
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(runs(x).float().flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
            scope.step(loss=loss)
    if rank:
        return None
    record = ns.load(f"{folder}/run")
    told = [(f.id, f.step, f.site, dict(f.evidence)) for f in ns.diagnose(record) if f.id.startswith("spikes.")]
    return told, {
        key: tables.table(record, stat, slot="*", role=role, phase="flight")
        for key, (role, stat) in {
            "gradient": ("gradient", "norm"),
            "update": ("update", "norm"),
            "weight": ("value", "norm"),
            "rms_t": ("gradient", "rms_t"),
        }.items()
    }


@pytest.fixture(scope="module")
def found():
    held = {}

    def of(way):
        size, *rest = WAYS[way]
        if way not in held:
            held[way] = launch(spiked, size, size, *rest)[0]
        return held[way]

    return of


SLOW = [pytest.param(way, marks=pytest.mark.slow) for way in ("compiled", "bfloat16", "sharded")]


@pytest.mark.parametrize("way", ["plain", *SLOW, "all"])
def test_the_finding_is_the_same(way, found):
    ((name, step, site, evidence),) = found(way)[0]
    assert name == "spikes.schedule"
    assert abs(step - AT) <= 2
    assert site == "block2.mlp.expand/weight"
    assert evidence["rate_growth"] == pytest.approx(FACTOR, rel=1e-3)
    assert (evidence["since"], evidence["groups"], evidence["of_groups"]) == (AT, 1, 3)


@pytest.mark.parametrize("key", ["gradient", "update", "weight", "rms_t"])
@pytest.mark.parametrize("way", [*SLOW, "all"])
def test_what_is_recorded_before_it_is_the_same(way, key, found):
    limit = 0.15 if way in ("bfloat16", "all") else 1e-3
    plain, other = (found(name)[1][key].loc[:10] for name in ("plain", way))
    assert list(other.columns) == list(plain.columns)
    matrices = [site for site in plain if site.endswith(("token/weight", "expand/weight", "out/weight", "head/weight"))]
    np.testing.assert_allclose((other[matrices] / plain[matrices]).median(), 1, rtol=limit)
