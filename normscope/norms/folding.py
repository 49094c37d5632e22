"""Folding: put norms with stored statistics into the convolution or linear layer before them, for inference."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from normscope.core.errors import ArgumentError
from normscope.norms.area import Batch
from normscope.norms.conversion import swap
from normscope.norms.layer import Norm
from normscope.norms.operation import Operation
from normscope.norms.population import Running
from normscope.norms.recognize import recognize
from normscope.norms.recovery import Affine, Bare, Coloring
from normscope.norms.whiten import Whiten

_LINEAR = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
Pairs = Iterable[tuple[str, str]]


def fold(model: nn.Module, pairs: Pairs | None = None) -> nn.Module:
    """Return a copy in evaluation mode, its norms with stored statistics folded into the layer before them.

    y = M (W x + b) + s becomes (M W) x + (M b + s); M is diagonal for batch norm, full for whitening and coloring.
    Folded norms become nn.Identity. Sums are taken in float64, so the copy agrees with the model in evaluation mode up
    to rounding.

    Pairs are found by symbolic tracing; where a model cannot be traced, neighbors in an nn.Sequential are taken. Only
    layers that are called once, whose output goes nowhere else and whose weights are their own are folded.

    Args:
        model: any module; it stays as it is.
        pairs: paths of (convolution or linear layer, norm) to fold instead, where you know better.

    Returns:
        The copy.

    Raises:
        ArgumentError: a given pair cannot be folded.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    >>> fold(model)[1]
    Identity()
    """
    copied = copy.deepcopy(model).eval()
    if pairs is None:
        paths = [pair for pair in _found(copied) if not _obstacle(copied, *pair)]
    else:
        paths = list(pairs)
        for pair in paths:
            if reason := _obstacle(copied, *pair):
                raise ArgumentError(f"pairs={pair!r} cannot be folded: {reason}.")
    for linear, norm in paths:
        _fold_pair(copied.get_submodule(linear), copied.get_submodule(norm))
    return swap(copied, {copied.get_submodule(norm): nn.Identity() for _, norm in paths})


class _Tracer(fx.Tracer):
    """Trace a model without going into its norms."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is a node of the graph."""
        return super().is_leaf_module(m, module_qualified_name) or recognize(m) is not None


def _found(model: nn.Module) -> list[tuple[str, str]]:
    """Find a linear layer followed by a norm, by tracing, else among neighbors."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever the model's forward raises when it gets no numbers
        return list(_neighbors(model))
    called = Counter(model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module")
    found = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1:
            modules = [model.get_submodule(str(n.target)) for n in (before, node)]
            if all(called[module] == 1 for module in modules):
                found.append((str(before.target), str(node.target)))
    return found


def _neighbors(model: nn.Module) -> Iterator[tuple[str, str]]:
    for path, module in model.named_modules():
        if type(module).forward is nn.Sequential.forward:
            prefix = f"{path}." if path else ""
            for one, other in pairwise(module._modules):
                yield prefix + one, prefix + other


def _obstacle(model: nn.Module, linear: str, norm: str) -> str:
    """Say why a pair cannot be folded, "" if it can."""
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    known = {path for path, _ in model.named_modules(remove_duplicate=False)}
    for path in (linear, norm):
        if path not in known:
            return f"the model has no module {path!r}"
    before, after = model.get_submodule(linear), model.get_submodule(norm)
    if type(before) not in _LINEAR or is_parametrized(before):
        return f"{linear!r} is {type(before).__name__}, no plain convolution or linear layer"
    if places[before] > 1 or places[after] > 1 or _tied(model, before):
        return "a module or a weight is used in several places"
    mixing = _mixes(after)
    if mixing is None:
        return f"{norm!r} is no norm with stored statistics that is linear in evaluation mode: {after!r}"
    outputs = getattr(before, "out_features", None) or getattr(before, "out_channels", None)
    if outputs != cast(Any, after).num_features:
        return f"{linear!r} has {outputs} outputs, {norm!r} {cast(Any, after).num_features} features"
    if mixing and getattr(before, "groups", 1) > 1:
        return f"{norm!r} mixes the channels that {linear!r} keeps apart"
    return ""


def _tied(model: nn.Module, module: nn.Module) -> bool:
    own = {id(p) for p in module.parameters()}
    held = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return any(held[key] > 1 for key in own)


def _mixes(norm: nn.Module) -> bool | None:
    """Tell whether a norm mixes channels in evaluation mode; None for one that is not linear then."""
    if isinstance(norm, _BatchNorm):
        plain = type(norm).forward in {_BatchNorm.forward, nn.SyncBatchNorm.forward}
        return False if plain and norm.running_mean is not None else None
    if type(norm) is not Norm or type(norm.area) is not Batch or not isinstance(norm.population, Running):
        return None
    if type(norm.recovery) not in {Affine, Bare, Coloring} or getattr(norm.recovery, "shape", None):
        return None
    by_channel = type(norm.operation).apply is Operation.apply
    if not by_channel and not isinstance(norm.operation, Whiten):
        return None
    return not by_channel or type(norm.recovery) is Coloring


@torch.no_grad()
def _line(norm: Any) -> tuple[Tensor, Tensor]:
    """Return M, `(C,)` or `(C, C)`, and s of y = M x + s, in float64."""
    mixes, norm = _mixes(norm), copy.deepcopy(norm).double().eval()
    count = norm.num_features
    like = norm.running_mean
    shift = _at(norm, torch.zeros(1, count).to(like))[0]
    if not mixes:
        return _at(norm, torch.ones(1, count).to(like))[0] - shift, shift
    return (_at(norm, torch.eye(count).to(like)) - shift).T, shift


def _at(norm: nn.Module, x: Tensor) -> Tensor:
    """Call a norm on `(N, C)`, whatever number of dimensions it takes."""
    if isinstance(norm, _BatchNorm):
        weight, bias = norm.weight, norm.bias
        y: Tensor = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, False, 0.0, norm.eps)
        return y
    out: Tensor = norm(x)
    return out


@torch.no_grad()
def _fold_pair(linear: Any, norm: Any) -> None:
    """Change weight and bias of a linear layer so that it does what both did."""
    matrix, shift = _line(norm)
    weight = _turned(linear, linear.weight.double())
    bias = weight.new_zeros(len(shift)) if linear.bias is None else linear.bias.double()
    if matrix.ndim == 1:
        matrix = matrix.unsqueeze(-1)
        weight, bias = (matrix * weight.flatten(1)).reshape(weight.shape), matrix[:, 0] * bias
    else:
        weight, bias = (matrix @ weight.flatten(1)).reshape(weight.shape), matrix @ bias
    dtype, trained = linear.weight.dtype, linear.weight.requires_grad
    weight = _turned(linear, weight).to(dtype).contiguous()
    linear.weight = nn.Parameter(weight, requires_grad=trained)
    linear.bias = nn.Parameter((bias + shift).to(dtype), requires_grad=trained)


def _turned(linear: Any, weight: Tensor) -> Tensor:
    """Turn the weight of a transposed convolution, (in, out / groups, *), to (out, in / groups, *), and back."""
    if not isinstance(linear, _ConvTransposeNd):
        return weight
    split = weight.reshape(linear.groups, -1, *weight.shape[1:]).transpose(1, 2)
    return split.reshape(-1, *split.shape[2:])
