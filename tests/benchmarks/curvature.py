"""What curvature costs, in gradients, beside other libraries: `python -m tests.benchmarks.curvature [--out FOLDER]`.

One process and one thread; time is that of the processor, so that a busy machine matters less, and each number is a
multiple of one gradient of the same model taken next to it. Peers are run where they are installed (the extra `peers`).
BatchNorm keeps no running statistics here, as one of them refuses such a layer and another leaves training mode.
"""

import argparse
import csv
import importlib
import os
import platform
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from scipy.stats import wasserstein_distance
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import normscope as ns

FIELDS = ("model", "task", "engine", "gradients", "matvecs", "error", "times_normscope")
PEERS = {"pyhessian": "pyhessian", "curvlinops": "curvlinops", "hessian-eigenthings": "hessian_eigenthings"}
K, TOL, STEPS = 10, 1e-3, 100


def mlp():
    layers = [
        m for i in range(20) for m in (nn.Linear(784 if i == 0 else 128, 128, bias=False), batch_norm(128), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Linear(128, 10)), (torch.randn(128, 784), torch.randint(0, 10, (128,)))


def transformer():
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(64, 128), encoder, nn.LayerNorm(128), nn.Linear(128, 64), nn.Flatten(0, 1))
    return model, (torch.randint(0, 64, (2, 64)), torch.randint(0, 64, (128,)))


def small():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), batch_norm(8, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), batch_norm(16, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).double()  # fmt: skip
    return model, (torch.randn(32, 1, 8, 8, dtype=torch.float64), torch.randint(0, 10, (32,)))


def batch_norm(features, axes=1):
    return (nn.BatchNorm1d if axes == 1 else nn.BatchNorm2d)(features, track_running_stats=False)


MODELS = {"mlp": mlp, "transformer": transformer}


def clock(call):
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


class Case:
    """A model, its batch, and the time of one gradient, taken anew beside every measurement."""

    def __init__(self, name, build):
        torch.manual_seed(0)
        self.name, (self.model, (self.x, self.y)) = name, build()
        self.params = list(self.model.parameters())
        self.rows = []

    def gradient(self):
        return torch.autograd.grad(F.cross_entropy(self.model(self.x), self.y), self.params)

    def gradients(self, call, repeats=1):
        """Return the time of a call in gradients, a median over repeats between which gradients are taken."""
        ratios = []
        for _ in range(repeats):
            before = [clock(self.gradient)[0] for _ in range(3)]
            spent, found = clock(call)
            after = [clock(self.gradient)[0] for _ in range(3)]
            ratios.append(spent / statistics.median(before + after))
        return statistics.median(ratios), found

    def add(self, task, engine, cost, matvecs="", error=""):
        own = next((row["gradients"] for row in self.rows if row["task"] == task), cost)
        row = (self.name, task, engine, cost, matvecs, error, cost / own)
        self.rows.append(dict(zip(FIELDS, row, strict=True)))
        wrong = "" if error == "" else f"{error:.1e}"
        print(
            f"{self.name:12s} {task:22s} {engine:22s} {cost:9.2f} {matvecs!s:>5} {wrong:>8} {cost / own:.2f}",
            flush=True,
        )


# ---- engines: the same three things from each ------------------------------------------------------------------------


def eig(matrix, eigenvectors=True):
    """Stand in for torch.eig, which PyHessian calls and torch no longer has."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


class Counted:
    def __init__(self, operator):
        self.operator, self.count = operator, 0

    def __call__(self, v):
        self.count += 1
        return self.operator.matvec(v)


def pyhessian(case):
    from pyhessian import hessian

    torch.eig = eig
    made = hessian(case.model, F.cross_entropy, data=(case.x, case.y), cuda=False)
    v = [torch.randn_like(p) for p in made.params]
    counts = [0]
    reset = case.model.zero_grad

    def zero_grad(set_to_none=True):
        counts[0] += 1
        reset(set_to_none)

    case.model.zero_grad = zero_grad

    def top():
        counts[0] = 0
        return made.eigenvalues(maxIter=1000, tol=TOL, top_n=K)[0], counts[0]

    def density():
        counts[0] = 0
        nodes, weights = made.density(iter=STEPS, n_v=1)
        return np.array(nodes[0]), np.array(weights[0]), counts[0]

    held = lambda: torch.autograd.grad(made.gradsH, made.params, grad_outputs=v, retain_graph=True)  # noqa: E731
    return {"held": held, "top": top, "density": density}


def curvlinops(case):
    from curvlinops import HessianLinearOperator
    from curvlinops.papyan2020traces.spectrum import fast_lanczos, lanczos_approximate_spectrum

    data = [(case.x, case.y)]
    made = HessianLinearOperator(
        case.model, nn.CrossEntropyLoss(), case.params, data,
        check_deterministic=False,
    )  # fmt: skip
    v = torch.randn(sum(p.numel() for p in case.params), dtype=case.params[0].dtype)
    scipy = made.to_scipy()
    count = [0]
    original = scipy._matvec

    def counted(x):
        count[0] += 1
        return original(x)

    scipy._matvec = counted

    def top():
        count[0] = 0
        return list(eigsh(scipy, k=K, which="LM", tol=TOL, return_eigenvectors=False)), count[0]

    def density():
        if case.name == "small":
            values, vectors = fast_lanczos(made, STEPS)
            return values.numpy(), vectors[0].square().numpy(), STEPS
        return *lanczos_approximate_spectrum(made, STEPS), ""

    return {"streamed": lambda: made @ v, "top": top, "density": density}


def hessian_eigenthings(case):
    from hessian_eigenthings import HessianOperator, lanczos, spectral_density, supervised_loss

    made = HessianOperator(case.model, [(case.x, case.y)], supervised_loss(F.cross_entropy))
    v = torch.randn(made.size, dtype=case.params[0].dtype)

    def top():
        found = lanczos(made, k=K, max_iter=80, reorthogonalize=True, seed=0)
        return found.eigenvalues.tolist(), 80

    def density():
        found = spectral_density(made, num_runs=1, lanczos_steps=STEPS, seed=SEED[0])
        return found.raw_eigenvalues[0].numpy(), found.raw_weights[0].numpy(), STEPS

    return {"streamed": lambda: made.matvec(v), "top": top, "density": density}


def normscope(case):
    batch = (case.x, case.y)
    kept = ns.Problem(case.model, F.cross_entropy, [batch])
    anew = ns.Problem(case.model, F.cross_entropy, iter_again([batch]), held=None).operator()
    v = torch.randn(kept.size, dtype=case.params[0].dtype)
    kept.hvp(v)

    def top():
        found = ns.eigenpairs(kept, K, "LM", tol=TOL)
        return list(found.values), found.matvecs

    def density():
        found = ns.spectrum(kept, method="slq", steps=STEPS, probes=1, seed=SEED[0])
        return found.nodes, found.weights, found.matvecs

    return {"held": lambda: kept.hvp(v), "streamed": lambda: anew.matvec(v), "top": top, "density": density}


class iter_again:  # a loader in all but name
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


SEED = [0]
ENGINES = {
    "normscope": normscope,
    "pyhessian": pyhessian,
    "curvlinops": curvlinops,
    "hessian-eigenthings": hessian_eigenthings,
}


def installed():
    """Return the engines that can be run; each absent one gets a line."""
    found = {"normscope": normscope}
    for name, module in PEERS.items():
        try:
            importlib.import_module(module)
            found[name] = ENGINES[name]
        except ImportError as error:
            print(f"skipped: {name} is not installed ({error}); pip install normscope[peers]")
    return found


def relative_error(found, expected):
    found, expected = (np.sort(np.abs(values)) for values in (found, expected))  # signs may alternate at equal size
    return float(np.max(np.abs(found / expected - 1)))


def measure(case, engines, repeats):
    exact = ns.eigenpairs(
        ns.Problem(case.model, F.cross_entropy, [(case.x, case.y)]), K, "LM", tol=1e-5, max_matvecs=300
    )
    made = {name: build(case) for name, build in engines.items()}
    for task in ("held", "streamed"):
        for name, calls in made.items():
            if task in calls:
                calls[task]()
                case.add(f"product, batch {task}", name, case.gradients(calls[task], repeats)[0])
    for name, calls in made.items():
        cost, (values, matvecs) = case.gradients(calls["top"])
        case.add("top 10 to 1e-3", name, cost, matvecs, relative_error(values, exact.values))
    for name, calls in made.items():
        cost, found = case.gradients(calls["density"])
        case.add("density, 100 steps", name, cost, found[-1])


def accuracy(engines):
    """Add the Wasserstein distance to the exact spectrum, relative to its width: a median over 5 probes."""
    case = Case("small", small)
    problem = ns.Problem(case.model, F.cross_entropy, [(case.x, case.y)])
    values = ns.spectrum(problem, method="exact").nodes
    for name, build in engines.items():
        calls, apart = build(case), []
        for seed in range(5):
            SEED[0] = seed
            torch.manual_seed(seed)
            nodes, weights, matvecs = calls["density"]()
            apart.append(wasserstein_distance(nodes, values, weights) / np.ptp(values))
        case.add("density, W1 to exact", name, 1.0, matvecs, statistics.median(apart))
    for row in case.rows:
        row["gradients"] = row["times_normscope"] = ""
    return case.rows


def write(rows, folder, repeats):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "curvature.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    lines = [
        "# Curvature, in gradients",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, 1 thread, torch {torch.__version__}, Python "
        f"{platform.python_version()}. Processor time as multiples of one gradient of the same model (forward and "
        f"backward over all parameters) taken beside it; products are medians of {repeats}, algorithms single runs. "
        "Written by `python -m tests.benchmarks.curvature`.",
        "",
        "| " + " | ".join(FIELDS) + " |",
        "|" + "---|" * len(FIELDS),
    ]
    shown = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    lines += [f"| {' | '.join(cells)} |" for cells in shown]
    (folder / "curvature.md").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder for curvature.csv and curvature.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    engines, rows = installed(), []
    for name in arguments.models:
        case = Case(name, MODELS[name])
        with sdpa_kernel(SDPBackend.MATH):
            measure(case, engines, arguments.repeats)
        rows += case.rows
        if arguments.out:
            write(rows, arguments.out, arguments.repeats)
    rows += accuracy(engines)
    if arguments.out:
        write(rows, arguments.out, arguments.repeats)


if __name__ == "__main__":
    main()
