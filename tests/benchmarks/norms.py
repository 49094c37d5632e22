"""What each normalization costs: `python -m tests.benchmarks.norms [--out FOLDER] [--names NAME ...]`.

Forward and backward of every row of the zoo, interleaved with nn.BatchNorm2d in one process and one thread. Times are
of the processor, not of the clock, so that what else the machine does counts for little. Memory is what the allocator
of torch hands out and takes back, added up in the order of time.
"""

import argparse
import csv
import ctypes
import functools
import platform
import random
import statistics
import time
from pathlib import Path

import matplotlib as mpl
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from normscope.core.errors import ArgumentError
from normscope.norms import build, zoo
from tests.benchmarks.arithmetic import work

SHAPES = {"maps": (64, 64, 32, 32), "tokens": (8, 128, 256)}
# settings that tests make small; the benchmark takes the method's own
SMALL = {"groups", "group_size", "block", "examples", "window", "hidden", "entities"}
FIELDS = {
    "shape": "maps (64, 64, 32, 32) or tokens (8, 128, 256)",
    "name": "row of the zoo",
    "milliseconds": "forward and backward",
    "times_batch_norm": "that over nn.BatchNorm2d",
    "times_needed": "that over what its arithmetic needs",
    "times_reached": "the same with the bandwidth that sums and maps of torch reach, each",
    "times_paced": "the same with passes at the pace of nn.BatchNorm2d, which makes 8",
    "needed_milliseconds": "passes x bytes / bandwidth + products / product rate + functions",
    "passes": "tensors read or written, forward + backward",
    "sums": "how many of these are only summed up",
    "columns": "multiplications and additions in products for each entry",
    "functions": "of each entry",
    "beside": "kernel of torch or textbook formulation",
    "times_beside": "time over that",
    "peak_mebibytes": "most memory beyond the input",
    "peak_times_batch_norm": "that over nn.BatchNorm2d",
}


def textbook(rows):
    """Center, covariance, Newton's iteration as usually written, one product: all left to autograd."""
    centered = rows - rows.mean(-1, keepdim=True)
    sigma = centered @ centered.mT / centered.shape[-1]
    trace = sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    p = torch.eye(sigma.shape[-1]).expand_as(sigma)
    for _ in range(5):
        p = 1.5 * p - 0.5 * (p @ p @ p) @ (sigma / trace)
    return (p / trace.sqrt()) @ centered


class TextbookBatch(nn.Module):
    """Iterative normalization with the batch transposed to channels by samples."""

    def __init__(self, features, *spatial):
        super().__init__()
        shape = (1, features, *(1 for _ in spatial))
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        rows = x.transpose(0, 1)
        y = textbook(rows.reshape(x.shape[1], -1))
        return y.reshape(rows.shape).transpose(0, 1).contiguous() * self.weight + self.bias


class TextbookGroup(TextbookBatch):
    """Group whitening of 32 groups."""

    def forward(self, x):
        y = textbook(x.reshape(len(x), 32, -1))
        return y.reshape(x.shape) * self.weight + self.bias


# what has a kernel of torch, or a formulation in the textbooks, is also measured beside that
BESIDE = {
    "maps": {
        "batch": lambda: nn.BatchNorm2d(64),
        "layer": lambda: nn.GroupNorm(1, 64),
        "group": lambda: nn.GroupNorm(32, 64),
        "instance": lambda: nn.InstanceNorm2d(64, affine=True),
        "local-response": lambda: nn.LocalResponseNorm(5, 5e-4),
        "iterative": lambda: TextbookBatch(64, 32, 32),
        "group-whitening": lambda: TextbookGroup(64, 32, 32),
    },
    "tokens": {
        "batch": lambda: nn.BatchNorm1d(128),
        "layer": lambda: nn.LayerNorm(256),
        "group": lambda: nn.GroupNorm(32, 128),
        "instance": lambda: nn.InstanceNorm1d(128, affine=True),
        "rms": lambda: nn.RMSNorm(256, eps=1e-6),
        "iterative": lambda: TextbookBatch(128, 256),
        "group-whitening": lambda: TextbookGroup(128, 256),
    },
}


def widened(value, small, large):
    """Repeat what a row takes beside its input, made for `(6, C, 4, 5)` or `(6, 5, C)`, to the shape measured."""
    if isinstance(value, tuple | list):
        return type(value)(widened(part, small, large) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    value = value.float() if value.is_floating_point() else value
    for axis, size in enumerate(value.shape):
        # examples, and the other axes where the input has as many
        counted = axis == 0 or axis < len(small) == len(large)
        if counted and size == small[axis]:
            value = value.index_select(axis, torch.arange(large[axis]) % size)
    return value


def prepared(name, shape):
    """Return a layer and the arguments of its forward, or the reason why it does not take this shape."""
    row, size = zoo[name], SHAPES[shape]
    options = {key: value for key, value in row.options if key not in SMALL}
    reason = "it gives another shape"
    # channels on the last axis of tokens, or else on axis 1
    for features in dict.fromkeys((size[-1] if shape == "tokens" else size[1], size[1])):
        small, *rest = row.inputs(features, torch.Generator().manual_seed(0))
        try:
            layer = build(name, features, **options)
            extra = [widened(value, small.shape, size) for value in rest]
            if layer(torch.randn(size), *extra).shape == size:
                return layer, extra
        except (ArgumentError, ValueError, RuntimeError, IndexError, TypeError) as error:
            reason = str(error).splitlines()[0]
    return None, reason


def once(layer, x, weights, extra):
    """Return the processor's seconds of one forward and backward pass."""
    value = x.clone().requires_grad_()
    start = time.process_time()
    layer(value, *extra).backward(weights)
    return time.process_time() - start


def peak(layer, x, extra):
    """Return the most bytes that forward and backward hold at once, beyond the input."""
    value, weights = x.clone().requires_grad_(), torch.ones_like(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        layer(value, *extra).backward(weights)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def interleaved(cases, rounds):
    """Return the median of each function's seconds, all of them measured in every round, in a new order each time."""
    times = [[] for _ in cases]
    for turn in range(rounds + 1):
        for place in random.sample(range(len(cases)), len(cases)):
            seconds = cases[place]()
            if turn:
                times[place].append(seconds)
    return [statistics.median(column) for column in times]


def machine(shape):
    """Return what times the machine: a pass over a tensor, a sum, a column of a product, a function of each entry."""
    x, out = torch.randn(shape).abs(), torch.empty(shape)
    features = shape[1]
    square, wide = torch.randn(features, features), x.reshape(len(x), features, -1)
    flat = x.reshape(features, -1)

    def timed(function, parts=1):
        def run():
            start = time.process_time()
            function()
            return (time.process_time() - start) / parts

        return run

    functions = {name: getattr(torch, name) for name in ("exp", "log", "tanh", "erf")}
    return {
        # reads two tensors and writes one
        "pass": timed(lambda: torch.add(x, x, out=out), 3),
        "sum": timed(lambda: torch.sum(x, [axis for axis in range(x.ndim) if axis != 1])),
        "column": timed(lambda: torch.bmm(square.expand(len(x), -1, -1), wide, out=out.view(wide.shape)), features),
        "kthvalue": timed(lambda: flat.kthvalue(flat.shape[1] // 4)),
    } | {name: timed(functools.partial(function, x, out=out)) for name, function in functions.items()}


def needed(task, rate):
    """Return the seconds that the arithmetic of a row needs, from seconds by name as `machine` has them."""
    passes = (task.forward + task.backward - task.sums) * rate["pass"] + task.sums * rate["sum"]
    return passes + task.columns * rate.get("column", 0) + sum(rate[function] for function in task.functions)


def measure(shape, names, rounds):
    """Yield a line of the table for each row of the zoo that takes this shape, and names with reasons for others."""
    x = torch.randn(SHAPES[shape])
    weights = torch.randn_like(x)
    clocks = machine(SHAPES[shape])
    plain = nn.BatchNorm2d(64) if shape == "maps" else nn.BatchNorm1d(128)
    base_peak = peak(plain, x, [])
    for name in names or zoo:
        layer, extra = prepared(name, shape)
        if layer is None:
            yield {"shape": shape, "name": name, "reason": extra}
            continue
        layers = [(plain, []), (layer, extra)]
        beside = BESIDE[shape].get(name, lambda: None)()
        if beside is not None:
            layers.append((beside, []))
        task = work(name)
        used = ["pass", "sum", *(["column"] if task.columns else []), *dict.fromkeys(task.functions)]
        cases = [functools.partial(once, layer, x, weights, extra) for layer, extra in layers]
        # a difference of a few per cent takes more rounds; tokens are quick
        often = 1 if beside is None else 3 if shape == "maps" else 30
        found = interleaved([*cases, *(clocks[name] for name in used)], rounds * often)
        rate = dict(zip(used, found[len(cases) :], strict=True))
        alike, pace = {"sum": rate["pass"]}, dict.fromkeys(("pass", "sum"), found[0] / 8)
        least, reached, paced = (needed(task, rate | other) for other in (alike, {}, pace))
        most = peak(layer, x, extra)
        yield {
            "shape": shape,
            "name": name,
            "milliseconds": round(1e3 * found[1], 3),
            "times_batch_norm": round(found[1] / found[0], 2),
            "times_needed": round(found[1] / least, 2),
            "times_reached": round(found[1] / reached, 2),
            "times_paced": round(found[1] / paced, 2),
            "needed_milliseconds": round(1e3 * least, 3),
            "passes": f"{task.forward}+{task.backward}",
            "sums": task.sums,
            "columns": task.columns,
            "functions": " ".join(task.functions),
            "beside": type(beside).__name__ if beside else "",
            "times_beside": round(found[1] / found[2], 3) if beside else "",
            "peak_mebibytes": round(most / 2**20, 1),
            "peak_times_batch_norm": round(most / base_peak, 2),
        }


def keep_memory():
    """Let the allocator of the C library keep what it is given back, so that no row pays for new pages."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**31 - 1)
        libc.mallopt(-1, 2**31 - 1)


def draw(lines, path):
    """Draw times over batch normalization and over the arithmetic, the slowest on top."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    chosen = {shape: [line for line in lines if line["shape"] == shape] for shape in SHAPES}
    longest = max(map(len, chosen.values()))
    figure, axes = plt.subplots(1, 2, figsize=(15, 2 + 0.17 * longest), layout="constrained")
    for axis, (shape, found) in zip(axes, chosen.items(), strict=True):
        found.sort(key=lambda line: line["times_batch_norm"])
        names = [line["name"] for line in found]
        axis.hlines(names, 0.1, [line["times_batch_norm"] for line in found], color="0.85", linewidth=0.7)
        axis.plot([line["times_batch_norm"] for line in found], names, "o", ms=4.5, color="#0072B2")
        axis.plot([line["times_reached"] for line in found], names, "D", ms=4, mfc="none", color="#D55E00")
        axis.axvline(1, color="0.4", linewidth=0.8)
        axis.axvline(3, color="#D55E00", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", title=f"{shape} {SHAPES[shape]}", xlabel="times, forward and backward")
        axis.set_ylim(-1, len(found))
        axis.tick_params(axis="y", labelsize=7)
    axes[0].legend(
        handles=axes[0].lines,
        labels=[
            "beside nn.BatchNorm2d",
            "beside its arithmetic as torch reaches it",
            "equal",
            "limit for the arithmetic: 3",
        ],
        loc="lower right",
        fontsize=8,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for norms.csv and norms.png")
    parser.add_argument("--names", nargs="*", help="only these rows")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_memory()
    lines, left = [], []
    for shape in arguments.shapes:
        for line in measure(shape, arguments.names, arguments.rounds):
            (left if "reason" in line else lines).append(line)
            print(
                "  ".join(f"{value!s:<22}" if key == "name" else str(value) for key, value in line.items()), flush=True
            )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "norms.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(FIELDS))
            writer.writeheader()
            writer.writerows(lines)
        draw(lines, arguments.out / "norms.png")


if __name__ == "__main__":
    main()
