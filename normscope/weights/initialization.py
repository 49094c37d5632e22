"""Data-dependent initialization of weight normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.weights.layers import originals, parametrized
from normscope.weights.parametrization import Layout
from normscope.weights.scaling import WeightNorm


@torch.no_grad()
def initialize(model: nn.Module, *inputs: Any, scale: float = 1.0, eps: float | None = None) -> Any:
    """Set the lengths and biases of weight-normalized layers so that on one batch each unit has mean 0 and deviation 1.

    g = scale / sqrt(var(t) + eps), b = -mean(t) g for t = <v, x> / |v|, over batch and space. The layers
    are set in the order in which they run, each on what those before it now put out.

    Args:
        model: with `apply(model, "weight-norm")`; called as `model(*inputs)` once, in its own mode.
        *inputs: of the model, a batch.
        scale: the deviation to reach.
        eps: added to the variance; None for 1e-8 for convolutions and 1e-10 else.

    Returns:
        The model's output.

    Raises:
        ArgumentError: no layer has weight normalization with a length for each unit, or none has run.
    """
    layers = [module for _, module, _, p in parametrized(model) if isinstance(p, WeightNorm) and p.invariance == "row"]
    if not layers:
        raise ArgumentError("model has no layer with weight normalization per row; apply(model, 'weight-norm') first.")
    done: list[nn.Module] = []
    forwards = {layer: layer.forward for layer in layers}
    for layer, forward in forwards.items():
        # an attribute of the instance stands in for the method, for one call
        layer.forward = _setting(layer, forward, scale, eps, done)
    try:
        output = model(*inputs)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
    if not done:
        raise ArgumentError("none of the weight-normalized layers runs in model(*inputs), so none was set.")
    return output


def _setting(
    layer: nn.Module, forward: Callable[..., Tensor], scale: float, eps: float | None, done: list[nn.Module]
) -> Callable[..., Tensor]:
    """Return a forward that sets the layer at its first call."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        if layer not in done:
            done.append(layer)
            _set(layer, forward(*args, **kwargs), scale, eps)
        return forward(*args, **kwargs)

    return run


def _set(layer: nn.Module, output: Tensor, scale: float, eps: float | None) -> None:
    g, _ = originals(layer, "weight")
    layout = Layout.of(layer)
    bias = layer.bias if isinstance(getattr(layer, "bias", None), Tensor) else None
    axis = 1 if layout.conv else -1
    values = output.movedim(axis, -1).flatten(0, -2)
    assert isinstance(bias, Tensor | None)
    # of the unit weight: without the bias, over the old length
    t = (values - (0 if bias is None else bias)) / g.reshape(-1)
    small = (1e-8 if layout.conv else 1e-10) if eps is None else eps
    length = scale * (t.var(0, correction=0) + small).rsqrt()
    g.copy_(length.reshape(g.shape))
    if bias is not None:
        bias.copy_(-t.mean(0) * length)
