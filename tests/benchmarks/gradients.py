"""What a step of each optimizer costs beside torch's SGD: `python -m tests.benchmarks.gradients [--out FOLDER]`.

With `pytorch_optimizer` installed, those that it has as well are also measured beside its own.
"""

import argparse
import csv
import importlib.util
import random
import statistics
import time
from pathlib import Path

import torch

from normscope.gradients import build, zoo
from normscope.workbench.models import residual_cnn

FIELDS = ("name", "milliseconds", "times_sgd", "beside", "times_beside")


def resnet20():
    """Return a ResNet-20 with gradients, and those of 4 samples."""
    model = residual_cnn(16, (3, 3, 3))
    for p in model.parameters():
        p.grad_sample = torch.randn(4, *p.shape)
        p.grad = p.grad_sample.mean(0)
    return model


def peers():
    """Return label and maker of the counterpart of a row, where there is one."""
    if importlib.util.find_spec("pytorch_optimizer") is None:
        return {}
    import pytorch_optimizer as public
    from pytorch_optimizer.optimizer.agc import agc
    from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient

    class Changed(torch.optim.SGD):
        """SGD on gradients that a function of the library changes; they are put back, as ours are."""

        def __init__(self, params, change, **options):
            super().__init__(params, **options)
            self.change = change

        def step(self):
            held = [p for group in self.param_groups for p in group["params"]]
            originals = [p.grad for p in held]
            for p in held:
                p.grad = self.change(p)
            super().step()
            for p, original in zip(held, originals, strict=True):
                p.grad = original

    def centralized(p):
        grad = p.grad.clone()
        centralize_gradient(grad)
        return grad

    def clipped(p):
        return agc(p, p.grad.clone())

    return {
        "lars": ("pytorch_optimizer LARS", lambda params, **o: public.LARS(params, weight_decay=5e-4, **o)),
        "lamb": ("pytorch_optimizer Lamb", lambda params, **o: public.Lamb(params, weight_decay=0.01, **o)),
        "adamp": ("pytorch_optimizer AdamP", public.AdamP),
        "sgdp": ("pytorch_optimizer SGDP", lambda params, **o: public.SGDP(params, momentum=0.9, **o)),
        "gradient-centralization": (
            "pytorch_optimizer function, torch SGD",
            lambda params, **o: Changed(params, centralized, **o),
        ),
        "adaptive-gradient-clipping": (
            "pytorch_optimizer function, torch SGD",
            lambda params, **o: Changed(params, clipped, **o),
        ),
    }


def interleaved(optimizers, rounds):
    """Return the median seconds that this thread computes for a step of each, all of them measured in every round."""
    times = [[] for _ in optimizers]
    for turn in range(rounds + 3):
        # in a new order each time, so that none is always the first after another
        for place in random.sample(range(len(optimizers)), len(optimizers)):
            start = time.thread_time()
            optimizers[place].step()
            if turn >= 3:
                times[place].append(time.thread_time() - start)
    return [statistics.median(column) for column in times]


def made(name):
    """Return the optimizer of a row, with the settings of its counterpart."""
    model = resnet20()
    params = list(model.parameters())
    options = {"model": model, "shape": (1, 28, 28)} if name == "path-normalized" else {}
    if name == "lars":  # tensors of one dimension take plain steps in the counterpart
        apart = {"params": [p for p in params if p.ndim == 1], "trust_coefficient": None, "weight_decay": 0.0}
        params = [{"params": [p for p in params if p.ndim > 1]}, apart]
    return build(name, params, lr=1e-3, **options)


def measure(name, peer, rounds):
    """Return the line of the table of one row."""
    optimizers = [torch.optim.SGD(resnet20().parameters(), lr=1e-3, momentum=0.9), made(name)]
    label, maker = peer
    if maker is not None:
        optimizers.append(maker(resnet20().parameters(), lr=1e-3))
    found = interleaved(optimizers, rounds)
    return {
        "name": name,
        "milliseconds": round(1e3 * found[1], 2),
        "times_sgd": round(found[1] / found[0], 2),
        "beside": label,
        "times_beside": round(found[1] / found[2], 2) if maker is not None else "",
    }


def write(lines, folder):
    """Write gradients.csv, and gradients.md for people."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gradients.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(lines)
    rows = [f"| {line['name']} | {line['times_sgd']} | {line['beside']} | {line['times_beside']} |" for line in lines]
    text = (
        "# A step of each optimizer\n\n"
        "Parameters of a ResNet-20 (65 tensors, 272186 numbers), float32, one thread. Medians of the processor time\n"
        "of interleaved steps, as ratios to a step of `torch.optim.SGD` with momentum and to one of the counterpart.\n"
        "Written by `python -m tests.benchmarks.gradients --out reports/benchmarks`, with `pytorch_optimizer`.\n\n"
        "| optimizer | times torch SGD | counterpart | times counterpart |\n| --- | ---: | --- | ---: |\n"
    )
    (folder / "gradients.md").write_text(text + "\n".join(rows) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for gradients.csv and gradients.md")
    parser.add_argument("--names", nargs="*", help="only these rows")
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    counterparts = peers()
    lines = []
    for name in arguments.names or zoo:
        lines.append(measure(name, counterparts.get(name, ("", None)), arguments.rounds))
        print("  ".join(f"{lines[-1][field]!s:<28}" for field in FIELDS).rstrip(), flush=True)
    if arguments.out:
        write(lines, arguments.out)


if __name__ == "__main__":
    main()
