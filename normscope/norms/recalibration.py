"""Recalibration: measure the stored statistics of a model's norms over given batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from tqdm import tqdm

from normscope.core.errors import ArgumentError
from normscope.linalg.protect import copies, restore_tensor
from normscope.norms.area import Area, Batch
from normscope.norms.average import LOCAL, Across, Average
from normscope.norms.layer import Norm, Normalization
from normscope.norms.operation import Operation, Standardize
from normscope.norms.part import require
from normscope.norms.population import Running
from normscope.norms.whiten import Whiten

ESTIMATES = ("pooled", "batches")


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    estimate: str = "pooled",
    only: str | Collection[str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Measure the stored statistics of norms over batches (precise batch norm), in place.

    Norms with stored statistics normalize by those of the batch meanwhile, as in training; every other module runs in
    evaluation mode. "pooled" weights each batch by its number of samples:

        mean = sum_b n_b mean_b / n,    var = sum_b n_b E_b[x^2] / n - mean^2,

    the mean and the (biased) variance of all samples together; covariances likewise, whitening matrices and other
    statistics as weighted averages. "batches" takes the plain average of what the layer stores for each batch, as
    torch's momentum=None does. Special layers, which have rules of their own, are averaged plainly in both.

    Parameters, modes, random numbers and other buffers stay as they were.

    Args:
        model: any module.
        batches: what forward takes, one after another; read once.
        forward: function of model and batch; by default the batch itself, its first entry for a tuple or list, or its
            entries as keywords for a mapping.
        estimate: "pooled" or "batches".
        only: path or paths of norms to measure, as `find_norms` names them; all others keep and use what they store.
        progress: draw a bar on stderr where it takes longer than two seconds.

    Returns:
        The model.

    Raises:
        ArgumentError: no norm stores statistics, only names something else, or there is no batch; nothing has changed
            then.

    >>> model = recalibrate(nn.Sequential(nn.BatchNorm1d(1)), [torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0]] * 2)])
    >>> model[0].running_mean, model[0].running_var
    (tensor([2.7500]), tensor([5.1875]))
    """
    require(estimate, "estimate", ESTIMATES)
    layers = {path: module for path, module in model.named_modules() if stores(module)}
    if not layers:
        raise ArgumentError("model has no norm with running statistics; there is nothing to measure.")
    chosen = layers if only is None else (only,) if isinstance(only, str) else only
    for path in chosen:
        require(path, "only", layers)
    pools: dict[nn.Module, _Pool] = {layers[path]: _Pool(layers[path], pooled=estimate == "pooled") for path in chosen}
    bar = tqdm(batches, desc="recalibrate", delay=2.0, disable=not progress)
    _measure(model, pools, bar, forward, by_batch=True)
    for pool in pools.values():
        pool.store()
    return model


def measured_statistics(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Measure the statistics of norms over batches as `recalibrate` does, while all go on using their stored ones.

    These are what each norm would store if it alone were recalibrated, with the layers before it as they are.

    Args:
        model: any module; it stays as it is.
        batches: as for `recalibrate`.
        forward: as for `recalibrate`.

    Returns:
        Path of a norm to its statistics by the name of the buffer, in float64; without special layers, which have rules
        of their own, and without norms that no batch reached.
        If no batch reached any of them this is an ArgumentError.

    >>> measured_statistics(nn.Sequential(nn.BatchNorm1d(1)), [torch.tensor([[0.0], [1.0]])])["0"]["running_var"]
    tensor([0.2500], dtype=torch.float64)
    """
    layers = {path: module for path, module in model.named_modules() if stores(module) and _measurable(module)}
    pools = {layer: _Pool(layer, pooled=True) for layer in layers.values()}
    if pools:
        _measure(model, pools, batches, forward, by_batch=False)
    return {path: pools[layer].found() for path, layer in layers.items() if pools[layer].total}


def _measure(
    model: nn.Module,
    pools: dict[nn.Module, _Pool],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    *,
    by_batch: bool,
) -> None:
    saved = copies(model.buffers())
    try:
        with torch.no_grad(), _measuring(model, pools, by_batch):
            for batch in batches:
                (forward or _call)(model, batch)
    finally:
        for buffer, value in saved:
            restore_tensor(buffer, value)
    if not any(pool.total for pool in pools.values()):
        raise ArgumentError("batches reached no norm with running statistics; pass at least one batch, not used up.")


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def stores(module: nn.Module) -> bool:
    """Tell whether a module is a norm whose stored statistics can be measured anew.

    Args:
        module: any module.

    Returns:
        Whether it is.

    >>> stores(nn.BatchNorm1d(1)), stores(nn.BatchNorm1d(1, track_running_stats=False))
    (True, False)
    """
    if isinstance(module, _NormBase):
        return module.running_mean is not None
    if isinstance(module, Norm):
        return isinstance(module.population, Running)
    return isinstance(module, Normalization) and module.traits.stateful


@contextmanager
def _measuring(model: nn.Module, pools: dict[nn.Module, _Pool], by_batch: bool) -> Iterator[None]:
    """Run a model in evaluation mode, the layers of the pools by batch statistics or not; these report each input."""
    modes = [(module, module.training) for module in model.modules()]
    own = {layer: layer.__dict__["forward"] for layer in pools if "forward" in layer.__dict__}
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    try:
        model.eval()
        for layer, pool in pools.items():
            layer.train(by_batch)
            # no hook: the forward of the instance stands before that of its class
            layer.forward = pool.watch(layer.forward)
        with torch.random.fork_rng(devices=[device.index or 0 for device in devices]):
            yield
    finally:
        for layer in pools:
            layer.__dict__.pop("forward", None)
            layer.__dict__.update({"forward": own[layer]} if layer in own else {})
        for module, training in modes:
            module.training = training


class _Pool:
    """The statistics of one layer over all batches."""

    def __init__(self, layer: Any, *, pooled: bool) -> None:
        """Start with nothing.

        Raises:
            ArgumentError: the layer has rules of its own and no momentum.
        """
        self.layer, self.pooled = layer, pooled
        self.total = 0.0
        self.stats: dict[str, Tensor] = {}
        self.measurable = _measurable(layer)
        if not self.measurable and not isinstance(getattr(layer, "momentum", None), int | float | None):
            raise ArgumentError(f"{type(layer).__name__} stores statistics by a rule of its own; it has no momentum.")

    def watch(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward function that takes the statistics of its input as well."""

        def watched(x: Tensor, *arguments: Any, **named: Any) -> Any:
            if self.measurable:
                self.add(*self.measured(x))
                return forward(x, *arguments, **named)
            momentum, self.layer.momentum = self.layer.momentum, 1.0
            try:
                y = forward(x, *arguments, **named)
            finally:
                self.layer.momentum = momentum
            self.add({name: buffer.clone() for name, buffer in self.buffers().items()}, 1.0)
            return y

        return watched

    def buffers(self) -> dict[str, Tensor]:
        """Return the stored statistics by name, without "running_"."""
        named = self.layer.named_buffers(recurse=False)
        return {n.removeprefix("running_"): b for n, b in named if n.startswith("running_") and b.is_floating_point()}

    def measured(self, x: Tensor) -> tuple[dict[str, Tensor], float]:
        """Return the statistics of an input, in float64, and its number of samples."""
        x = x.detach().double()
        area: Area
        operation: Operation
        if isinstance(self.layer, _BatchNorm):
            area, operation, average, axis = Batch(), Standardize(), _across(self.layer), 1
            population = Running()
        else:
            area, operation, average = self.layer.area, self.layer.operation, self.layer.average
            population, axis = self.layer.population, area.axis(x, self.layer.num_features)
        z = area.split(x, axis)
        stats, count = operation.measure(z, average), average.count(z)
        unbiased = count if population.unbiased and not self.pooled else None
        found = {name: operation.quantity(name, stats, unbiased) for name in population.names(operation)}
        if not area.fixed:
            found = {name: value.mean(0) for name, value in found.items()}
        return found, float(count) * (1 if area.fixed else z.shape[0])

    def add(self, new: dict[str, Tensor], samples: float) -> None:
        """Put the statistics of one batch to those of the batches before."""
        weight = samples if self.pooled else 1.0
        if not weight:  # a batch without samples
            return
        self.total += weight
        share = weight / self.total
        old, self.stats = self.stats, {}
        for name, value in new.items():
            before = old.get(name, value)
            self.stats[name] = before + share * (value - before)
            if name in _SPREADS and self.pooled and self.measurable and "mean" in new:
                self.stats[name] += share * (1 - share) * self.between(name, new["mean"] - old.get("mean", new["mean"]))

    def between(self, name: str, delta: Tensor) -> Tensor:
        """Return what a difference of two means adds to the spread of their samples together."""
        if name == "var":
            return delta.square()
        operation = self.layer.operation
        if isinstance(operation, Whiten) and operation.moment:
            return torch.zeros((), dtype=delta.dtype)
        outer = delta.unsqueeze(-1) * delta.unsqueeze(-2)
        return outer * (1 - operation.shrink) if name == "sigma" else outer

    def found(self) -> dict[str, Tensor]:
        """Return the statistics by the name of their buffer, in its shape."""
        named = {f"running_{name}": value for name, value in self.stats.items()}
        return {name: value.reshape(getattr(self.layer, name).shape) for name, value in named.items()}

    def store(self) -> None:
        """Write the statistics into the layer; one that saw no batch stays as it was."""
        for name, value in self.found().items():
            getattr(self.layer, name).copy_(value)


def _measurable(layer: nn.Module) -> bool:
    """Tell whether the statistics of a layer follow from its input alone."""
    return isinstance(layer, _BatchNorm | Norm)


_SPREADS = ("var", "covariance", "sigma")


def _across(layer: nn.Module) -> Average:
    """Return how a layer of torch averages: over all ranks for SyncBatchNorm where there are several."""
    if isinstance(layer, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        return Across(layer.process_group)
    return LOCAL
