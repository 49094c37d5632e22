"""What each normalization of weights costs: `python -m tests.benchmarks.weights [--out FOLDER]`.

Forward passes without gradient and with a backward pass, each method interleaved with a plain layer of the same shape,
and with the public implementation where torch or (if it can be imported) geotorch has one; medians of ratios within a
round, of the processor's time.
"""

import argparse
import csv
import importlib
import importlib.util
import random
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrizations

from normscope.weights import apply, zoo

FIELDS = ("layer", "name", "pass", "times_plain", "beside", "times_beside", "low", "high")
# the layers of ResNet-20 on 32 x 32 images, a batch of 32, and a recurrent cell
LAYERS = {
    "conv16": (lambda: nn.Conv2d(16, 16, 3, padding=1, bias=False), (32, 16, 32, 32)),
    "conv32": (lambda: nn.Conv2d(32, 32, 3, padding=1, bias=False), (32, 32, 16, 16)),
    "conv64": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (32, 64, 8, 8)),
    "linear": (lambda: nn.Linear(64, 10), (32, 64)),
    "square": (lambda: nn.Linear(64, 64), (32, 64)),
    "cell": (lambda: nn.RNNCell(64, 64), (32, 64)),
}


def geotorch(layer, triv):
    """geotorch parametrizes by a function of the module; its name is resolved where it is installed."""
    importlib.import_module("geotorch").orthogonal(layer, "weight", triv=triv)
    return layer


def near(layer):
    importlib.import_module("geotorch").almost_orthogonal(layer, "weight", lam=0.1)
    return layer


MATRICES = ("linear", "square")  # on kernels these take the taps for a matrix each, which is another method
BESIDE = {
    "weight-norm": (("torch", parametrizations.weight_norm, tuple(LAYERS)[:5]),),
    "spectral": (("torch", parametrizations.spectral_norm, tuple(LAYERS)[:5]),),
    "exponential": (
        ("torch", lambda m: parametrizations.orthogonal(m, orthogonal_map="matrix_exp"), MATRICES),
        ("geotorch", lambda m: geotorch(m, "expm"), MATRICES),
    ),
    "cayley": (
        ("torch", lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley"), MATRICES),
        ("geotorch", lambda m: geotorch(m, "cayley"), MATRICES),
    ),
    "householder": (("torch", lambda m: parametrizations.orthogonal(m, orthogonal_map="householder"), MATRICES),),
    "soft-orthogonal-svd": (("geotorch", near, ("square",)),),
}


def seconds(layer, x, calls, training):
    """Return the processor's seconds of one pass; what else the machine runs does not count."""
    start = time.thread_time()
    for _ in range(calls):
        if training:
            layer(x).sum().backward()
        else:
            layer(x)
    return (time.thread_time() - start) / calls


def timed(candidates, x, rounds, training):
    """Return the seconds of each candidate in each round."""
    for layer in candidates:
        seconds(layer, x, 3, training)
    calls = [max(1, int(5e-4 / max(seconds(layer, x, 3, training), 1e-6))) for layer in candidates]
    times = []
    for _ in range(rounds):
        found = [0.0] * len(candidates)
        # in a new order each time, so that none is always the first after another
        for place in random.sample(range(len(candidates)), len(candidates)):
            layer, n = candidates[place], calls[place]
            found[place] = min(seconds(layer, x, n, training) for _ in range(2))
        times.append(found)
    return times


@torch.no_grad()
def moved(layer):
    """Move raw matrices off their start, where the exponential of zero costs nothing."""
    for name, p in layer.named_parameters():
        if "parametrizations" in name and p.ndim == 2:
            p += 0.1 * torch.randn_like(p).tril(-1)
    return layer.eval()


def quartiles(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def measure(kind, name, rounds):
    """Yield the lines of one method on one layer: beside the plain one, and beside each public implementation."""
    make, shape = LAYERS[kind]
    x = torch.randn(shape)
    ours = moved(apply(make(), name))
    rivals = [
        (package, moved(register(make())))
        for package, register, where in BESIDE.get(name, ())
        if kind in where and importlib.util.find_spec(package)
    ]
    candidates = [make().eval(), ours, *(layer for _, layer in rivals)]
    for training in (False, True):
        with torch.set_grad_enabled(training):
            times = timed(candidates, x, rounds, training)
        known = (kind, name, "forward and backward" if training else "forward")
        known = (*known, round(quartiles([t[1] / t[0] for t in times])[0], 2))
        if not rivals:
            yield dict(zip(FIELDS, (*known, "", "", "", ""), strict=True))
        for place, (package, _) in enumerate(rivals, 2):
            found = [round(v, 3) for v in quartiles([t[1] / t[place] for t in times])]
            yield dict(zip(FIELDS, (*known, package, *found), strict=True))


def wanted(kind, name):
    square = zoo[name].layers == (nn.RNNCellBase,)
    return kind == "cell" if square else kind != "cell" and (name != "isometric" or kind.startswith("conv"))


def cell(plain, name, kind):
    found = [str(plain[name, kind, p]) for p in ("forward", "forward and backward") if (name, kind, p) in plain]
    return " / ".join(found)


def write(lines, folder):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "weights.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    plain = {(line["name"], line["layer"], line["pass"]): line["times_plain"] for line in lines}
    text = [
        "# Normalizing weights: cost of a forward pass",
        "",
        "Forward pass, and forward and backward after the slash, in times that of the plain layer of the same shape: "
        "medians of interleaved rounds on one thread, processor's time, batch of 32, evaluation mode, torch "
        f"{torch.__version__}. `python -m tests.benchmarks.weights` makes it.",
        "",
        "| method | " + " | ".join(LAYERS) + " |",
        "| --- |" + " --- |" * len(LAYERS),
        *(f"| {n} | " + " | ".join(cell(plain, n, k) for k in LAYERS) + " |" for n in zoo),
        "",
        "## Beside public implementations",
        "",
        "Times that of the other's layer: below 1 is faster; quartiles of the rounds in brackets.",
        "",
        "| method | layer | pass | beside | ratio |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {line['name']} | {line['layer']} | {line['pass']} | {line['beside']} | {line['times_beside']} "
            f"[{line['low']}, {line['high']}] |"
            for line in lines
            if line["beside"]
        ),
        "",
    ]
    (folder / "weights.md").write_text("\n".join(text), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for weights.csv and weights.md")
    parser.add_argument("--names", nargs="*", help="only these rows")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = []
    for kind in LAYERS:
        for name in arguments.names or zoo:
            if not wanted(kind, name):
                continue
            for line in measure(kind, name, arguments.rounds):
                print("  ".join(f"{line[field]!s:<22}" for field in FIELDS), flush=True)
                lines.append(line)
    if arguments.out:
        write(lines, arguments.out)


if __name__ == "__main__":
    main()
