"""Where the time of an attached step goes: `python -m tests.benchmarks.parts [--out reports/benchmarks]`.

A clock inside what the hooks call. Each part has the time that none of the parts inside it have; beside it what reading
the tensors that it must read would take.
"""

import argparse
import gc
import statistics
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import torch

import normscope as ns
from normscope.core.store import Store
from normscope.probes import attention, covariance, flight, hooks, moments, normalization, parameters, stream, tails
from normscope.probes.activations import Activations
from normscope.probes.factors import Factors
from normscope.scope.session import Session
from tests.benchmarks.overhead import DENSE, MODELS, Bench

SETTINGS = {"exact statistics, every step": (1, ("moments",)), "all probes, a sampled step": (10, None)}


def size(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def held(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradients(_self, optimizer, *_rest):
    return size(*(p.grad for p in held(optimizer) if p.grad is not None))


def weights(_self, optimizer, *_rest):
    return size(*held(optimizer))


def looked(self, optimizer, *_rest):
    return sum(size(flat.both[0]) for _, flat in self._mine(optimizer))


# part -> (owner, function, bytes that it has to read, by its arguments, or None)
PARTS = {
    "moments of activations and gradients": [(moments, "observe", lambda view: size(view.x))],
    "norms of parameter gradients": [(flight.Flight, "gradients", gradients)],
    "flight recorder, around the step": [(flight.Flight, "before_step", looked), (flight.Flight, "after_step", looked)],
    "parameters, around the step": [
        (parameters.Parameters, "before_step", weights),
        (parameters.Parameters, "gradients", weights),
        (parameters.Parameters, "after_step", weights),
    ],
    "tails of activations and gradients": [(tails, "subsample", None), (tails, "reduce", None)],
    "second moments of layers in turn": [(covariance, "observe", lambda x, _axis: size(x)), (Factors, "collect", None)],
    "inputs of normalization layers": [(Activations, "_norm", None)],
    "attention": [(attention.Attention, "forward", None)],
    "rest of the module hooks": [(hooks._ForwardHook, "__call__", None), (hooks._GradientHook, "__call__", None)],
    "rest of the step hooks": [(Session, "before_step", None), (Session, "after_step", None)],
    "statistics of the step": [
        (Session, "_sample", None),
        (normalization.Normalization, "rows", None),
        (stream.Stream, "rows", None),
    ],
    "writing": [(Session, "flush", None), (Store, "commit", None)],
}


class Clock:
    """Time and bytes of each part since the last `taken`; put around the functions while the context lasts."""

    def __init__(self):
        self.times, self.bytes, self._inner = Counter(), Counter(), []

    def wrapped(self, part, function, read):
        def timed(*args, **kwargs):
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                self.times[part] += whole - self._inner.pop()
                if self._inner:
                    self._inner[-1] += whole
                self.bytes[part] += read(*args, **kwargs) if read is not None else 0

        return timed

    def __enter__(self):
        self._before = [(owner, name, getattr(owner, name)) for some in PARTS.values() for owner, name, _ in some]
        for part, some in PARTS.items():
            for owner, name, read in some:
                setattr(owner, name, self.wrapped(part, getattr(owner, name), read))
        return self

    def __exit__(self, *error):
        for owner, name, function in self._before:
            setattr(owner, name, function)

    def taken(self):
        found = {part: (self.times[part], self.bytes[part]) for part in PARTS}
        self.times.clear()
        self.bytes.clear()
        return found


class Memory:
    """How fast this thread reads a tensor that no cache holds: the speed changes with what else the machine does."""

    def __init__(self):
        self._tensors, self._times, self._next = [torch.ones(1 << 21) for _ in range(16)], [], 0

    def read(self):
        for _ in range(2):
            self._next = (self._next + 1) % len(self._tensors)
            start = time.perf_counter()
            self._tensors[self._next].sum()
            self._times.append(time.perf_counter() - start)

    @property
    def speed(self):
        """Bytes a second."""
        return size(self._tensors[0]) / statistics.median(self._times)


def measure(name, setting, steps):
    """Return a row a part of one model and setting: times and bytes are medians over sampled steps."""
    every, probes = SETTINGS[setting]
    bench = Bench(MODELS[name])
    found, memory = [], Memory()
    with Clock() as clock, ns.attach(bench.model, bench.optimizer, every=every, probes=probes) as scope:
        gc.disable()
        while len(found) < steps + DENSE:
            active = scope._session.active
            whole = bench.step()
            parts = clock.taken()
            if active:
                memory.read()
                found.append((whole - sum(t for t, _ in parts.values()), parts))
        gc.enable()
    plain = statistics.median(rest for rest, _ in found[DENSE:])
    rows = []
    for part in PARTS:
        seconds, read = (statistics.median(parts[part][i] for _, parts in found[DENSE:]) for i in (0, 1))
        rows.append({"model": name, "setting": setting, "part": part, "ms": seconds * 1e3, "MB": read / 1e6})
        rows[-1] |= {"share": seconds / plain, "least": read / memory.speed / plain, "GB/s": memory.speed / 1e9}
    return rows


ABOUT = """# Where the time of an attached step goes

`python -m tests.benchmarks.parts --out reports/benchmarks`: a clock inside the hooks, one thread, CPU, torch {torch},
medians of {steps} sampled steps. Each part has the time that the others have not. "Share" is that over the rest of the
step, which is the user's own; "read" is what the part has to read at least once; "least" is the share that reading so
much takes at the speed at which this thread, at the same time, sums a tensor that is in no cache.

"""


def text(table, steps):
    """Return what was measured as Markdown."""
    lines = []
    for (name, setting), some in table.groupby(["model", "setting"], sort=False):
        speed = some["GB/s"].median()
        lines += [
            f"## {name}, {setting}",
            "",
            f"| part | ms | share | read (MB) | least at {speed:.0f} GB/s |",
            "|---|---:|---:|---:|---:|",
        ]
        for r in some[some.ms >= 0.005].itertuples():
            bound = f"{r.MB:.1f} | {r.least:.1%}" if r.MB else "|"
            lines.append(f"| {r.part} | {r.ms:.2f} | {r.share:.1%} | {bound} |")
        total = some[["ms", "share", "MB", "least"]].sum()
        lines += [f"| all | {total.ms:.2f} | {total.share:.1%} | {total.MB:.1f} | {total.least:.1%} |", ""]
    return ABOUT.format(torch=torch.__version__, steps=steps) + "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path, help="folder for parts.csv and parts.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in arguments.models for setting in SETTINGS for row in measure(name, setting, arguments.steps)]
    table = pd.DataFrame(rows)
    print(text(table, arguments.steps))
    if arguments.out:
        table.to_csv(arguments.out / "parts.csv", index=False)
        (arguments.out / "parts.md").write_text(text(table, arguments.steps), encoding="utf-8")


if __name__ == "__main__":
    main()
