"""Ranks that are threads of this process: the sums and maxima of `Ranks`, without a network."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from normscope.probes.ranks import Ranks


class Threads:
    """A number of ranks."""

    def __init__(self, size):
        self.size, self.given = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def run(self, job):
        """Return what `job(ranks)` returns on each."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: job(Rank(self, rank)), range(self.size)))


class Rank(Ranks):
    def __init__(self, threads, rank):
        super().__init__()
        self.threads, self.rank, self.size = threads, rank, threads.size

    def _reduced(self, arrays, kind):
        threads = self.threads
        threads.given[self.rank] = arrays
        threads.barrier.wait()
        add = {"SUM": np.add, "MAX": np.maximum}[kind]
        found = [add.reduce([np.asarray(a, float) for a in same]) for same in zip(*threads.given, strict=True)]
        threads.barrier.wait()
        return found
