"""What attaching adds to peak memory, and whether it grows: `python -m tests.benchmarks.memory`."""

import argparse
import multiprocessing
import tempfile

import torch
import torch.nn.functional as F
from torch import nn

import normscope as ns
from tests.benchmarks.overhead import MODELS


def resident(kind="VmRSS"):
    """Return resident memory of this process in MB: VmRSS now, VmHWM at its peak."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


def small():
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
    return model, (torch.randn(32, 32), torch.randint(0, 4, (32,)))


def train(name, attached, steps, marks, every, answers):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, (x, y) = small() if name == "small" else MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with tempfile.TemporaryDirectory() as folder:
        scope = ns.attach(model, optimizer, run=f"{folder}/run", every=every) if attached else None
        seen = []
        for step in range(steps + 1):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step in marks:
                seen.append(resident())
        answers.put((seen, resident("VmHWM")))
        if scope is not None:
            scope.close()


def measured(name, attached, steps, marks=(), every=10):
    """Train in a process of its own; return resident memory at the marks and at the peak, in MB."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=train, args=(name, attached, steps, marks, every, answers))
    process.start()
    found = answers.get(timeout=900)
    process.join()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    print("model         plain MB  attached MB  more MB  limit MB (5 % or 32)")
    for name in arguments.models:
        plain, watched = (measured(name, attached, 12)[1] for attached in (False, True))
        more, limit = watched - plain, max(32, 0.05 * plain)
        print(f"{name:12s} {plain:9.0f} {watched:12.0f} {more:8.1f} {limit:9.0f}", flush=True)
    (early, late), _ = measured("small", True, 10_000, (100, 10_000))
    print(f"small MLP, attached: {early:.1f} MB at step 100, {late:.1f} MB at step 10,000 (+{late - early:.1f})")


if __name__ == "__main__":
    main()
