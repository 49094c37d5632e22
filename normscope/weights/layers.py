"""Putting methods on the layers of a model, keeping them on their manifold, and taking them off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normscope.core.errors import ArgumentError
from normscope.norms.conversion import Where, meant
from normscope.norms.part import require
from normscope.weights.parametrization import Layout, Parametrization
from normscope.weights.table import LAYERS, Row, zoo


def apply(
    model: nn.Module, name: str, where: Where = None, *, parameter: str | None = None, **options: Any
) -> nn.Module:
    """Put a normalization of weights on the layers of a model, in place, by torch.nn.utils.parametrize.

    Make the optimizer afterwards: the parameters are then those that the method trains. Of a method with
    `zoo[name].step`, call `retract(model)` after each step of the optimizer. Where one layer cannot take it, none does.

    Args:
        model: any module, or a single layer.
        name: a name of `zoo`.
        where: which layers: a pattern of paths as "layer3.*", a class or several, a function of path and module; None
            for all that the method is meant for: linear layers, convolutions and recurrent cells, of a recurrent method
            the cells alone.
        parameter: the weight's name; "weight", or "weight_hh" of a recurrent cell, by default.
        **options: settings of the method; `zoo[name]` shows them.

    Returns:
        The model.

    Raises:
        ArgumentError: name, option or layers cannot work.

    >>> layer = apply(nn.Linear(8, 4), "orthogonal", scale=1.0)
    >>> torch.allclose(layer.weight @ layer.weight.T, torch.eye(4), atol=1e-5)
    True
    """
    row = zoo[name]
    for option in options:
        require(option, "option", row.settings())
    made: list[tuple[nn.Module, str, Parametrization]] = []
    failures: dict[str, list[str]] = {}
    for path, module in _selected(model, row, where, parameter).items():
        tensor = parameter or _parameter(module)
        try:
            made.append((module, tensor, _made(model, path, module, tensor, row, options)))
        except ArgumentError as error:
            failures.setdefault(str(error), []).append(path or "(the model itself)")
    if failures:
        reasons = " ".join(f"{', '.join(map(repr, paths[:8]))}: {why}" for why, paths in failures.items())
        raise ArgumentError(f"name={name!r} cannot be applied to some layers, so it was to none. {reasons}")
    _register(made)
    return model


def _register(made: list[tuple[nn.Module, str, Parametrization]]) -> None:
    """Register all parametrizations, or none: where one fails, the layers before it become what they were."""
    weights: list[Tensor] = [getattr(module, tensor) for module, tensor, _ in made]
    before = [(weight.detach(), dict(module._parameters)) for (module, *_), weight in zip(made, weights, strict=True)]
    try:
        for (module, tensor, parametrization), weight in zip(made, weights, strict=True):
            if not weight.requires_grad:  # a frozen layer trains nothing
                parametrization.requires_grad_(False)
            parametrize.register_parametrization(module, tensor, parametrization)
    except BaseException:
        for (module, tensor, _), weight, (values, parameters) in zip(made, weights, before, strict=True):
            if parametrize.is_parametrized(module, tensor):
                parametrize.remove_parametrizations(module, tensor)
                setattr(module, tensor, weight)
            weight.data = values  # torch puts the raw tensor in its place
            if tensor in parameters:  # in their order
                module._parameters.clear()
                module._parameters.update(parameters)
        raise


def _parameter(module: nn.Module) -> str:
    return "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight"


def _selected(model: nn.Module, row: Row, where: Where, parameter: str | None) -> dict[str, nn.Module]:
    """Find the layers that are meant; none is an error that lists those there are."""
    if where is not None and not isinstance(where, str | tuple) and not callable(where):
        raise ArgumentError(f"where={where!r} must be a pattern of paths, a class or several, a function, or None.")
    usual = (*LAYERS, nn.RNNBase)
    found = {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, usual) if parameter is None else hasattr(module, parameter))
    }
    chosen = {
        path: module
        for path, module in found.items()
        if (meant(where, path, module) if where is not None else parameter or isinstance(module, row.layers))
    }
    if chosen:
        return chosen
    kinds = sorted({f"{path or '(the model itself)'} ({type(module).__name__})" for path, module in found.items()})
    raise ArgumentError(
        f"where={where!r} matches no layer for {row.name!r}, which is meant for "
        f"{', '.join(cls.__name__.lstrip('_') for cls in row.layers)}; layers: {', '.join(kinds[:12]) or 'none'}."
    )


def _made(
    model: nn.Module, path: str, module: nn.Module, tensor: str, row: Row, options: dict[str, Any]
) -> Parametrization:
    """Make the parametrization of one layer."""
    if isinstance(module, nn.RNNBase):
        raise ArgumentError(f"{type(module).__name__} keeps its weights where no parametrization reaches; use cells.")
    if parametrize.is_parametrized(module, tensor):
        raise ArgumentError("its weight is parametrized already; weights.remove(model) first.")
    weight = getattr(module, tensor, None)
    if not isinstance(weight, Tensor) or is_lazy(weight) or weight.ndim < 2 or not weight.is_floating_point():
        raise ArgumentError(f"{tensor!r} is no floating-point matrix or kernel with values.")
    if not weight.is_meta and not weight.isfinite().all():
        raise ArgumentError(f"{tensor!r} holds NaN or infinity; initialize it again, or load the weights from before.")
    tied = [
        f"{other}.{name}".lstrip(".")
        for other, owner in model.named_modules()
        for name, p in owner._parameters.items()
        if p is weight and owner is not module
    ]
    if tied:
        raise ArgumentError(f"its weight is also {', '.join(tied)}, which would be left behind; untie it first.")
    return row.make(Layout.of(module), weight.detach(), **{**dict(row.fixed), **options})


def parametrized(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Parametrization]]:
    """Iterate over the weights that have a method of ours.

    Args:
        model: any module.

    Yields:
        Path of the layer, the layer, the weight's name, the parametrization.
    """
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for tensor, chain in module.get_submodule("parametrizations").named_children():
            found = next((p for p in chain.children() if isinstance(p, Parametrization)), None)
            if found is not None:
                yield path, module, tensor, found


def remove(model: nn.Module) -> nn.Module:
    """Take our methods off, in place; each layer keeps the weight in use as an ordinary parameter.

    Args:
        model: any module; parametrizations of others stay.

    Returns:
        The model.
    """
    for _, module, tensor, _ in list(parametrized(model)):
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
    return model


def originals(module: nn.Module, tensor: str) -> tuple[Tensor, ...]:
    """Return the raw tensors behind a parametrized weight.

    Args:
        module: the layer.
        tensor: the weight's name.

    Returns:
        Its raw tensors in order.
    """
    chain: Any = module.get_submodule("parametrizations").get_submodule(tensor)
    if not chain.is_tensor:
        return tuple(getattr(chain, f"original{i}") for i in range(chain.ntensors))
    return (chain.original,)


@torch.no_grad()
def retract(model: nn.Module) -> None:
    """Bring raw weights back to their manifold, or rebase them, where a method asks for it after an optimizer's step.

    Args:
        model: changed in place; a method without such a step is left alone.
    """
    for _, module, tensor, method in parametrized(model):
        raw = originals(module, tensor)
        for old, new in zip(raw, method.retract(*raw) or raw, strict=True):
            if new is not old:
                old.copy_(new)


def in_manifold(model: nn.Module, tol: float | None = None) -> dict[str, bool]:
    """Tell for each parametrized layer whether its weight in use is one that its method makes.

    Args:
        model: any module.
        tol: the largest deviation that passes; None for that of each method.

    Returns:
        Path to truth.
    """
    with torch.no_grad():
        return {
            path: method.in_manifold(getattr(module, tensor), tol)
            for path, module, tensor, method in parametrized(model)
        }
