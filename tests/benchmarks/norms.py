"""What each normalization costs beside nn.BatchNorm2d: `python -m tests.benchmarks.norms [--out FOLDER]`."""

import argparse
import csv
import random
import statistics
import time
from pathlib import Path

import matplotlib as mpl
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from normscope.norms import build, zoo

SHAPES = {"maps": (64, 64, 32, 32), "tokens": (8, 128, 256)}
FIELDS = (
    "shape",
    "name",
    "milliseconds",
    "times_batch_norm",
    "beside",
    "times_beside",
    "peak_mebibytes",
    "peak_times_batch_norm",
)


def textbook(x, whiten, shape):
    """Center, covariance, Newton's iteration as usually written, one product: all left to autograd."""
    centered = whiten - whiten.mean(-1, keepdim=True)
    sigma = centered @ centered.mT / centered.shape[-1]
    trace = sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    p = torch.eye(sigma.shape[-1]).expand_as(sigma)
    for _ in range(5):
        p = 1.5 * p - 0.5 * (p @ p @ p) @ (sigma / trace)
    return (p / trace.sqrt()) @ centered


class TextbookBatch(nn.Module):
    """Iterative normalization with the batch transposed to channels by samples."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, features, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, features, 1, 1))

    def forward(self, x):
        rows = x.transpose(0, 1)
        y = textbook(x, rows.reshape(x.shape[1], -1), rows.shape)
        return y.reshape(rows.shape).transpose(0, 1).contiguous() * self.weight + self.bias


class TextbookGroup(TextbookBatch):
    """Group whitening of 32 groups."""

    def forward(self, x):
        y = textbook(x, x.reshape(len(x), 32, -1), x.shape)
        return y.reshape(x.shape) * self.weight + self.bias


# what has a kernel of torch, or a formulation in the textbooks, is also measured beside that
BESIDE = {
    "maps": {
        "batch": lambda: nn.BatchNorm2d(64),
        "layer": lambda: nn.GroupNorm(1, 64),
        "group": lambda: nn.GroupNorm(32, 64),
        "instance": lambda: nn.InstanceNorm2d(64, affine=True),
        "iterative": lambda: TextbookBatch(64),
        "group-whitening": lambda: TextbookGroup(64),
    },
    "tokens": {"layer": lambda: nn.LayerNorm(256), "rms": lambda: nn.RMSNorm(256, eps=1e-6)},
}


class OnTokens(nn.BatchNorm1d):
    """Batch normalization of `(N, L, C)`."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).reshape(x.shape)


def rows(shape, names):
    """Yield name and layer of what takes one input of this shape and gives one of the same shape."""
    features = SHAPES[shape][1 if shape == "maps" else -1]
    x = torch.randn(SHAPES[shape])
    for name, row in zoo.items():
        if names and name not in names:
            continue
        options = {k: v for k, v in row.options if k not in {"groups", "group_size", "block", "examples"}}
        try:
            layer = build(name, features, **options)
            if layer(x).shape == x.shape:
                yield name, build(name, features, **options)
        except (ValueError, RuntimeError, TypeError):
            continue


def once(layer, x, weights):
    """Return the seconds of one forward and backward pass."""
    value = x.clone().requires_grad_()
    start = time.perf_counter()
    layer(value).backward(weights)
    return time.perf_counter() - start


def peak(layer, x, weights):
    """Return the most bytes that forward and backward hold at once, beyond the input."""
    value = x.clone().requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        layer(value).backward(weights)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def interleaved(layers, x, rounds):
    """Return the median seconds of each layer, all of them measured in every round."""
    weights = torch.randn_like(x)
    for layer in layers:
        once(layer, x, weights)
    times = {place: [] for place in range(len(layers))}
    for _ in range(rounds):
        # in a new order each time, so that none is always the first after another
        for place in random.sample(list(times), len(times)):
            times[place].append(once(layers[place], x, weights))
    return [statistics.median(column) for column in times.values()]


def measure(shape, names, rounds):
    """Yield a line of the table for each row of the zoo."""
    x = torch.randn(SHAPES[shape])
    plain = nn.BatchNorm2d(64) if shape == "maps" else OnTokens(256)
    weights = torch.randn_like(x)
    base_peak = peak(plain, x, weights)
    for name, layer in rows(shape, names):
        beside = BESIDE[shape][name]() if name in BESIDE[shape] else None
        found = interleaved([plain, layer, *([beside] if beside else [])], x, rounds)
        most = peak(layer, x, weights)
        yield {
            "shape": shape,
            "name": name,
            "milliseconds": round(1e3 * found[1], 2),
            "times_batch_norm": round(found[1] / found[0], 2),
            "beside": type(beside).__name__ if beside else "",
            "times_beside": round(found[1] / found[2], 3) if beside else "",
            "peak_mebibytes": round(most / 2**20, 1),
            "peak_times_batch_norm": round(most / base_peak, 2),
        }


def draw(lines, path):
    """Draw the times as bars."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 18), layout="constrained")
    for axis, shape in zip(axes, SHAPES, strict=True):
        chosen = sorted((line for line in lines if line["shape"] == shape), key=lambda line: line["times_batch_norm"])
        axis.barh([line["name"] for line in chosen], [line["times_batch_norm"] for line in chosen])
        axis.set_xscale("log")
        axis.set_xlabel(f"time of forward and backward, times that of batch normalization, {SHAPES[shape]}")
        axis.tick_params(labelsize=6)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for benchmark.csv and benchmark.png")
    parser.add_argument("--names", nargs="*", help="only these rows")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = []
    for shape in SHAPES:
        for line in measure(shape, arguments.names, arguments.rounds):
            print(
                "  ".join(f"{line[field]!s:<24}" if field == "name" else str(line[field]) for field in FIELDS),
                flush=True,
            )
            lines.append(line)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "benchmark.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(lines)
        draw(lines, arguments.out / "benchmark.png")


if __name__ == "__main__":
    main()
