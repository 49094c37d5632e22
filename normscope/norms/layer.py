"""The normalization layer: area, operation, recovery and population put together."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.affine import folded, scale_shift
from normscope.norms.area import Area, Batch, Group, Instance, Layer, Position
from normscope.norms.average import LOCAL, Across, Average
from normscope.norms.fused import kernel, suits
from normscope.norms.operation import RMS, Operation, Standardize
from normscope.norms.part import Stats, Traits
from normscope.norms.population import Current, Population, Running
from normscope.norms.recognize import NormParts, declare_norm
from normscope.norms.recovery import Affine, Bare, Recovery
from normscope.norms.whiten import Whiten
from normscope.norms.whitening import suits as suits_whitening
from normscope.norms.whitening import whiten

_HALF = (torch.float16, torch.bfloat16)


def in_float(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a forward method compute in float32 where it gets a half type or runs under autocast.

    Args:
        forward: method (self, x, ...) -> tensor.

    Returns:
        The method; its output has the type of x.
    """

    @functools.wraps(forward)
    def wide(self: Any, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        value = x.float() if x.dtype in _HALF else x
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return forward(self, value, *arguments, **named).to(x.dtype)
        return forward(self, value, *arguments, **named).to(x.dtype)

    return wide


class Normalization(nn.Module):
    """Base of every layer here: its repr is its constructor call, and it declares its traits.

    Attributes:
        average: how statistics that cross the batch are averaged, on one process or across ranks.
    """

    average: Average = LOCAL
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    @property
    def traits(self) -> Traits:
        """The declared properties, which choose the laws to be tested."""
        raise NotImplementedError

    def synchronize(self, group: Any = "world") -> None:
        """Take statistics that cross the batch over all ranks, here and in every layer inside.

        Args:
            group: a process group, "world" for the default one, None to go back to one process.
        """
        for module in self.modules():
            if isinstance(module, Normalization) and module.traits.crosses_batch:
                module.average = LOCAL if group is None else Across(None if group == "world" else group)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor that differ from its defaults, read from attributes of their name."""
        found = {}
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name not in {"self", "device", "dtype"} and parameter.kind is not parameter.VAR_KEYWORD:
                value = getattr(self, name)
                if parameter.default is parameter.empty or value != parameter.default:
                    found[name] = value
        return found

    def extra_repr(self) -> str:
        """Write the arguments of the constructor; those without a default are positional."""
        parameters = inspect.signature(type(self).__init__).parameters
        required = {name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.KEYWORD_ONLY}
        return ", ".join(f"{v!r}" if name in required else f"{name}={v!r}" for name, v in self.settings().items())

    def __repr__(self) -> str:
        """Write the constructor call; submodules follow from it."""
        return f"{type(self).__name__}({self.extra_repr()})"


class Norm(Normalization):
    """A normalization as the survey takes it apart.

    y = recovery(area.inverse(operation(area.view(x))))

    Under autocast and for half types the statistics are taken in float32; the output has the type of the input.

    Args:
        area: which entries share statistics.
        operation: what is done with them.
        recovery: what gives the representation back its freedom, None for nothing.
        population: which statistics training and evaluation use, None for those of the input at hand.
        num_features: number of channels; needed where a part has parameters or buffers.
        process_group: take batch statistics over all its ranks; "world" for the default group.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    >>> from normscope.norms import Affine, Batch, Running, Standardize
    >>> Norm(Batch(), Standardize(eps=1e-3), Affine(), Running(), num_features=8)
    Norm(Batch(), Standardize(eps=0.001), recovery=Affine(), population=Running(), num_features=8)
    """

    def __init__(
        self,
        area: Area,
        operation: Operation,
        recovery: Recovery | None = None,
        population: Population | None = None,
        *,
        num_features: int | None = None,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Put the parts together and let them register their parameters and buffers."""
        super().__init__()
        self.area, self.operation = area, operation
        self.recovery = Bare() if recovery is None else recovery
        self.population = Current() if population is None else population
        self.num_features, self.process_group = num_features, process_group
        self.eps: float = getattr(operation, "eps", 0.0)
        if num_features is not None:
            area.rows(num_features)
        with torch.device(device) if device is not None else torch.device(torch.get_default_device()):
            self.recovery.install(self, num_features)
            self.population.install(self, area, operation, num_features)
        self.to(dtype=dtype)
        self._kernel = kernel(area, operation, self.recovery, self.population)
        if process_group is not None:
            self.synchronize(process_group)

    @property
    def traits(self) -> Traits:
        """The declared properties, from those of the parts."""
        operation, pointwise = self.operation, self.recovery.pointwise
        return Traits(
            crosses_batch=self.area.crosses_batch,
            stateful=self.population.stateful,
            centers=operation.centers,
            scales=operation.scales,
            whitens=operation.whitens,
            shift_invariant=(operation.centers or operation.shifts) and pointwise,
            scale_invariant=operation.homogeneous and pointwise,
            ranks=self.area.ranks,
            channels_last=getattr(self.area, "channels", "first") == "last",
            condition=self.recovery.condition,
        )

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor; parts that do nothing are left out."""
        return {name: value for name, value in super().settings().items() if value not in (Bare(), Current())}

    @property
    def momentum(self) -> float | None:
        """Weight of the newest batch in the stored statistics."""
        return getattr(self.population, "momentum", None)

    @property
    def num_groups(self) -> int | None:
        """Number of groups of channels, None where the area has none."""
        return getattr(self.area, "groups", None)

    def measure(self, z: Tensor) -> Stats:
        """Take the statistics of `[areas, features, *samples]`; nothing is stored."""
        return self.operation.measure(z, self.average)

    def statistics(self, x: Tensor) -> Stats:
        """Return the statistics of an input, as training would use them; nothing is stored."""
        return self.measure(self.area.split(x, self.area.axis(x, self.num_features)))

    def forward(self, x: Tensor, condition: Any = None) -> Tensor:
        """Normalize.

        Args:
            x: `(N, C, *)`; layer and position areas also take `(N, *, C)`.
            condition: what the recovery needs besides the input: labels, a style, a map.

        Returns:
            A tensor of the shape and type of x.
        """
        axis = self.area.axis(x, self.num_features)
        if self.training or not self.population.stateful:
            self._check_samples(x, axis)
        if self._kernel is not None and self.average is LOCAL and suits(x, self._parameters.get("weight")):
            return self._kernel(self, x, axis)
        return self._composed(x, axis, condition)

    def _check_samples(self, x: Tensor, axis: int) -> None:
        needed = self.operation.minimum
        if needed > 1 and self.average is LOCAL and (found := self.area.samples(x, axis)) < needed:
            raise ArgumentError(
                f"x of shape {tuple(x.shape)} gives each area of {self.area!r} too few samples, {found}: "
                f"{self.operation!r} needs {needed}; use a larger input, evaluation mode, or another area."
            )

    @in_float
    def _composed(self, x: Tensor, axis: int, condition: Any) -> Tensor:
        area = self.area.stored if self.population.stateful and not self.training else self.area
        z = area.split(x, axis)
        if self._whitens_jointly(z):
            return self._whitened(x, z, axis, condition)
        stats = self.population.choose(self, z)
        # an operation with an apply of its own means that one
        pair = self.operation.coefficients(stats) if type(self.operation).apply is Operation.apply else None
        wide = [v if v is None else area.spread(v, x, axis) for v in pair or ()]
        if pair is None or axis != 1 or any(v is not None and w is None for v, w in zip(pair, wide, strict=True)):
            y = area.merge(self.operation.apply(z, stats), x, axis)
            return self.recovery.apply(self, y, x, axis, condition)
        scale, shift = wide
        if type(self.recovery).apply not in {Recovery.apply, Affine.apply}:
            return self.recovery.apply(self, scale_shift(x, scale, shift), x, axis, condition)
        gains = self.recovery.coefficients(self, x, axis, condition)
        if gains is None:
            return self.recovery.apply(self, scale_shift(x, scale, shift), x, axis, condition)
        return scale_shift(x, *folded(scale, shift, *gains))

    def _whitens_jointly(self, z: Tensor) -> bool:
        if not (self.operation.whitens and self.average is LOCAL and type(self.population) in {Current, Running}):
            return False
        return (self.training or not self.population.stateful) and suits_whitening(z, self.operation)

    def _whitened(self, x: Tensor, z: Tensor, axis: int, condition: Any) -> Tensor:
        """Whiten with the gradient written by hand, the affine map with it."""
        gain = bias = None
        recovery, operation, population = self.recovery, self.operation, self.population
        folds = isinstance(recovery, Affine) and not recovery.shape
        if isinstance(recovery, Affine) and folds:
            one = (1, -1, *(1,) * (x.ndim - 2)) if axis == 1 else (*(1,) * (x.ndim - 1), -1)
            gain, bias = (v if v is None else self.area.split(v.reshape(one), axis) for v in recovery.gain(self))
        cast(Whiten, operation).check(z)
        y, stats = whiten(z, cast(Whiten, operation), gain, bias, examples=self.area.crosses_batch)
        if isinstance(population, Running):
            population.update(self, z, stats)
        y = self.area.merge(y, x, axis)
        return y if folds else recovery.apply(self, y, x, axis, condition)


def _parts_of(module: nn.Module) -> NormParts | None:
    """Tell what a layer of ours consists of, for those that only need to recognize it."""
    kind = _kind(module)
    parts = module if isinstance(module, Norm) else None
    last = getattr(parts.area, "channels", "first") != "first" if parts else False
    own = dict(module.named_parameters(recurse=False))
    return NormParts(
        kind=kind,
        axis=-1 if last and kind in {"layer", "rms"} else 1,
        eps=getattr(module, "eps", None),
        momentum=getattr(module, "momentum", None),
        groups=(getattr(module, "num_groups", None) or 1) if kind == "group" else None,
        has_running={"running_mean", "running_var"} <= dict(module.named_buffers(recurse=False)).keys(),
        gain="weight" if "weight" in own else None,
        bias="bias" if "bias" in own else None,
        gain_offset=getattr(parts.recovery, "offset", 0.0) if parts else 0.0,
        normalized_ndim=(getattr(parts.area, "dims", 0) or 1) if parts and kind in {"layer", "rms"} else 0,
    )


def _kind(module: nn.Module) -> str:
    if not isinstance(module, Norm):
        return "other"
    area = type(module.area)
    if type(module.operation) is RMS and area in {Layer, Position}:
        return "rms"
    if type(module.operation) is not Standardize:
        return "other"
    if area is Layer and getattr(module.area, "channels", "auto") == "first":
        return "group"
    return {Batch: "batch", Instance: "instance", Group: "group", Layer: "layer", Position: "layer"}.get(area, "other")


declare_norm(Normalization, _parts_of)
