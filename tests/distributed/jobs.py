"""What the ranks of the tests do."""

import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import normscope as ns
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


# ---- training ----------------------------------------------------------------------------------------------------

BATCH = 12  # samples of a step, of all ranks together


class Net(nn.Module):
    """Convolution, linear layers and normalization that does not mix samples; a branch that may be left out."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.group = nn.GroupNorm(2, 6)
        self.wide = nn.Linear(6 * 16, 40)
        self.layer = nn.LayerNorm(40)
        self.side = nn.ReLU()
        self.tanh = nn.Tanh()
        self.head = nn.Linear(40, 5)
        self.takes_side = True

    def forward(self, x):
        x = torch.relu(self.group(self.conv(x)))
        x = self.layer(self.wide(x.flatten(1)))
        if self.takes_side:
            x = self.side(x + 0.3)
        return self.head(self.tanh(x))


def net(kind, size):
    """Return a model in float64 and what trains it."""
    torch.manual_seed(0)
    model = Net().double()
    if kind == "ddp":
        return model, nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
        for module in (model.wide, model.head):
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, model


def batch_of(step, rank, size):
    """Return the share of a rank in the batch of a step."""
    draw = torch.Generator().manual_seed(step)
    x = 1 + torch.randn(BATCH, 3, 6, 6, generator=draw, dtype=torch.float64)
    y = torch.randint(5, (BATCH,), generator=draw)
    return x[rank::size], y[rank::size]


def train(rank, folder, kind, size, *, attached=True, steps=5, before_step=None, **settings):
    """Train for a few steps and return what is recorded, and the state that training leaves, bit for bit."""
    model, runs = net(kind, size)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    settings = {"run": f"{folder}/{kind}", "every": 2, "probes": PROBES} | settings
    scope = ns.attach(runs, optimizer, **settings) if attached else None
    for step in range(steps):
        x, y = batch_of(step, rank, size)
        if before_step is not None:
            before_step(step, rank, model)
        loss = nn.functional.cross_entropy(runs(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scope is not None:
            scope.step(loss=loss)
    state = [ranks.local(t).clone() for t in (*model.parameters(), *(m["momentum_buffer"] for m in states(optimizer)))]
    if scope is None:
        return state
    scope.close()
    return scope, state


def states(optimizer):
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def recorded(scope):
    """Return the values, the context and the messages of a record, to be sent to another process."""
    record = scope.record()
    columns = ["step", "site", "phase", "role", "stat"]
    values = record.frame().astype({name: str for name in columns[1:]}).set_index(columns)["value"].to_dict()
    index = record.frame(index=True).astype({name: str for name in columns[1:]})
    arrays = {key: part["value"].to_numpy() for key, part in index.groupby(columns, sort=False)}
    context = record.context[["step", "batch_size", "loss", "grad_norm"]].to_numpy(float)
    return values, arrays, context, record.events["message"].tolist()


PROBES = ("moments", "tails", "parameters", "normalization", "covariance", "noise")


def both(rank, folder, kind, size):
    """Train without and with normscope: whether both are alike, what is recorded, and which files there are."""
    plain = train(rank, folder, kind, size, attached=False)
    scope, state = train(rank, folder, kind, size)
    alike = all(torch.equal(a, b) for a, b in zip(plain, state, strict=True))
    dist.barrier()
    return alike, recorded(scope), sorted(path.name for path in Path(folder).glob("*/*")), repr(scope)
