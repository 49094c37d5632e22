"""Gap: which norm costs how much at inference, and which statistics give it back."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from normscope.core.errors import ArgumentError, brief
from normscope.core.finding import Finding
from normscope.diagnostics.gap import judge
from normscope.figures.draw import draw_ranking
from normscope.linalg.problem import Forward, checked_batches, drops, forward_pair
from normscope.linalg.protect import undisturbed
from normscope.metrics import gap as metrics
from normscope.metrics.gap import Measured, Measurements
from normscope.norms.recalibration import measured_statistics, recalibrate, stores
from normscope.norms.recognize import find_norms, recognize
from normscope.probes.layout import tensors
from normscope.probes.normalization import drift
from normscope.report.gap import document, plain, write
from normscope.scope.watch import unwrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BATCHES = 32
GROUPS = 8  # parts that batches are put into where the metric is one number
_INITIAL = {"running_mean": 0.0, "running_var": 1.0}

Metric = Callable[[nn.Module, Sequence[Any]], Any]


@dataclass(frozen=True, repr=False, eq=False)
class Gap:
    """What the statistics of norms cost at inference: two tables and what follows from them.

    Attributes:
        table: the metric with each kind of statistics, see `normscope.metrics.gap.table`.
        norms: the norms, that which costs most first, see `normscope.metrics.gap.ranking`.
        findings: verdicts with remedies, worst first.
        measured: what all of it follows from.
    """

    table: pd.DataFrame
    norms: pd.DataFrame
    findings: tuple[Finding, ...]
    measured: Measurements

    def report(self, path: str | Path) -> Path:
        """Write a page that explains the result, and beside it tables and findings as JSON.

        Args:
            path: the page, as "gap.html", or a folder for report.html.

        Returns:
            The path of the page. If it cannot be written this is a StoreError.
        """
        return write(self.measured, self.findings, path)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the ranking of the norms with matplotlib.

        Args:
            ax: where to draw; new axes by default.

        Returns:
            The axes.
        """
        return draw_ranking(self.norms, self.measured.metric, ax)

    def __repr__(self) -> str:
        """Write both tables and the findings as text."""
        return plain(self.measured, self.findings)

    def _repr_html_(self) -> str:
        """Return the same for a notebook."""
        return document(self.measured, self.findings, whole=False)


def gap(
    model: nn.Module,
    train_batches: Iterable[Any] | None,
    target_batches: Iterable[Any] | None = None,
    *,
    metric: Metric | None = None,
    forward: Forward | None = None,
    higher_is_better: bool = True,
    max_batches: int | None = MAX_BATCHES,
    max_norms: int | None = None,
    progress: bool | None = None,
) -> Gap:
    """Measure a trained model with running statistics, batch statistics and recalibrated ones, then norm by norm.

    The metric is taken on the target batches, or on the training batches where there are no others, once for each
    kind of statistics and once for each norm that alone is given statistics of these batches. All passes see the same
    batches and the same random numbers, so differences are paired. The model stays bit for bit what it was.

    Args:
        model: the model, as it would be served.
        train_batches: batches of the data that it was trained on; None where you have none.
        target_batches: batches of the data that it serves, with what the metric needs.
        metric: `metric(model, batches)`, which runs the model on a list of batches and returns a number, or one number
            a sample; by default the accuracy of class scores on batches `(input, target)`. It may call `model.eval()`.
        forward: `(model, batch) -> (output, target)` for batches of any other form. With a metric of your own only the
            run counts, not what is returned.
        higher_is_better: False for a loss or an error.
        max_batches: at most so many of either batches are read, and held in memory; None for all.
        max_norms: at most so many norms are switched by themselves, the most divergent first; None for all.
        progress: whether to draw a progress bar on stderr; by default where that is a terminal.

    Returns:
        The result, with `.table`, `.norms`, `.findings`, `.report(path)`, `.plot()`.

    Raises:
        ArgumentError: an argument cannot work, or the model has no norm with running statistics.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model={brief(model)} must be a torch.nn.Module.")
    inner = unwrapped(model)
    bench = _Bench(inner, _switchable(inner), _checked_metric(metric, forward), forward)
    train, target = _checked_data(inner, train_batches, target_batches, max_batches)
    _check_count("max_norms", max_norms)
    quiet = not sys.stderr.isatty() if progress is None else not progress
    name = (
        "accuracy" if metric is None else getattr(metric, "__name__", "metric").strip("<>").replace("lambda", "metric")
    )
    sign = 1.0 if higher_is_better else -1.0
    measured = _measured(bench, train, target, (name, sign), max_norms, quiet)
    return Gap(metrics.table(measured), metrics.ranking(measured), tuple(judge(measured)), measured)


def _measured(
    bench: _Bench,
    train: list[Any],
    target: list[Any],
    metric: tuple[str, float],
    max_norms: int | None,
    quiet: bool,
) -> Measurements:
    """Make all passes."""
    batches = target or train
    training = tuple(path for path, layer in bench.layers.items() if layer.training)
    dropping = sum(module.training and drops(module) for module in bench.model.modules())
    statistics = bench.statistics(batches)
    own = bench.statistics(train) if train and target else {}
    passes = _passes(train, target, given=bool(training or dropping))
    alone = {}
    total = len(passes) + min(len(statistics), max_norms or len(statistics))
    with tqdm(total=total, desc="gap", unit="pass", disable=quiet, leave=False) as bar:
        rows, missing = _rows(bench, batches, passes, bar)
        samples = len(rows[metrics.RUNNING].parts) if bench.over == "samples" else sum(map(_size, batches))
        batch = float(np.median([_size(data) for data in train or target]))
        described = _described(bench.layers, statistics, own, samples, batch)
        order = described.loc[list(statistics)].sort_values("kl", ascending=False, kind="stable").index
        for path in order[:max_norms]:
            bar.set_postfix_str(path)
            alone[path] = bench.run(batches, metrics.RUNNING, switched=(path, statistics[path]))
            bar.update()
    return Measurements(
        model=type(bench.model).__name__,
        metric=metric[0],
        sign=metric[1],
        data="target" if target else "training",
        samples=samples,
        batches=len(batches),
        over=bench.over,
        rows=rows,
        missing=missing,
        alone=alone,
        norms=described,
        training=training,
        dropping=dropping,
        frozen=_frozen(bench.model),
    )


def _rows(
    bench: _Bench, batches: list[Any], passes: Mapping[str, list[Any]], bar: Any
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Measure the rows; return them, and why others could not be measured."""
    rows, missing = {}, {}
    for row, data in passes.items():
        bar.set_postfix_str(row)
        try:
            rows[row] = bench.run(batches, row, data)
        except ValueError as error:  # torch cannot take a variance of one value
            if row == metrics.RUNNING or "more than 1 value per channel" not in str(error):
                raise
            missing[row] = "a batch holds one sample, which has no variance; drop it (drop_last=True)"
        bar.update()
    return rows, missing


def _passes(train: list[Any], target: list[Any], given: bool) -> dict[str, list[Any]]:
    """Return the rows to measure, with the batches that norms are recalibrated on."""
    passes: dict[str, list[Any]] = {metrics.RUNNING: [], metrics.BATCH: []}
    passes |= {metrics.GIVEN: []} if given else {}
    passes |= {metrics.TRAINING: train} if train else {}
    return passes | ({metrics.TARGET: target} if target else {})


class _Bench:
    """A model and a metric; each run starts from the model as it was handed over and leaves it so."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], metric: Metric, forward: Forward | None
    ) -> None:
        self.model, self.layers, self.metric = model, layers, metric
        self.forward = forward or _forward
        self.over = "samples"
        self._count = 0

    def statistics(self, batches: list[Any]) -> dict[str, dict[str, Tensor]]:
        """Measure the statistics of each norm's input while all norms use their stored ones."""
        with undisturbed(self.model):
            return measured_statistics(self.model, batches, self.forward)

    def run(
        self,
        batches: list[Any],
        row: str,
        recalibrated: list[Any] | None = None,
        switched: tuple[str, Mapping[str, Tensor]] | None = None,
    ) -> Measured:
        """Take the metric with all norms on one kind of statistics, or one norm switched to statistics of its own."""
        with undisturbed(self.model):
            if recalibrated:
                recalibrate(self.model, recalibrated, self.forward, progress=False)
            if switched:
                for name, value in switched[1].items():
                    getattr(self.layers[switched[0]], name).copy_(value)
            if row != metrics.GIVEN:
                for module in self.model.modules():
                    module.training = False  # not eval(): an overridden train() may merge weights or freeze layers
                for layer in self.layers.values():
                    layer.forward = _forced(layer, training=row == metrics.BATCH)
            return self._taken(batches)

    def _taken(self, batches: list[Any]) -> Measured:
        """Call the metric; where it gives one number, on groups of batches as well, for the standard error."""
        values = self._called(batches)
        if values.ndim:
            self._count = self._count or len(values)
            if len(values) != self._count:
                raise ArgumentError(
                    f"metric: it returned {self._count} values with one kind of statistics and {len(values)} with "
                    "another; it must return one number for each sample, or a single one."
                )
            return Measured(float(values.mean()), values)
        size = math.ceil(len(batches) / GROUPS)
        groups = [batches[start : start + size] for start in range(0, len(batches), size)]
        self.over = "batches" if size == 1 else f"groups of {size} batches"
        parts = [float(self._called(group)) for group in groups] if len(groups) > 1 else [float(values)]
        return Measured(float(values), np.array(parts))

    def _called(self, batches: list[Any]) -> np.ndarray:
        try:
            return _numbers(self.metric(self.model, batches))
        except (AttributeError, TypeError) as error:
            if "'list'" not in str(error):
                raise
            raise ArgumentError(
                f"metric: it failed with {type(error).__name__}: {error}. It is called with a list of batches, not "
                "with a loader; count the samples inside it, or return one value a sample."
            ) from error


def _numbers(value: Any) -> np.ndarray:
    """Return what a metric gave as float64: 0-d or 1-d."""
    plain = value.detach().cpu() if isinstance(value, Tensor) else value
    if isinstance(plain, (list, tuple)):
        plain = [float(item) if isinstance(item, (Tensor, np.ndarray)) else item for item in plain]
    try:
        numbers = np.empty((0, 0)) if plain is None else np.asarray(plain, dtype=float)
    except (TypeError, ValueError):
        numbers = np.empty((0, 0))
    if numbers.ndim > 1 or (numbers.ndim == 1 and not len(numbers)):
        raise ArgumentError(
            f"metric: it returned {brief(value)}; it must return a number, or one number for each sample, as a list or "
            "a tensor of one dimension."
        )
    return numbers


def _forced(layer: nn.Module, training: bool) -> Callable[..., Any]:
    """Return a forward function that normalizes in one mode, whatever eval() or train() a metric calls."""
    forward = layer.forward

    def forced(*arguments: Any, **named: Any) -> Any:
        layer.training = training
        return forward(*arguments, **named)

    return forced


# ---- arguments -------------------------------------------------------------------------------------------------------


def _switchable(model: nn.Module) -> dict[str, nn.Module]:
    layers = {path: module for path, module in model.named_modules() if stores(module)}
    if not layers:
        kinds = dict.fromkeys(type(module).__name__ for module in model.modules() if recognize(module))
        has = f"only norms that work alike in both modes ({', '.join(kinds)})" if kinds else "no norm at all"
        raise ArgumentError(
            f"model={type(model).__name__} has no norm with running statistics, but {has}: training and inference "
            "differ by no statistics. Look for dropout, preprocessing or precision instead."
        )
    return layers


def _frozen(model: nn.Module) -> dict[str, str]:
    """Return path and class of norms with running statistics that no mode switches, as FrozenBatchNorm2d."""
    inside = {module for layer in model.modules() if stores(layer) for module in layer.modules()}
    found = {path: model.get_submodule(path) for path, parts in find_norms(model).items() if parts.has_running}
    return {
        path: type(module).__name__
        for path, module in found.items()
        if module not in inside and not any(stores(part) for part in module.modules())
    }


def _checked_data(
    model: nn.Module, train: Iterable[Any] | None, target: Iterable[Any] | None, most: int | None
) -> tuple[list[Any], list[Any]]:
    _check_count("max_batches", most)
    if train is None and target is None:
        raise ArgumentError("train_batches and target_batches are both None; pass batches (input, target) of one.")
    named = (("train_batches", train), ("target_batches", target))
    found = [
        [] if data is None else list(checked_batches(model, data, most or sys.maxsize, name))[:most]
        for name, data in named
    ]
    return found[0], found[1]


def _check_count(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ArgumentError(f"{name}={value!r} must be a number, at least 1, or None for all.")


def _checked_metric(metric: Metric | None, forward: Forward | None) -> Metric:
    if metric is not None and not callable(metric):
        raise ArgumentError(
            f"metric={brief(metric)} must be callable as metric(model, batches), or None for the accuracy of classes."
        )
    if metric is not None:
        return metric
    run = forward or forward_pair

    def accuracy(model: nn.Module, batches: Sequence[Any]) -> Tensor:
        return torch.cat([_correct(*run(model, _moved(model, batch))) for batch in batches])

    return accuracy


def _correct(output: Any, target: Any) -> Tensor:
    """Return for each sample whether the largest score is at the target, or at what share of its places it is."""
    fits = isinstance(output, Tensor) and isinstance(target, Tensor) and output.ndim >= 2 and output.shape[1] > 1
    if not (fits and not target.is_floating_point() and target.shape == output.shape[:1] + output.shape[2:]):
        got = [f"{tuple(v.shape)} {v.dtype}" if isinstance(v, Tensor) else brief(v) for v in (output, target)]
        raise ArgumentError(
            "metric=None takes the accuracy of class scores (samples, classes, ...) at integer targets (samples, ...), "
            f"but output is {got[0]} and target {got[1]}; pass metric=lambda model, batches: one number a sample."
        )
    right: Tensor = (output.argmax(1) == target).double().flatten(1 if target.ndim > 1 else 0)
    return right.mean(1) if target.ndim > 1 else right


# ---- batches and norms -----------------------------------------------------------------------------------------------


def _forward(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch for its statistics: its first entry, its entries by name for a mapping, or itself."""
    batch = _moved(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _moved(model: nn.Module, batch: Any) -> Any:
    """Return a batch on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def _size(batch: Any) -> int:
    """Return the number of samples in a batch: the length of its first tensor, or of the list that it begins with."""
    first = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else None
    if isinstance(first, (tuple, list)):
        return len(first)
    tensor = next((tensor for _, tensor in tensors(batch) if tensor.dim()), None)
    return len(tensor) if tensor is not None else len(batch) if hasattr(batch, "__len__") else 1


def _described(
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, Mapping[str, Tensor]],
    own: Mapping[str, Mapping[str, Tensor]],
    samples: int,
    batch: float,
) -> pd.DataFrame:
    """Return what is known of each norm, by path: see `Measurements.norms`."""
    rows = []
    for path, layer in layers.items():
        parts, updates = recognize(layer), getattr(layer, "num_batches_tracked", None)
        momentum = math.nan if parts is None or parts.momentum is None else float(parts.momentum)
        tracked = math.nan if updates is None else float(updates)
        weight = 1 / max(tracked, 1.0) if math.isnan(momentum) and tracked > 0 else momentum
        expected = metrics.expected_divergence(samples, batch, 0.0 if math.isnan(weight) else weight)
        stored = {name: getattr(layer, name, None) for name in _INITIAL}
        initial = all(value is not None and bool((value == _INITIAL[name]).all()) for name, value in stored.items())
        row: dict[str, object] = {
            "class": type(layer).__name__,
            "channels": int(getattr(layer, "num_features", 0) or 0),
        }
        row |= {"momentum": momentum, "updates": tracked, "initial": initial, "broken": _broken(layer)}
        row |= metrics.summary(_divergence(layer, statistics.get(path, {})), expected)
        trained = _divergence(layer, own.get(path, {}))
        rows.append(row | {"kl_train": float(np.nanmedian(trained)) if len(trained) else math.nan})
    return pd.DataFrame(rows, index=pd.Index(list(layers), name="norm"))


def _broken(layer: nn.Module) -> int:
    """Return the number of stored numbers that are NaN, infinite or negative variances."""
    held = {name: buffer for name, buffer in layer.named_buffers(recurse=False) if name.startswith("running_")}
    bad = sum(int((~buffer.isfinite()).sum()) for buffer in held.values())
    return bad + int((held["running_var"] < 0).sum() if "running_var" in held else 0)


def _divergence(layer: nn.Module, statistics: Mapping[str, Tensor]) -> np.ndarray:
    """Return KL of the data's Gaussian from the stored one, by channel; nothing where a norm stores anything else."""
    if not {*_INITIAL} <= {*statistics}:
        return np.empty(0)
    stored = [getattr(layer, name).detach().double().cpu().numpy().ravel() for name in _INITIAL]
    seen = [statistics[name].double().cpu().numpy().ravel() for name in _INITIAL]
    return drift(*seen, *stored)
