"""What the ranks of the tests do."""

import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from normscope.probes import ranks


def exchange(rank, folder):
    """Sum, take maxima, find common keys; then one rank leaves."""
    together = ranks.Ranks(2, "same")
    before = together.together
    dist.barrier()
    together.join()
    summed = together.summed([np.arange(3.0) + rank, np.full((2, 2), rank + 1.0)])
    largest = together.maximum([np.array([rank, -rank])])
    alike = together.common(["b", "a"])
    differing = together.common(["a", "b", f"only {rank}"])
    none = together.common(["x"] if rank else [])
    if rank:
        together.leave()
        return before, summed, largest, alike, differing, none
    start, error = time.monotonic(), None
    try:
        together.summed([np.zeros(1)])
    except ranks.LostError as lost:
        error = lost
    alone = together.summed([np.ones(1)])[0][0]
    return before, summed, largest, alike, differing, none, str(error), time.monotonic() - start, alone


def refusals(rank, folder):
    """Attach on one rank alone, then otherwise on each."""
    said = []
    for settings in (None if rank else "same", f"every {rank}"):
        if settings is None:
            next(ranks._NUMBERS)
            dist.barrier()
            said.append("")
            continue
        together = ranks.Ranks(2, settings)
        dist.barrier()
        try:
            together.join()
        except ranks.LostError as lost:
            said.append(str(lost))
    return said


def shards(rank, folder):
    """Return of a weight, of a gain and of a plain tensor what sums over ranks make of their parts."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = nn.Linear(3, 5).double()
    whole = [p.detach().clone() for p in model.parameters()]
    fully_shard(model, mesh=mesh)
    together = ranks.Ranks(2)
    dist.barrier()
    together.join()
    parts = [*model.parameters(), whole[0]]
    squares = [ranks.share(p) * ranks.local(p).square().sum().reshape(1).numpy() for p in parts]
    rows = [ranks.spread(p, ranks.local(p).flatten(1).square().sum(1)).numpy() for p in parts[:1]]
    gains = [ranks.spread(p, ranks.local(p)).numpy() for p in parts[1:2]]
    expected = [whole[0].square().sum(), whole[1].square().sum(), whole[0].square().sum()]
    expected += [whole[0].square().sum(1), whole[1]]
    return together.summed([*squares, *rows, *gains]), [e.reshape(-1).numpy() for e in expected]
