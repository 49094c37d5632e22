"""Compression: the gains of batch norms tell which channels a network can do without."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from normscope.core.errors import ArgumentError
from normscope.norms.recalibration import recalibrate

Keep = Mapping[str, Tensor]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# what leaves a channel of zeros one of zeros: entry by entry, or over the places of a channel
_ENTRIES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
_PLACES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_ENTRIES_NAMES = ("relu", "relu_", "leaky_relu", "gelu", "silu", "tanh", "elu", "dropout", "contiguous")
_PLACES_NAMES = tuple(f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3))


def gains(model: nn.Module) -> dict[str, Tensor]:
    """Return the absolute gains of every batch norm of torch, by its path: the smaller, the less a channel counts.

    Source: liu2017, section 3.
    """
    return {path: norm.weight.detach().abs() for path, norm in _norms(model).items()}


@torch.no_grad()
def add_sparsity(model: nn.Module, strength: float = 1e-4) -> None:
    """Add the subgradient of strength * sum |gain| to the gradients of batch norms' gains: g += strength sign(gain).

    Call it between backward and step. Source: liu2017, equation 1.

    Args:
        model: a model after backward.
        strength: weight of the penalty; 1e-4 for networks of the paper's size, 1e-2 for those of a few hundred units.

    Raises:
        ArgumentError: a gain has no gradient, or there is no gain.
    """
    for path, norm in _norms(model).items():
        if norm.weight.grad is None:
            raise ArgumentError(f"model: {path}.weight has no gradient; call add_sparsity between backward and step.")
        norm.weight.grad.add_(norm.weight.sign(), alpha=strength)


def threshold(model: nn.Module, fraction: float) -> float:
    """Return the absolute gain up to which channels are pruned, so that about a fraction of all is.

    It is the entry int(total * fraction) of all gains in rising order. Source: liu2017, section 3.

    Args:
        model: a model with batch norms.
        fraction: fraction of all channels, from 0 to below 1.

    Returns:
        The gain; channels above it are kept.

    Raises:
        ArgumentError: fraction is out of range, or the model has no batch norm with gains.
    """
    if not 0 <= fraction < 1:
        raise ArgumentError(f"fraction={fraction!r} must be at least 0 and below 1; try 0.5.")
    every = torch.cat([*gains(model).values()]).sort().values
    return float(every[int(len(every) * fraction)])


def keep_above(model: nn.Module, limit: float) -> dict[str, Tensor]:
    """Return which channels have a gain above a limit, by path of the norm; of each norm the largest stays anyway."""
    found = gains(model)
    return {path: (gain > limit) | F.one_hot(gain.argmax(), len(gain)).bool() for path, gain in found.items()}


def prune(model: nn.Module, fraction: float) -> nn.Module:
    """Return a copy without the channels of the smallest gains, over all norms together; see `mask` and `shrink`.

    Args:
        model: a model with batch norms; it stays as it is.
        fraction: fraction of all channels to prune, see `threshold`.

    Returns:
        The copy, of the model's shape. A fraction that cannot be is an ArgumentError.
    """
    return mask(model, keep_above(model, threshold(model, fraction)))


def mask(model: nn.Module, keep: Keep) -> nn.Module:
    """Return a copy with gains and biases of all but some channels set to 0; its shape is that of the model.

    Args:
        model: a model with batch norms; it stays as it is.
        keep: which channels to keep, bool `[C]` by path of the norm; norms that it does not name keep all.

    Returns:
        The copy.

    Raises:
        ArgumentError: a path names no batch norm with gains, or the channels do not fit it.
    """
    copied = copy.deepcopy(model)
    norms = _norms(copied)
    for path, kept in keep.items():
        if path not in norms or kept.shape != norms[path].weight.shape or kept.dtype != torch.bool:
            raise ArgumentError(
                f"keep: {path!r} with {tuple(kept.shape)} of {kept.dtype} fits no batch norm; it takes bool, one entry "
                f"a channel, by path: {', '.join(norms)}."
            )
        for parameter in (norms[path].weight, norms[path].bias):
            if parameter is not None:
                parameter.data[~kept] = 0
    return copied


@dataclass(frozen=True)
class _Chain:
    """A norm whose channels can be cut: what produces them, and what takes them, with how many entries a channel."""

    producer: str
    norm: str
    consumers: tuple[tuple[str, int], ...]


def shrink(model: nn.Module) -> nn.Module:
    """Return a smaller copy without the channels whose gain and bias are 0; in evaluation mode it gives the same.

    A norm is cut where a convolution or linear layer produces its channels alone, and only such layers take them, with
    nothing between but what keeps zeros (ReLU, GELU, pooling, dropout, flatten). Others, as those that end in a sum,
    keep their zeros. `normscope.norms.fold` afterwards takes the norms themselves out.

    Args:
        model: a model that `prune` or `mask` returned, which torch.fx can trace; it stays as it is.

    Returns:
        The copy, in evaluation mode. If the model cannot be traced this is an ArgumentError.
    """
    copied = copy.deepcopy(model).eval()
    for chain in _chains(copied):
        norm = cast(Any, copied.get_submodule(chain.norm))
        dead = (norm.weight == 0) & (norm.bias == 0 if norm.bias is not None else True)
        kept = (~dead).nonzero().flatten()
        kept = kept if len(kept) else torch.zeros(1, dtype=torch.long, device=dead.device)
        _cut_outputs(copied.get_submodule(chain.producer), kept)
        _cut_norm(norm, kept)
        for path, places in chain.consumers:
            index = (kept[:, None] * places + torch.arange(places, device=kept.device)).flatten()
            _cut_inputs(copied.get_submodule(path), index)
    return copied


def eagle_eye(
    model: nn.Module,
    candidates: Sequence[Keep],
    batches: Iterable[Any],
    metric: Callable[[nn.Module], float],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> list[tuple[float, int]]:
    """Rank ways to prune by a metric after the statistics of the norms were measured anew, without finetuning.

    With the statistics of the whole network a pruned one is misjudged; with its own, its metric before finetuning
    tells that after it. Source: S206 (EagleEye), section 3.3.

    Args:
        model: a model with batch norms; it stays as it is.
        candidates: which channels to keep, by path of the norm, for each.
        batches: a few training batches, read for each candidate.
        metric: of a pruned model in evaluation mode; higher is better.
        forward: as for `normscope.norms.recalibrate`.

    Returns:
        Metric and number of each candidate, the best first.
    """
    held, found = list(batches), []
    for number, keep in enumerate(candidates):
        pruned = recalibrate(mask(model, keep).eval(), held, forward, progress=False)
        found.append((float(metric(pruned)), number))
    return sorted(found, key=lambda pair: -pair[0])


# ---- which channels can be cut ---------------------------------------------------------------------------------------


def _norms(model: nn.Module) -> dict[str, Any]:
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.weight is not None
    }
    if not found:
        raise ArgumentError(f"model={type(model).__name__} has no batch norm of torch with gains to prune by.")
    return found


def _chains(model: nn.Module) -> Iterator[_Chain]:
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise ArgumentError(
            f"model={type(model).__name__} cannot be traced by torch.fx ({type(error).__name__}: {error}); shrink its "
            "parts that can, or keep the zeros that prune leaves."
        ) from error
    modules = dict(model.named_modules())
    calls = Counter(modules[str(node.target)] for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        norm = _module(node, modules)
        before = node.args[0] if isinstance(norm, _BatchNorm) and norm.weight is not None and calls[norm] == 1 else None
        if not isinstance(before, fx.Node) or len(before.users) > 1 or not _usable(before, modules, calls):
            continue
        flat = isinstance(_module(before, modules), nn.Linear)
        consumers = _consumers(node, modules, int(cast(Any, norm).num_features), flat)
        if consumers and all(_usable(taker, modules, calls) for taker, _ in consumers):
            yield _Chain(str(before.target), str(node.target), tuple((str(t.target), n) for t, n in consumers))


def _module(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def _usable(node: fx.Node, modules: Mapping[str, nn.Module], calls: Counter[nn.Module]) -> bool:
    """Tell whether a node is a plain convolution without groups, or a linear layer, that runs once."""
    module = _module(node, modules)
    plain = module is not None and type(module) in (*_CONVOLUTIONS, nn.Linear) and not is_parametrized(module)
    return plain and getattr(module, "groups", 1) == 1 and calls[cast(nn.Module, module)] == 1


def _consumers(
    node: fx.Node, modules: Mapping[str, nn.Module], features: int, flat: bool
) -> list[tuple[fx.Node, int]] | None:
    """Return the layers that take a norm's channels and how many entries of each; None where anything else does."""
    found: list[tuple[fx.Node, int]] = []
    for user in node.users:
        module = _module(user, modules)
        if isinstance(module, nn.Linear if flat else _CONVOLUTIONS):
            inputs = int(module.in_features if isinstance(module, nn.Linear) else cast(Any, module).in_channels)
            found.append((user, inputs // features))
            continue
        flattens, entries, places = _keeps(user, module)
        further = _consumers(user, modules, features, flat or flattens) if flattens or entries or places else None
        if further is None or (places and flat):
            return None
        found += further
    return found


def _keeps(node: fx.Node, module: nn.Module | None) -> tuple[bool, bool, bool]:
    """Tell whether a node flattens all but the first axis, or keeps zeros entry by entry, or over places."""
    if module is not None:
        flattens = isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
        return flattens, isinstance(module, _ENTRIES), isinstance(module, _PLACES)
    if node.op not in ("call_function", "call_method"):
        return False, False, False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    flattens = name == "flatten" and (*node.args[1:], *node.kwargs.values()) == (1,)
    return flattens, name in _ENTRIES_NAMES, name in _PLACES_NAMES


def _cut_outputs(layer: Any, kept: Tensor) -> None:
    layer.weight = _part(layer.weight, 0, kept)
    if layer.bias is not None:
        layer.bias = _part(layer.bias, 0, kept)
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(kept))


def _cut_inputs(layer: Any, kept: Tensor) -> None:
    layer.weight = _part(layer.weight, 1, kept)
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(kept))


def _cut_norm(norm: Any, kept: Tensor) -> None:
    norm.weight = _part(norm.weight, 0, kept)
    norm.bias = None if norm.bias is None else _part(norm.bias, 0, kept)
    for name in ("running_mean", "running_var"):
        if getattr(norm, name) is not None:
            setattr(norm, name, getattr(norm, name)[kept])
    norm.num_features = len(kept)


def _part(parameter: nn.Parameter, axis: int, kept: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(axis, kept), requires_grad=parameter.requires_grad)
