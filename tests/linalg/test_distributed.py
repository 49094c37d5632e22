"""Two processes, each with its share of the batches, against one with all of them."""

import multiprocessing
import os
import socket

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import normscope as ns
from normscope.core.errors import ArgumentError
from tests.linalg.models import make

RANKS = 2


def numbers(batches):
    """Return what every call gives for a problem with these batches."""
    model, _ = make("batch")
    problem = ns.Problem(model, F.cross_entropy, batches)
    v = torch.randn(problem.size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    pairs = ns.eigenpairs(problem, 3, max_matvecs=40)
    found = [problem.hvp(v).numpy(), problem.gradient().numpy(), pairs.values]
    found += [ns.trace(problem, 6, kind, operator="ggn").value for kind in ("hutchinson", "hutch++", "xtrace")]
    found += [ns.diagonal(problem, 3, operator="fisher").values]
    found += [ns.spectrum(problem, method="slq", steps=8, probes=2).nodes, ns.layerwise(problem, 3)["trace"].to_numpy()]
    return np.concatenate([np.atleast_1d(np.asarray(x, dtype=float)).ravel() for x in found])


def batches():
    _, (x, y) = make("batch")
    return [(x[:3], y[:3]), (x[3:], y[3:]), (x[:2], y[:2]), (x[1:], y[1:])]


def work(rank, port, results):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    mine = [batches()[i] for i in ((0,), (1, 2, 3))[rank]]  # one rank keeps its graph, the other streams
    found = [numbers(mine)]
    spoiled = [(x * float("nan"), y) for x, y in mine] if rank else mine
    try:
        numbers(spoiled)
    except ArgumentError as error:
        found.append(str(error))
    alone = ns.Problem(make("batch")[0], F.cross_entropy, mine, distributed=False)
    found.append(float(alone.gradient().norm()))
    results.put((rank, found))
    dist.destroy_process_group()


def test_two_ranks_equal_one():
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    workers = [context.Process(target=work, args=(rank, port, results), daemon=True) for rank in range(RANKS)]
    for worker in workers:
        worker.start()
    try:
        found = dict(results.get(timeout=120) for _ in workers)
    finally:
        for worker in workers:
            worker.join(20)
            worker.kill()
    expected = numbers(batches())
    for rank in range(RANKS):
        np.testing.assert_allclose(found[rank][0], expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert "loss is not finite on another rank" in found[0][1]
    assert "loss is nan in batch 0" in found[1][1]
    assert found[0][2] != found[1][2]
