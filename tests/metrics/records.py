"""Synthetic records of small networks that follow the data contract; a test changes what it is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from normscope.core.record import Record
from normscope.core.store import Store

Stats = dict[str, float]
Edit = Callable[[str, str, int, Stats], object]
CHANNELS = 16
EXTREMES = ("min", "q50", "max")
ACTIVATION = {"ReLU": "relu", "Tanh": "bounded", "Sigmoid": "bounded"}


def spread(**stats: float) -> Stats:
    """Statistics with equal extremes over channels."""
    wide = dict(stats)
    for name, value in stats.items():
        wide |= {f"{name}.{suffix}": value for suffix in EXTREMES}
    return wide


def output(rms: float = 1.0, **others: float) -> Stats:
    """What an output records: Gaussian, nothing dead."""
    stats = spread(mean=0.0, var=rms**2, rms=rms, max=3 * rms, zeros=0.0, kurtosis=3.0)
    return stats | {"count": 64.0, "nonfinite": 0.0, "dead": 0.0} | others


def running(step: int, **others: float) -> Stats:
    """What a layer with running statistics records in training mode, updated once a step."""
    stats = spread(mean=0.0, var=1.0, drift=1 / 64)
    counts = {
        "updates": step + 1.0,
        "calls": 1.0,
        "recomputed": 0.0,
        "silent": 0.0,
        "training": 1.0,
        "change": 0.01 if step else np.nan,
    }
    return stats | counts | others


class Network:
    """A plain network of weighted layers, each with its norm and activation, then a head, as a record.

    Args:
        layers: number of blocks.
        steps: the sampled steps.
        norm: "batch", "layer", or None for no norm.
        activation: class of the activation, None for one that is no module.
        run: name of the run.
        momentum: of the batch normalization layers.
    """

    def __init__(
        self,
        layers: int = 6,
        steps: Sequence[int] = range(0, 100, 10),
        *,
        norm: str | None = "batch",
        activation: str | None = "ReLU",
        run: str = "a",
        momentum: float | None = 0.1,
    ) -> None:
        self.layers, self.steps, self.norm, self.activation = layers, list(steps), norm, activation
        self.momentum, self.name = momentum, run
        self.facts: dict[str, object] = {"norms": layers if norm else 0, "every": 10, "problem": False}
        self.edits: list[Edit] = []
        self.arrays: dict[tuple[str, str, str], Callable[[int], np.ndarray]] = {}
        self.contexts: dict[int, dict[str, object]] = {}
        self.extra_sites: dict[str, dict[str, object]] = {}
        self.inputs: dict[str, object] = {}  # attributes of the norms' inputs
        self.extra: dict[tuple[str, str, str], Callable[[int], Stats]] = {}
        self.events: list[tuple[int, str, str, str]] = []
        self.batch = 64

    def edit(self, change: Edit) -> Network:
        """Change statistics before they are written: change(site, role, step, stats)."""
        self.edits.append(change)
        return self

    def blocks(self) -> dict[str, dict[str, object]]:
        """Sites of the outputs in order of execution, with their attributes."""
        sites: dict[str, dict[str, object]] = {}
        for i in range(self.layers):
            before = f"l{i}.linear/output"
            sites[before] = {"class": "Linear", "activation": ""}
            if self.norm:
                kind = {"batch": "BatchNorm1d", "layer": "LayerNorm"}[self.norm]
                parts = {"norm": self.norm, "eps": 1e-5, "has_running": self.norm == "batch"}
                parts["momentum"] = self.momentum if self.norm == "batch" else None
                sites[f"l{i}.norm/output"] = {"class": kind, "activation": "", "predecessor": before, **parts}
                before = f"l{i}.norm/output"
            if self.activation:
                kind = ACTIVATION[self.activation]
                sites[f"l{i}.act/output"] = {"class": self.activation, "activation": kind, "predecessor": before}
        sites["head/output"] = {"class": "Linear", "activation": ""}
        return sites

    def record(self) -> Record:
        """Write the record to memory and read it."""
        store = Store(None, self.name, self.facts)
        sites = self.blocks() | self.extra_sites
        for order, (site, attributes) in enumerate(sites.items()):
            module, _, slot = site.rpartition("/")
            name, _, call = module.partition("#")
            fixed = {"module": name, "call": int(call or 0), "slot": slot, "channels": CHANNELS, "order": order}
            store.site(site, fixed | attributes)
        if self.norm:
            for i in range(self.layers):
                for slot in ("input", "running") if self.norm == "batch" else ("input",):
                    more = self.inputs if slot == "input" else {}
                    store.site(f"l{i}.norm/{slot}", {"module": f"l{i}.norm", "call": 0, "slot": slot, **more})
        for step in range(self.steps[-1] + 1 if self.steps else 0):
            self._context(store, step)
        for step in self.steps:
            self._sample(store, step, [site for site in sites if "shape" not in sites[site]])
        for event in self.events:
            store.event(*event)
        store.commit()
        record = store.record()
        store.close()
        return record

    def _context(self, store: Store, step: int) -> None:
        row: dict[str, object] = {"step": step, "sampled": step in self.steps, "batch_size": self.batch, "loss": 1.0}
        row |= {"loss_scale": None, "grad_norm": 1.0, "skipped": False}
        store.step(row | self.contexts.get(step, {}))
        if step in self.steps:
            for group in (0, 1):
                settings = {"optimizer": "SGD", "group": group, "lr": 0.1, "momentum": 0.9, "decay": 0.0}
                store.group({"step": step, **settings})

    def _sample(self, store: Store, step: int, outputs: list[str]) -> None:
        rows: dict[tuple[str, str, str], Stats] = {}
        for site in outputs:
            rows[site, "train", "value"], rows[site, "train", "gradient"] = output(), output(1e-3)
            if site.endswith(".act/output") and self.activation != "ReLU":
                rows[site, "train", "value"] |= spread(saturated=0.1)
        for i in range(self.layers if self.norm else 0):
            stats = spread(mean=0.0, var=1.0, eps_weight=1e-5) | {"count": 64.0, "batch": float(self.batch)}
            rows[f"l{i}.norm/input", "train", "value"] = stats
            if self.norm == "batch":
                rows[f"l{i}.norm/running", "train", "value"] = running(step)
        rows |= {key: make(step) for key, make in self.extra.items()}
        for (site, phase, role), stats in rows.items():
            for change in self.edits:
                change(site, role, step, stats)
            if stats:
                store.scalars(step, site, phase, role, tuple(stats), np.array(list(stats.values()), np.float32))
        for (site, role, stat), make in self.arrays.items():
            store.array(step, site, "train", role, stat, np.asarray(make(step), np.float32))


def depth_of(site: str, layers: int) -> int:
    """Index of the block of a site, the number of blocks for the head."""
    return layers if site.startswith("head") else int(site.partition(".")[0][1:])


def scale(stats: Stats, factor: float) -> None:
    """Multiply the magnitudes of an output by a factor."""
    for name in ("rms", "max", *(f"{stat}.{s}" for stat in ("rms", "max") for s in EXTREMES)):
        stats[name] *= factor
    for name in ("var", *(f"var.{s}" for s in EXTREMES)):
        stats[name] *= factor**2


def over_depth(layers: int, rate: float, role: str) -> Edit:
    """An edit that multiplies the outputs, or gradients, by `rate` per block in order of execution."""

    def change(site: str, kind: str, step: int, stats: Stats) -> None:
        if site.endswith("/output") and kind == role and "rms" in stats:
            scale(stats, rate ** depth_of(site, layers))

    return change


def at(site: str, role: str = "value", steps: Sequence[int] | None = None, **values: float) -> Edit:
    """An edit that sets statistics of the sites that end in `site`, at some steps or at all."""

    def change(name: str, kind: str, step: int, stats: Stats) -> None:
        if name.endswith(site) and kind == role and (steps is None or step in steps):
            stats |= values

    return change
