"""The compositions that torch has a fused kernel for.

The layer has checked the input, so that the kernels are called without the checks of torch.nn.functional.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.backends import cudnn

from normscope.norms.affine import scale_shift
from normscope.norms.area import Area, Batch, Group, Instance, Layer, Position
from normscope.norms.operation import RMS, Operation, Standardize
from normscope.norms.population import Current, Population, Running
from normscope.norms.recovery import Affine, Bare, Recovery

Kernel = Callable[[Any, Tensor, int], Tensor]


def kernel(area: Area, operation: Operation, recovery: Recovery, population: Population) -> Kernel | None:
    """Return the fused form of a composition, None where torch has none.

    Args:
        area: its area.
        operation: its operation.
        recovery: its recovery.
        population: its population.

    Returns:
        A function of (layer, input, channel axis) that does the same as the parts.
    """
    plain = type(recovery) is Bare or (type(recovery) is Affine and recovery.offset == 0)
    shaped = type(recovery) is Affine and bool(recovery.shape)
    if type(operation) is Standardize and operation.inside and not operation.unbiased and plain:
        return _standardizing(area, population, shaped)
    scaled = plain and not (type(recovery) is Affine and recovery.shift) and type(population) is Current
    if type(operation) is RMS and operation.inside and operation.fraction == 1:
        tokens = type(area) is Position or (type(area) is Layer and area.channels != "first")
        return _rms_norm if scaled and tokens else None
    return None


def _standardizing(area: Area, population: Population, shaped: bool) -> Kernel | None:
    running = type(population) is Running and population.unbiased and not population.track and not population.first
    current = type(population) is Current
    if type(area) is Batch and (running or current) and not shaped:
        return _batch_norm
    if type(area) is Instance and current and not shaped:
        return _instance_norm
    if type(area) is Group and current and not shaped:
        return _group_norm
    if type(area) is Layer and current:
        return _layer_norm
    if type(area) is Position and current and not shaped:
        return _position_norm
    return None


def _parameters(host: Any) -> tuple[Tensor | None, Tensor | None]:
    own = host._parameters
    return own.get("weight"), own.get("bias")


def _batch_norm(host: Any, x: Tensor, axis: int) -> Tensor:
    if axis == -1 and x.ndim > 2:
        return _batch_norm(host, x.flatten(0, -2), 1).reshape(x.shape)
    weight, bias = _parameters(host)
    population = host.population
    if type(population) is Current:
        return torch.batch_norm(x, weight, bias, None, None, True, 0.0, host.eps, cudnn.enabled)
    momentum = population.momentum
    if host.training:
        host.num_batches_tracked.add_(1)
        momentum = 1.0 / float(host.num_batches_tracked) if momentum is None else momentum
    mean, var = host.running_mean, host.running_var
    return torch.batch_norm(x, weight, bias, mean, var, host.training, momentum or 0.0, host.eps, cudnn.enabled)


def _instance_norm(host: Any, x: Tensor, axis: int) -> Tensor:
    return torch.instance_norm(x, *_parameters(host), None, None, True, 0.0, host.eps, cudnn.enabled)


def _group_norm(host: Any, x: Tensor, axis: int) -> Tensor:
    return torch.group_norm(x, host.area.groups, *_parameters(host), host.eps, cudnn.enabled)


def _layer_norm(host: Any, x: Tensor, axis: int) -> Tensor:
    weight, bias = _parameters(host)
    if axis == 1 and x.ndim > 2:
        return torch.group_norm(x, 1, weight, bias, host.eps, cudnn.enabled)
    shape = x.shape[x.ndim - (host.area.dims or 1) :]
    return torch.layer_norm(x, shape, weight, bias, host.eps, cudnn.enabled)


def _position_norm(host: Any, x: Tensor, axis: int) -> Tensor:
    z = x.movedim(1, -1) if axis == 1 else x
    y = torch.layer_norm(z, z.shape[-1:], *_parameters(host), host.eps, cudnn.enabled)
    return y.movedim(-1, 1) if axis == 1 else y


def _rms_norm(host: Any, x: Tensor, axis: int) -> Tensor:
    weight, _ = _parameters(host)
    if weight is not None and weight.dtype != x.dtype:
        return _rms_norm(host, x.to(weight.dtype), axis).to(x.dtype)
    if axis == 1 and x.ndim > 2:
        return _rms_of_maps(host, x)
    dims = getattr(host.area, "dims", 0) or 1
    return torch.rms_norm(x, x.shape[x.ndim - dims :], weight, host.eps)


def _rms_of_maps(host: Any, x: Tensor) -> Tensor:
    """Divide `(N, C, *)` by the root mean square of an example, or of a position; torch's kernel would copy them."""
    if type(host.area) is Layer:
        return cast(Tensor, host._composed(x, 1, None))
    weight, _ = _parameters(host)
    z = x.float() if x.dtype in {torch.float16, torch.bfloat16} else x
    square = torch.linalg.vector_norm(z, dim=1, keepdim=True).square() / x.shape[1]
    y = (z * (square + host.eps).rsqrt()).to(x.dtype)
    return y if weight is None else scale_shift(y, weight.unsqueeze(0), None)


def suits(x: Tensor, weight: Tensor | None) -> bool:
    """Tell whether torch's kernels take this input: parameters of its type, or of float32 beside a half type."""
    if weight is None or weight.dtype == x.dtype:
        return True
    return weight.dtype == torch.float32 and x.dtype in {torch.bfloat16, torch.float16}
