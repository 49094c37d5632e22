"""What watching a run costs, beside what people use: `python -m tests.benchmarks.peers [--out reports/benchmarks]`.

Each way of watching has a model of its own of the same size, and steps by turns with one that nobody watches, in a new
order each round. Processor time of the step, so that other programs do not count; medians of sampled steps and of the
others, weighted by how often each comes.
"""

import argparse
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

import normscope as ns
from tests.benchmarks.overhead import MODELS, Bench

EVERY = 10
WARMUP = 12  # steps; normscope keeps full arrays of its first samples, so they are passed over


class Watched(Bench):
    """A model that something watches; `begin` puts it on, `after` is called after each step.

    Steps whose index leaves `phase` when divided by `EVERY` are the sampled ones.
    """

    phase = 0

    def begin(self, folder):
        del folder

    def after(self, step):
        del step

    def timed(self, step, samples=None):
        """Return the time of a step, of a few samples where it only leads to the next."""
        x, y = self.x[:samples], self.y[: None if samples is None else samples * len(self.y) // len(self.x)]
        start = time.process_time()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.after(step)
        return time.process_time() - start


class Hooks(Watched):
    """Mean, standard deviation and largest value of each output and of its gradient, fetched one by one."""

    def begin(self, folder):
        self.now, self.seen = 0, []
        for module in self.model.modules():
            if not any(module.children()):
                module.register_forward_hook(self.forward)

    def told(self, x):
        self.seen.append((x.mean().item(), x.std().item(), x.abs().max().item()))

    def forward(self, module, args, output):
        if self.now % EVERY == 0 and output.is_floating_point():
            self.told(output.detach())
            if output.requires_grad:
                output.register_hook(self.told)

    def after(self, step):
        self.now = step + 1
        if step % EVERY == 0:
            for p in self.model.parameters():
                self.told(p.detach())
                self.told(p.grad)


class TensorBoard(Watched):
    """Histograms of all weights and gradients."""

    def begin(self, folder):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder)

    def after(self, step):
        if step % EVERY == 0:
            for name, p in self.model.named_parameters():
                self.writer.add_histogram(name, p, step)
                self.writer.add_histogram(f"{name}.grad", p.grad, step)


class Wandb(Watched):
    """`wandb.watch` of weights and gradients, offline."""

    phase = EVERY - 1  # it counts from one

    def begin(self, folder):
        import wandb

        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": folder}
        self.run = wandb.init(project="overhead", dir=folder, settings=wandb.Settings(console="off"))
        wandb.watch(self.model, log="all", log_freq=EVERY)

    def after(self, step):
        self.run.log({"step": step}, step=step)


class Normscope(Watched):
    """normscope as `attach` comes: all probes, written to disk."""

    probes = None

    def begin(self, folder):
        self.scope = ns.attach(self.model, self.optimizer, run=f"{folder}/run", every=EVERY, probes=self.probes)


class Recorder(Normscope):
    """The flight recorder alone: every step of each tensor."""

    probes = ("flight",)


WAYS = {
    "normscope": Normscope,
    "flight recorder alone": Recorder,
    "hooks by hand": Hooks,
    "TensorBoard histograms": TensorBoard,
    "wandb.watch": Wandb,
}


def measure(name, way, rounds, folder):
    """Return rows of one way on one model: ratios of sampled steps and of the others."""
    plain, watched = Watched(MODELS[name]), way(MODELS[name])
    watched.begin(folder)
    pairs = {True: [], False: []}
    for step in tqdm(range(WARMUP * EVERY + rounds * EVERY), desc=f"{name}, {way.__name__}", leave=False, disable=None):
        sampled = step % EVERY == watched.phase
        if step < WARMUP * EVERY or (not sampled and len(pairs[False]) >= rounds * 2):
            watched.timed(step, samples=2)
            continue
        times = {}
        for which in random.sample((plain, watched), 2):
            times[which] = which.timed(step)
        pairs[sampled].append(times[watched] / times[plain])
    sampled, others = (statistics.median(pairs[kind]) for kind in (True, False))
    whole = sampled / EVERY + others * (1 - 1 / EVERY)
    return {"sampled step": sampled, "other step": others, "amortized": whole, "steps": len(pairs[True])}


def draw(table, path):
    """Draw the amortized ratios as bars, a group a model."""
    from matplotlib.figure import Figure

    wide = table.pivot(index="way", columns="model", values="amortized").loc[list(WAYS), list(MODELS)]
    canvas = Figure(figsize=(6.4, 3.2), layout="constrained")
    ax = canvas.subplots()
    for i, model in enumerate(wide):
        places = [row + (i - 1) * 0.26 for row in range(len(wide))]
        bars = ax.barh(places, wide[model] - 1, 0.24, left=1, label=model, color=("#0b6fb8", "#d1730d", "#4d8f2f")[i])
        ax.bar_label(bars, [f"{value:.3f}" for value in wide[model]], fontsize=7, padding=2)
    ax.set_yticks(range(len(wide)), wide.index)
    ax.invert_yaxis()
    ax.axvline(1, color="#4a4e55", linewidth=0.8)
    ax.set_xlabel("time of a step over that of an unwatched one")
    ax.margins(x=0.12)
    ax.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    canvas.savefig(path, dpi=200)


ABOUT = """# What watching a run costs

`python -m tests.benchmarks.peers --rounds {rounds} --out reports/benchmarks`: processor time of a training step
over that of the same step of a model that nobody watches, interleaved, one thread, CPU, torch {torch}; medians of
{rounds} sampled steps and {others} others, sampled every {every} steps, after the first ones of which normscope
keeps everything. wandb.watch and TensorBoard keep histograms of weights and gradients; hooks by hand keep three
numbers of each output, gradient and weight; normscope keeps all it has without held batches. Processor time counts
all threads of the process; what wandb does in its own process is not counted.

Steps that nothing had to do with, as those of TensorBoard between its histograms, came out between 0.98 and 1.02 on the
machine that these figures come from: smaller differences mean nothing. Where the time goes: [parts.md](parts.md).

![Cost of a step](overhead.png)

"""


def write(table, rounds, out):
    """Write the table, the picture and what they mean."""
    table.to_csv(out / "overhead.csv", index=False)
    draw(table, out / "overhead.png")
    lines = ["| model | way | sampled step | other step | amortized |", "|---|---|---|---|---|"]
    lines += [
        f"| {r.model} | {r.way} | {r.sampled:.2f} | {r.other:.3f} | {r.amortized:.3f} |"
        for r in table.rename(columns={"sampled step": "sampled", "other step": "other"}).itertuples()
    ]
    text = ABOUT.format(rounds=rounds, others=2 * rounds, every=EVERY, torch=torch.__version__)
    (out / "overhead.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="sampled steps")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, help="folder for overhead.csv, overhead.md and overhead.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("normscope").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows = []
    for name in arguments.models:
        for way in arguments.ways:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                try:
                    rows.append({"model": name, "way": way} | measure(name, WAYS[way], arguments.rounds, folder))
                except ImportError as error:
                    print(f"{way} left out: {error}")
                    continue
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    if arguments.out:
        write(pd.DataFrame(rows), arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
