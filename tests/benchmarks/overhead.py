"""What attaching costs, as ratios of interleaved steps: `python -m tests.benchmarks.overhead [--steps N]`."""

import argparse
import gc
import statistics
import time
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

import normscope as ns
from normscope.probes import hooks

EXACT = ("moments",)
NEVER = 10**9
WARMUP = 5
DENSE = 8  # samples that all keep full arrays, before the schedule thins them out: not what a run costs in the long run


class Block(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.relu2 = nn.ReLU(inplace=True)
        self.stride = stride

    def forward(self, x):
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        short = x if self.stride == 1 else F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return self.relu2(y + short)


def resnet20():
    layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    widths = [(16, 16)] * 3 + [(16, 32)] + [(32, 32)] * 2 + [(32, 64)] + [(64, 64)] * 2
    layers += [Block(a, b, 1 if a == b else 2) for a, b in widths]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return model, (torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,)))


def transformer():
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(128, 256), encoder, nn.LayerNorm(256), nn.Linear(256, 128), nn.Flatten(0, 1))
    return model, (torch.randint(0, 128, (8, 128)), torch.randint(0, 128, (1024,)))


def mlp():
    sizes = [784, 768, 512, 256]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(256, 10)), (torch.randn(256, 784), torch.randint(0, 10, (256,)))


MODELS = {"mlp": mlp, "transformer": transformer, "resnet20": resnet20}
# setting -> (every, probes), limit per model
SETTINGS = {
    "attached, not sampling": ((NEVER, None), {"mlp": 1.01, "transformer": 1.01, "resnet20": 1.01}),
    "every step, exact statistics": ((1, EXACT), {"mlp": 1.10, "transformer": 1.06, "resnet20": 1.10}),
    "every 10 steps, second moments": ((10, ("covariance",)), {"mlp": 1.05, "transformer": 1.05, "resnet20": 1.05}),
    "every 10 steps, all probes": ((10, None), {"mlp": 1.02, "transformer": 1.02, "resnet20": 1.02}),
}


class Bench:
    """One model and optimizer; each step runs attached or not, so that both see the same memory and caches."""

    def __init__(self, build):
        torch.manual_seed(0)
        self.model, (self.x, self.y) = build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def step(self):
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        return time.perf_counter() - start


def ratio(build, settings, steps):
    """Return time of an attached step over that of its plain neighbour, medians over pairs, in the long run.

    The hooks come off before each plain step and on again after it, outside the clock. Where few steps are sampled the
    run is longer, until a quarter as many sampled steps have been seen beyond the first ones, which keep everything.
    """
    bench = Bench(build)
    every, probes = settings
    scope = ns.attach(bench.model, bench.optimizer, every=every, probes=probes)
    session = scope._session
    on = scope._hooks
    pairs = {"sampled": [], "idle": []}
    gc.disable()
    modules = [(name, m) for name, m in bench.model.named_modules()]
    on.remove()
    sampled = max(steps // 4, 3) + DENSE if every < NEVER else 0
    for i in range(max(steps + WARMUP, sampled * every if sampled else 0)):
        order = (False, True) if i % 2 else (True, False)  # whoever comes second finds warmer caches
        if not session.active and len(pairs["idle"]) >= steps:
            order = (True,)  # a step on the way to the next sampled one
        for attached in order:
            if attached:
                on = hooks.Hooks(session, bench.model, modules, [bench.optimizer])
                kind = "sampled" if session.active else "idle"
                watched = bench.step()
                on.remove()
            else:
                plain = bench.step()
        if i >= WARMUP and len(order) == 2:  # the first sampled step learns the structure
            pairs[kind].append(watched / plain)
    gc.enable()
    on.remove()
    scope.close()
    late = {"sampled": pairs["sampled"][DENSE if every > 1 else 0 :], "idle": pairs["idle"]}
    median = {kind: statistics.median(values) if values else 1.0 for kind, values in late.items()}
    share = 1 / every if every < NEVER else 0.0
    return share * median["sampled"] + (1 - share) * median["idle"]


def null(build, steps):
    """Return the ratio of two plain steps: what noise alone makes of it."""
    bench = Bench(build)
    pairs = [(bench.step(), bench.step()) for _ in range(steps + WARMUP)]
    return statistics.median(second / first for first, second in pairs[WARMUP:])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'setting':32s} {'model':12s} ratio  limit   (1 thread, {arguments.steps} interleaved steps, medians)")
    for name in arguments.models:
        print(f"{'plain against plain':32s} {name:12s} {null(MODELS[name], arguments.steps):.3f}", flush=True)
    for setting, (settings, limits) in SETTINGS.items():
        for name in arguments.models:
            found = ratio(MODELS[name], settings, arguments.steps)
            verdict = "ok" if found <= limits[name] else "OVER"
            print(f"{setting:32s} {name:12s} {found:.3f}  {limits[name]:.2f}  {verdict}", flush=True)


if __name__ == "__main__":
    main()
