"""Synthetic records and findings that follow the data contract, for the tests of figures and report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from normscope.core.finding import Finding, Verdict
from normscope.core.record import Record
from normscope.core.store import Store

EXTREMES = {"min": 0.3, "q50": 0.9, "max": 2.5}
HOSTILE = ("<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "a|b`c*_d_&amp;$e$%{y}")


def spread(**stats: float) -> dict[str, float]:
    """A statistic with its extremes over channels."""
    wide = dict(stats)
    for name, value in stats.items():
        wide |= {f"{name}.{suffix}": value * factor for suffix, factor in EXTREMES.items()}
    return wide


def names_of(layers: int) -> list[tuple[str, str]]:
    """Module paths and classes of a residual network with so many leaves."""
    parts = (("conv1", "Conv2d"), ("bn1", "BatchNorm2d"), ("relu1", "ReLU"))
    names = [("stem.conv", "Conv2d"), ("stem.bn", "BatchNorm2d"), ("stem.relu", "ReLU")]
    for block in range(-(-layers // 3)):
        names += [(f"layer{1 + block // 6}.{block % 6}.{part}", kind) for part, kind in parts]
    return [*names[: layers - 1], ("head", "Linear")]


class Run:
    """Writes one synthetic run: a diverging one with a loss scale, dead units and stale running statistics."""

    def __init__(
        self, layers: int = 12, steps: int = 60, every: int = 10, *, run: str = "resnet", path: Path | None = None
    ):
        self.random = np.random.default_rng(0)
        self.modules = names_of(layers)
        self.steps, self.every, self.layers, self.channels = steps, every, layers, 32
        self.store = Store(
            path,
            run,
            {
                "versions": {"normscope": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
                "seed": 0,
                "device": "cpu",
                "revision": "4f2a9c1",
                "command": "train.py --lr 0.4",
                "every": every,
                "reduction": "mean",
                "parameters": 272474,
                "problem": True,
                "model": "ResNet",
                "norms": sum(kind == "BatchNorm2d" for _, kind in self.modules),
                "created": 1760000000.0,
            },
        )

    def rename(self, *names: str) -> Run:
        """Give the first layers names of one's own."""
        self.modules[: len(names)] = [(name, kind) for name, (_, kind) in zip(names, self.modules, strict=False)]
        return self

    def record(self) -> Record:
        """Write everything and read it back."""
        self._sites()
        walk = np.cumsum(self.random.normal(0, 0.03, (self.steps, self.layers)), axis=0)
        depth = np.linspace(0, 1, self.layers)
        for i in range(self.steps):
            self._step(i)
            time = i / max(1, self.steps - 1)
            growth = np.exp(walk[i] + 3.0 * depth * max(0.0, time - 0.5) * 4)
            for k, (module, kind) in enumerate(self.modules):
                self._layer(i, time, module, kind, float(growth[k]), float(depth[k]))
            if i % 6 == 0 or i == self.steps - 1:
                self._held(i, time)
            if i % 50 == 0:
                self.store.commit()
        self.store.event(0, "unmeasured", "head", "an integer output is not measured")
        self.store.event(30, "note", "", "the loss scale was halved")
        self.store.commit()
        return self.store.record()

    def _scalars(self, step: int, site: str, phase: str, role: str, values: dict[str, float]) -> None:
        self.store.scalars(step, site, phase, role, tuple(values), np.array(list(values.values())))

    def _sites(self) -> None:
        before = ""
        for order, (module, kind) in enumerate(self.modules):
            batch = kind == "BatchNorm2d"
            norm = {"norm": "batch", "eps": 1e-5, "momentum": 0.1, "has_running": True, "groups": None} if batch else {}
            shape = [128, 10] if kind == "Linear" else [128, self.channels, 32 >> (2 * order // self.layers), 32]
            shared = {"module": module, "call": 0, "class": kind, "order": order, "dtype": "float32"}
            common = {**shared, "shape": shape, "axis": 1, "channels": shape[1], **norm}
            relu = {"activation": "relu" if kind == "ReLU" else "", "predecessor": before, "note": ""}
            self.store.site(f"{module}/output", {**common, "slot": "output", **relu})
            for slot in ("input", "running") if batch else ():
                self.store.site(f"{module}/{slot}", {**common, "slot": slot})
            if kind != "ReLU":
                sizes = {"Conv2d": [self.channels, self.channels, 3, 3], "Linear": [10, 64]}.get(kind, [self.channels])
                site = {"module": module, "call": 0, "slot": "weight", "shape": sizes, "trainable": True, "group": 0}
                rule = {"class": "Parameter", "optimizer": "SGD", "rule": "sgd", "decoupled": False, "nesterov": False}
                self.store.site(f"{module}/weight", site | rule)
            before = f"{module}/output"
        self.store.site("/output", {"module": "", "call": 0, "slot": "output", "class": "ResNet", "order": self.layers})
        self.store.site(
            "/input", {"module": "", "call": 0, "slot": "input", "class": "model", "order": self.layers + 1}
        )

    def _step(self, i: int) -> None:
        last = self.steps * self.every
        for step in range(i * self.every, (i + 1) * self.every if i < self.steps - 1 else i * self.every + 1):
            time = step / last
            diverged = time > 0.93
            skipped = step in (1, 2, 4) or (time > 0.9 and step % 7 == 0)
            loss = (
                float("inf")
                if diverged
                else 2.3 * np.exp(-3 * time) + 4 * max(0.0, time - 0.6) + 0.02 * self.random.random()
            )
            norm = (
                float("inf")
                if skipped or diverged
                else 0.8 + self.random.random() * 0.2 + 40 * max(0.0, time - 0.5) ** 2
            )
            row = {"step": step, "sampled": step % self.every == 0, "batch_size": 128, "loss_scale": 65536.0}
            self.store.step({**row, "loss": loss, "grad_norm": norm, "skipped": skipped})
        rate = 0.4 * min(1.0, i / 8) * (0.5 + 0.5 * np.cos(np.pi * i / self.steps))
        for group in range(2):
            row = {"step": i * self.every, "optimizer": "SGD", "group": group, "lr": rate, "momentum": 0.9}
            self.store.group({**row, "decay": 5e-4 * (1 - group)})

    def _layer(self, i: int, time: float, module: str, kind: str, growth: float, depth: float) -> None:
        step = i * self.every
        broken = time > 0.95 and depth > 0.6
        size = float("nan") if broken else growth * (0.6 if kind == "ReLU" else 1.0)
        relu = kind == "ReLU"
        dead = min(0.6, max(0.0, 0.9 * depth - 0.4) * time * 1.4) if relu else 0.0
        stats = spread(mean=0.4 * size if relu else 0.02 * np.sin(9 * depth + 5 * time) * size, var=size**2, rms=size)
        tails = spread(max=size * 6, zeros=0.5 * relu, kurtosis=3 + 4 * depth)
        self._scalars(
            step,
            f"{module}/output",
            "train",
            "value",
            {"count": 131072.0, **stats, "nonfinite": 32.0 * broken, "dead": dead},
        )
        self._scalars(step, f"{module}/output", "train", "value", {**tails, "sample_n": 256.0})
        gradient = float("nan") if broken else 1e-4 * np.exp(-3.5 * (1 - depth)) * (1 + time)
        both = spread(mean=gradient / 50, var=gradient**2, rms=gradient, max=7 * gradient)
        self._scalars(
            step, f"{module}/output", "train", "gradient", {"count": 131072.0, **both, "nonfinite": 0.0, "dead": 0.0}
        )
        if kind == "BatchNorm2d":
            self._norm(step, i, time, module, size, depth)
        if not relu:
            gain = spread(value=1 - 0.5 * time) if kind == "BatchNorm2d" else {}
            turned = {"norm": 0.01, "relative": 0.01 / (8 - time), "radial": -1e-6, "angle": 0.01 / (8 - time)}
            cosine = {"cosine": (1e-7 if kind == "Conv2d" else 0.02) * (-1) ** i}
            self._scalars(step, f"{module}/weight", "train", "value", {**gain, "norm": 8 - time, "rms": 0.05})
            self._scalars(step, f"{module}/weight", "train", "gradient", {"norm": 0.1 + time, "rms": 1e-3, **cosine})
            self._scalars(step, f"{module}/weight", "train", "update", turned)
        if i % 10 == 0 or i == self.steps - 1:
            channels = np.exp(self.random.normal(0, 0.3, self.channels))
            channels[[3, 17]] *= 40
            self.store.array(step, f"{module}/output", "train", "value", "rms", channels * growth)

    def _norm(self, step: int, i: int, time: float, module: str, size: float, depth: float) -> None:
        seen = size**2 * 1.4
        kept = float(np.exp(-2 * time)) * (1 + depth)
        share = 1e-5 / (1e-5 + 1e-5 * np.exp(3 - 6 * time))
        self._scalars(
            step,
            f"{module}/input",
            "train",
            "value",
            {**spread(mean=0.1, var=seen, eps_weight=share), "count": 32768.0, "batch": 128.0},
        )
        running = spread(mean=0.1, var=kept, drift=2e-4 * np.exp(6 * time * depth) * (1 + 0.2 * self.random.random()))
        counts = {
            "updates": 2.0 * step,
            "calls": 1.0,
            "recomputed": 1.0,
            "silent": 0.0,
            "training": 1.0,
            "change": 0.01 if i else np.nan,
        }
        self._scalars(step, f"{module}/running", "train", "value", {**running, **counts})
        if i % 10 == 0 or i == self.steps - 1:
            tiny = np.sort(np.exp(self.random.normal(-9, 3, self.channels)))[::-1]
            self.store.array(step, f"{module}/running", "train", "value", "var", tiny)
            self.store.array(
                step,
                f"{module}/input",
                "train",
                "value",
                "var",
                tiny * np.exp(self.random.normal(0, 0.5, self.channels)),
            )

    def _held(self, i: int, time: float) -> None:
        step = i * self.every
        loss = 2.3 * np.exp(-3 * time)
        self._scalars(step, "/output", "batch", "value", {"loss": loss, "n": 512.0})
        self._scalars(
            step, "/output", "population", "value", {"loss": loss * (1 + 3 * time**2), "gap": 0.8 * time, "n": 512.0}
        )
        ratio = {"ratio": 0.8 + 0.1 * (i % 5) if i else np.nan, "seen": 128.0}
        self._scalars(step, "/input", "train", "value", ratio)
        signal = {"signal": 0.5 * np.exp(-4 * time), "signal_error": 0.02 * np.exp(-4 * time), "chunk": 32.0}
        self._scalars(
            step, "/output", "noise", "gradient", {**signal, "square": 3 * np.exp(-2 * time), "square_error": 0.1}
        )
        for module, kind in self.modules:
            if kind == "BatchNorm2d":
                moved = {"snd": 9.0, "snd_error": 0.2, "relative": 0.05 * (1 + time), "batch": 128.0}
                noise = {**spread(mean_noise=0.03, var_noise=0.07), **moved}
                self._scalars(step, f"{module}/output", "noise", "value", noise)
                for phase, factor in (("batch", 1.0), ("population", 1 + time)):
                    self._scalars(step, f"{module}/output", phase, "value", spread(mean=0.0, var=factor**2, rms=factor))


def findings_of(record: Record) -> list[Finding]:
    """Return findings of every verdict about a record, as diagnostics would."""
    run = record.names[0]
    outputs = [site for site in record.sites["site"] if site.endswith("/output") and site != "/output"]
    running = [site for site in record.sites["site"] if site.endswith("/running")]
    relus = [site for site in outputs if "relu" in site] or outputs
    deep, last = relus[::-1][:6], int(record.steps[-1])
    middle = int(record.steps[len(record.steps) // 2])
    rows: list[
        tuple[str, Verdict, tuple[str, ...], int | None, str, dict[str, object], float | None, str, str, str, str]
    ] = [
        (
            "propagation.non-finite",
            Verdict.FAILURE,
            (outputs[-3], *outputs[-2:]),
            last,
            "NaN or infinity appears in {site} at step {step}, in 32 of 32 channels.",
            {"channels": 32, "first_step": last, "largest_before": 81234.5},
            0,
            "identity: every value is finite",
            "The activations grew for the last third of the run and overflowed; what follows is lost.",
            "Lower the learning rate or lengthen the warmup; clip the gradient norm to 1.",
            "wortsman2023",
        ),
        (
            "mismatch.updated-twice",
            Verdict.FAILURE,
            tuple(running),
            0,
            "{site} updates its running statistics twice a step, as do all normalization layers.",
            {"updates_per_step": 2.0, "recomputed": 1.0},
            1,
            "identity: one training forward, one update",
            "Activation checkpointing runs the forward pass again during backward.",
            "Exclude normalization layers from the checkpointed segments, or set momentum to 1 - sqrt(1 - momentum).",
            "chen2016",
        ),
        (
            "propagation.signal-exploding",
            Verdict.WARNING,
            (outputs[-2],),
            middle,
            "The signal grows 380-fold from the first to the last layer, to an rms of 212 in {site}.",
            {"ratio": 380.2, "rms_first": 0.56, "rms_last": 212.4, "growth_per_layer": 1.105},
            100,
            "measured: healthy runs of the workbench stay below 30",
            "Each layer multiplies the variance; the residual branches are not scaled down.",
            "Normalize the residual branches, or start them at zero (the gain of each block's last norm).",
            "he2015delving",
        ),
        (
            "propagation.dead-units",
            Verdict.WARNING,
            tuple(deep),
            last,
            "56 % of the channels of {site} are exactly 0 for every sample; 5 more layers are above 10 %.",
            {"dead_fraction": 0.56, "layers": 6},
            0.1,
            "lu2019",
            "A large step moved the biases so far down that no input passes the ReLU.",
            "Lower the learning rate, or use a leaky activation; dead channels can be removed.",
            "lu2019",
        ),
        (
            "mismatch.running-statistics",
            Verdict.WARNING,
            tuple(running[::-1]),
            last,
            "The running statistics of {site} are 0.08 nats from those of the batch, 190 times the noise.",
            {"drift": 0.081, "expected": 0.00042, "channels_above": [3, 7, 9, 17]},
            0.01,
            "measured: noise of 128 samples",
            "The statistics move faster than the running average follows.",
            "Recompute them over a few hundred training batches before the model is used.",
            "wu2021",
        ),
        (
            "mismatch.train-eval-gap",
            Verdict.WARNING,
            ("/output",),
            last,
            "With running statistics the loss on the held batches is 0.46, with batch statistics 0.11.",
            {"gap": 0.79, "loss_batch": 0.114, "loss_population": 0.458},
            0.2,
            "summers2020",
            "The running statistics lag behind the weights.",
            "Recompute the running statistics, or average them over more batches.",
            "summers2020",
        ),
        (
            "run.skipped-steps",
            Verdict.WARNING,
            (),
            4,
            "Steps were skipped because the gradient was not finite: 3 at the start, 9 near the end.",
            {"skipped": 12, "fraction": 0.02},
            0.01,
            "micikevicius2018",
            "The loss scale was too large for the gradient.",
            "Expected while the scale settles; near the end it is the divergence above.",
            "micikevicius2018",
        ),
        (
            "propagation.gradient-vanishing",
            Verdict.WARNING,
            (outputs[0],),
            middle,
            "The gradient shrinks 33-fold on its way to {site}.",
            {"ratio": 33.1},
            30,
            "glorot2010",
            "Each layer shrinks it by 6 %.",
            "Add skip connections or normalization.",
            "schoenholz2017",
        ),
        (
            "propagation.outlier-channels",
            Verdict.NOTE,
            (outputs[1],),
            last,
            "Channels 3 and 17 of {site} are 40 times the median.",
            {"ratio": 40.3, "channels": [3, 17]},
            20,
            "dettmers2022",
            "Normal in large models.",
            "Keep these channels in higher precision if you quantize.",
            "dettmers2022",
        ),
        (
            "propagation.eps-dominates",
            Verdict.NOTE,
            (running[0].replace("/running", "/input"),),
            last,
            "eps is half of the denominator of {site}.",
            {"eps_weight": 0.62},
            0.5,
            "identity: eps as large as the variance",
            "The input of the layer is tiny.",
            "Scale it up, or lower eps.",
            "ioffe2015",
        ),
        (
            "mismatch.tiny-variance",
            Verdict.NOTE,
            (running[1],),
            last,
            "A third of the channels of {site} have a running variance below eps.",
            {"channels": 11},
            1,
            "",
            "",
            "Remove these channels.",
            "ioffe2015",
        ),
        (
            "mismatch.momentum",
            Verdict.UNDECIDED,
            (running[0],),
            None,
            "The run is too short to judge momentum 0.1 in {site}.",
            {"steps": 60},
            1000,
            "",
            "",
            "Record at least 1000 steps.",
            "",
        ),
        (
            "curvature.sharpness",
            Verdict.UNDECIDED,
            (),
            None,
            "Sharpness needs loss and data.",
            {},
            None,
            "",
            "",
            "Pass problem= to attach.",
            "",
        ),
        (
            "propagation.saturated-units",
            Verdict.OK,
            (),
            None,
            "No bounded activation is saturated.",
            {},
            None,
            "",
            "",
            "",
            "",
        ),
        (
            "propagation.gradient-exploding",
            Verdict.OK,
            (),
            None,
            "The gradient does not grow on its way back.",
            {"ratio": 0.03},
            100,
            "",
            "",
            "",
            "",
        ),
        (
            "mismatch.never-updated",
            Verdict.OK,
            (),
            None,
            "All running statistics are updated.",
            {},
            None,
            "",
            "",
            "",
            "",
        ),
        (
            "mismatch.evaluation-mode",
            Verdict.OK,
            (),
            None,
            "All normalization layers train in training mode.",
            {},
            None,
            "",
            "",
            "",
            "",
        ),
    ]
    return [
        Finding(
            id=name,
            verdict=verdict,
            message=message.format(site=sites[0] if sites else "", step=step),
            run=run,
            site=sites[0] if sites else "",
            step=step,
            cause=cause,
            evidence=evidence,
            threshold=threshold,  # type: ignore[arg-type]
            threshold_source=origin,
            remedy=remedy,
            source=source,
            sites=sites,
        )
        for name, verdict, sites, step, message, evidence, threshold, origin, cause, remedy, source in rows
    ]
