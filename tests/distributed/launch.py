"""Ranks as processes of this machine, on gloo, one thread each; forked from a server that has imported torch."""

import multiprocessing
import tempfile
import traceback

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["torch._dynamo", "torch.distributed.tensor._utils", "normscope.core.reading", "normscope.diagnostics"]
PRELOADED += ["tests.distributed.jobs"]
CONTEXT.set_forkserver_preload(PRELOADED)
TIMEOUT = 60


def _work(job, rank, size, folder, arguments, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        results.put((rank, job(rank, folder, *arguments)))
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise
    dist.destroy_process_group()


def launch(job, size, *arguments, dying=()):
    """Run `job(rank, folder, *arguments)` on so many ranks and return what each returned, by rank.

    A rank that raises is told by its traceback; those of `dying` return nothing.
    """
    results = CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            CONTEXT.Process(target=_work, args=(job, rank, size, folder, arguments, results), daemon=True)
            for rank in range(size)
        ]
        for worker in workers:
            worker.start()
        try:
            found = dict(results.get(timeout=TIMEOUT) for _ in range(size - len(dying)))
        finally:
            for worker in workers:
                worker.join(10)
                worker.kill()
    return found
