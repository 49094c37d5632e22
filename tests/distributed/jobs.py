"""What the ranks of the tests do."""

import os
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import normscope as ns
from normscope.norms import build
from normscope.probes import moments, ranks
from normscope.scope.attach import Scope, attach


def exchange(rank, folder):
    """Sum, take maxima, find common keys; then one rank leaves."""
    together = ranks.Ranks(2, "same")
    before = together.together
    dist.barrier()
    together.join()
    summed = together.summed([np.arange(3.0) + rank, np.full((2, 2), rank + 1.0)])
    with mock.patch.object(ranks, "MOST", 3):
        apart = together.summed([np.ones(2), np.ones(2, np.float32), np.full((2, 4), 1.0), np.ones(0), np.ones(1)])
    assert [(a.tolist(), a.dtype.name) for a in apart[:2]] == [([2, 2], "float64"), ([2, 2], "float32")]
    assert [a.tolist() for a in apart[2:]] == [[[2] * 4] * 2, [], [2]]
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
    for settings in (None if rank else "same", f"every {rank}", "same"):
        together = None if settings is None else ranks.Ranks(2, settings)
        dist.barrier()
        try:
            if together is not None:
                together.join()
                said.append(together.together)
        except ranks.LostError as lost:
            said.append(str(lost))
        dist.barrier()  # as the training is, between two attachments
        if together is not None:
            together.end()
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
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])  # a DTensor where parameters are
        optimizer.step()
        optimizer.zero_grad()
        if scope is not None:
            scope.step(loss=loss, grad_norm=None if step % 2 else norm)
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


PROBES = ("moments", "tails", "parameters", "flight", "normalization", "covariance", "noise")


def both(rank, folder, kind, size):
    """Train without and with normscope: whether both are alike, what is recorded, and which files there are."""
    plain = train(rank, folder, kind, size, attached=False)
    scope, state = train(rank, folder, kind, size)
    alike = all(torch.equal(a, b) for a, b in zip(plain, state, strict=True))
    dist.barrier()
    return alike, recorded(scope), sorted(path.name for path in Path(folder).glob("*/*")), repr(scope)


# ---- ranks that do not do the same -----------------------------------------------------------------------------------


def timed(act, *args, **kwargs):
    start = time.monotonic()
    result = act(*args, **kwargs)
    return result, time.monotonic() - start


def branch(rank, folder):
    """Leave a branch out on the second rank alone, at the second sampled step."""

    def before_step(step, rank, model):
        model.takes_side = not (rank and step == 2)

    scope, _ = train(rank, folder, "ddp", 2, before_step=before_step)
    return recorded(scope)


def failing(rank, folder):
    """Let a probe fail on the second rank."""

    def observe(view):
        raise RuntimeError("of this rank alone")

    with mock.patch("normscope.probes.moments.observe", observe if rank else moments.observe):
        (scope, state), seconds = timed(train, rank, f"{folder}/failing", "ddp", 2)
    plain = train(rank, folder, "ddp", 2, attached=False)
    return recorded(scope), all(torch.equal(a, b) for a, b in zip(plain, state, strict=True)), seconds


def uneven(rank, folder):
    """Give the second rank fewer samples."""
    model, runs = net("ddp", 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scope = ns.attach(runs, optimizer, run=f"{folder}/uneven", every=1, probes=PROBES)
    x, y = batch_of(0, 0, 1)
    x, y = (x[8:], y[8:]) if rank else (x[:8], y[:8])
    nn.functional.cross_entropy(runs(x), y).backward()
    optimizer.step()
    scope.close()
    return recorded(scope)


def first_alone(rank, folder):
    """Attach on the first rank only; and look at the record in the midst of training on that rank only."""
    (found, seconds) = timed(train, rank, f"{folder}/alone", "ddp", 2, attached=rank == 0)
    seen = []

    def before_step(step, rank, model):
        if step == 3 and rank == 0:
            seen.append(len(scopes[0].record().context))

    scopes = []
    with mock.patch("normscope.attach", lambda *a, **k: scopes.append(attach(*a, **k)) or scopes[0]):
        train(rank, f"{folder}/seen", "ddp", 2, before_step=before_step)
    return (recorded(found[0]) if rank == 0 else None), seconds, seen


def resumed(rank, folder):
    """Go on with a run."""
    for steps in (3, 3):
        scope, _ = train(rank, f"{folder}/resumed", "ddp", 2, steps=steps, resume=True)
    return recorded(scope)


def said(rank, folder):
    """Judge and report on every rank."""
    scope, _ = train(rank, f"{folder}/said", "ddp", 2)
    written = []
    with mock.patch("normscope.write_report", lambda record, findings, path: written.append(path) or path):
        return len(scope.findings()), str(scope.report("page.html")), len(written)


def two_models(rank, folder):
    """Attach to two models at once, as an adversarial pair; count the collectives of each step."""
    counts, reduce = [0], ranks.Ranks._reduced

    def counted(self, arrays, kind):
        counts[-1] += any(a.size for a in arrays)
        return reduce(self, arrays, kind)

    pair = [net("ddp", 2)[1] for _ in range(2)]
    optimizers = [torch.optim.SGD(runs.parameters(), 0.1) for runs in pair]
    with mock.patch.object(ranks.Ranks, "_reduced", counted):
        first, second = (ns.attach(r, o, every=3, probes=PROBES) for r, o in zip(pair, optimizers, strict=True))
        with first, second:
            for step in range(5):
                counts.append(0)
                x, y = batch_of(step, rank, 2)
                for runs, optimizer in zip(pair, optimizers, strict=True):
                    nn.functional.cross_entropy(runs(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            counts.append(0)
    return counts, recorded(first), recorded(second)


SEVERAL = (branch, failing, uneven, first_alone, resumed, said, two_models)


def unlike(rank, folder):
    """Run all of these one after the other."""
    return {job.__name__: job(rank, folder) for job in SEVERAL}


# ---- ranks that end --------------------------------------------------------------------------------------------------


def broken(rank, folder, kind, who, how, to):
    """Train, until a rank is killed or raises at the fourth step; return how the run ended and how long that took."""
    _, runs = net(kind, 2)
    optimizer = torch.optim.SGD(runs.parameters(), 0.1)
    start = time.monotonic()
    try:
        with ns.attach(runs, optimizer, run=to, every=2, probes=PROBES) as scope:
            for step in range(6):
                x, y = batch_of(step, rank, 2)
                if step == 3 and rank == who:
                    start = time.monotonic()
                    if how == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise ValueError("the data of this rank are broken")
                nn.functional.cross_entropy(runs(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
    except (RuntimeError, ValueError) as error:
        return type(error).__name__, time.monotonic() - start, recorded(scope)
    return None


def last(rank, folder, kind, how):
    """Lose the second rank after the last step, before the end of the run."""

    def late(scope):
        if rank and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2.5 if rank else 0.5)
        close(scope)

    with (
        mock.patch("normscope.scope.attach.Scope.close", late),
        mock.patch("normscope.scope.together.LAST_PATIENCE", 1),
    ):
        (scope, _), seconds = timed(train, rank, folder, kind, 2, steps=4)
    return recorded(scope), seconds


close = Scope.close


# ---- statistics that cross the batch ---------------------------------------------------------------------------------


def crossing(rank, folder, name, size, synchronized):
    """Train a model whose normalization mixes samples, with held batches; return what is recorded and its buffers."""
    torch.manual_seed(0)
    norm = build(name, 6, process_group="world" if synchronized else None)
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3)).double()
    runs = nn.parallel.DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    draw = torch.Generator().manual_seed(7)
    batches = [(torch.randn(24, 4, generator=draw, dtype=torch.float64), torch.arange(24) % 3) for _ in range(4)]
    problem = ns.Problem(runs, nn.functional.cross_entropy, batches[:2]) if size > 1 else None
    settings = {"every": 1, "problem": problem, "probes": (*PROBES, "population")}
    with ns.attach(runs, optimizer, run=f"{folder}/{name}{synchronized}", **settings) as scope:
        for x, y in batches:
            nn.functional.cross_entropy(runs(x[rank::size]), y[rank::size]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return recorded(scope), [b.double().numpy().copy() for b in model.buffers()]


def norms(rank, folder):
    """Run normalization layers of both kinds, and sharded parameters with held batches."""
    found = {(name, s): crossing(rank, folder, name, 2, s) for name in ("bn", "iterative") for s in (True, False)}
    _, runs = net("fsdp", 2)
    problem = ns.Problem(runs, nn.functional.cross_entropy, [batch_of(9, 0, 1)])
    found["fsdp"] = train(rank, folder, "fsdp", 2, problem=None, run=None)[0].record().events["message"].tolist()
    optimizer = torch.optim.SGD(runs.parameters(), 0.1)
    with ns.attach(runs, optimizer, problem=problem, probes=(*PROBES, "population")) as scope:
        x, y = batch_of(0, rank, 2)
        nn.functional.cross_entropy(runs(x), y).backward()
        optimizer.step()
    found["held"] = recorded(scope)
    return found
