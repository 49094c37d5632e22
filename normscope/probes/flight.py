"""Flight recorder: size of each parameter tensor, of its gradient and its update at every step, without module hooks.

A ring of the last `RING` steps on each device, four float32 a tensor and step, filled by foreach kernels without
synchronization and copied to the host in one go. Of a large tensor all but the gradient is estimated
from a fixed sample of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normscope.core.schedule import FLIGHT, RING
from normscope.core.store import Layer
from normscope.probes import optimizers, ranks
from normscope.probes.parameters import dense_values, sum_dtype

SAMPLE = 1 << 14  # entries of a tensor that are looked at, in whole rows; the gradient's norm is always of all
# what the ring holds of a tensor, in this order
_LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gradient", ("norm", "rms_t")),
    ("update", ("norm",)),
    ("value", ("norm",)),
)
_QUANTITIES = sum(len(stats) for _, stats in _LAYERS)
_ABSENT = -1.0
_LEAST = float(np.finfo(np.float32).tiny)
_MOMENTS = ("exp_avg_sq", "square_avg")  # of the Adam family, of RMSprop


class FlightStep(NamedTuple):
    """What was recorded of one step, as the store takes it.

    Attributes:
        step: index of the step.
        layout: site, phase, role and statistics, in the order of `values`.
        values: [n] float64; NaN what was not measured, infinite what was not finite.
        weights: [n]; the squares of the values of all ranks, times these, add up to the square of the whole.
    """

    step: int
    layout: tuple[Layer, ...]
    values: np.ndarray
    weights: np.ndarray


class Flight:
    """Records the parameters of one or several optimizers at every step.

    Of each tensor: the norm of its gradient, as the optimizer gets it; the norms of what the step changes and of the
    weight after it; and RMS_t = sqrt(mean(g^2 / max(v, eps^2))), with v the optimizer's second moment after the step,
    freed of its bias: 1 where the moment fits the gradient, at most 1 / sqrt(1 - beta_2) where it is far too small.

    Source: wortsman2023stable, section 3.4.

    Args:
        named: watched parameters by name.
        stepped: the optimizers.
        site: returns the site of a parameter's name.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        stepped: Sequence[torch.optim.Optimizer],
        site: Callable[[str], str],
    ) -> None:
        """Start with nothing recorded; see the class."""
        self._optimizers, self._site = tuple(stepped), site
        self._names = {id(parameter): name for name, parameter in named.items()}
        self._parts: dict[int, tuple[object, list[_Part]]] = {}
        self._rates: dict[int, dict[str, float]] = {}  # by step
        self._done: dict[int, dict[int, list[_Part]]] = {}  # by step and optimizer
        self._leaving: dict[int, _Part] = {}

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Note the learning rates and copy the weights that are looked at."""
        rates = self._rates.setdefault(step, {})
        name = optimizers.label(optimizer, self._optimizers)
        rates |= {f"{name}/group{i}": _number(group.get("lr")) for i, group in enumerate(optimizer.param_groups)}
        held = [p for group in optimizer.param_groups for p in group["params"]]
        held = [p for p in held if id(p) in self._names and not is_lazy(p)]
        key = [(id(p), p.device, p.dtype, p.shape) for p in held]
        known, parts = self._parts.get(id(optimizer), (None, []))
        if key != known:
            parts = self._divided(held)
            self._parts[id(optimizer)] = key, parts
        for part in parts:
            torch._foreach_copy_(part.before, part.seen)

    @torch.no_grad()
    def gradients(
        self, optimizer: torch.optim.Optimizer, step: int, scale: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], set[int]]:
        """Measure the gradients.

        Args:
            optimizer: the optimizer whose parameters they are of.
            step: index of the step.
            scale: loss scale that a fused optimizer undoes itself, None where gradients are as they should be.

        Returns:
            Squared norms of some gradients together, not divided by the scale, and the ids of the parameters that they
            are of.
        """
        squares, covered = [], set()
        for part in self._mine(optimizer):
            having = [i for i, p in enumerate(part.parameters) if p.grad is not None]
            norms = part.norms([dense_values(g) for i in having if (g := part.parameters[i].grad) is not None])
            if norms is not None:
                square = norms.square()
                squares.append((square if part.shares is None else square * part.shares[having]).sum())
                covered |= {id(part.parameters[i]) for i in having}
                norms = norms if scale is None else norms / scale.to(norms.device)
            part.write(step, 0, having, norms)
        return squares, covered

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, step: int, scale: torch.Tensor | None) -> None:
        """Measure what the step has changed, the weights, and how well second moments fit the gradients."""
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for part in self._mine(optimizer):
            now, every = part.seen, range(len(part.parameters))
            torch._foreach_sub_(part.before, now)
            part.write(step, 2, every, part.norms(part.before))
            part.write(step, 3, every, part.norms(now))
            known = list(_second_moments(optimizer, part, groups))
            part.write(step, 1, [item.column for item in known], _rms_t(part, known, scale))
        self._done.setdefault(step, {})[id(optimizer)] = self._mine(optimizer)

    def waiting(self) -> list[torch.Tensor]:
        """Return what was recorded since the last call of `taken`, on its devices."""
        steps = sorted(self._done)[-RING:]
        self._leaving = {id(part): part for step in steps for some in self._done[step].values() for part in some}
        return [part.rows(steps) for part in self._leaving.values()]

    def taken(self, arrays: Sequence[np.ndarray]) -> list[FlightStep]:
        """Return the steps recorded since the last call.

        Args:
            arrays: what `waiting` has returned, on the host.
        """
        done, self._done, rates, self._rates = self._done, {}, self._rates, {}
        tables = {key: part.finished(x) for (key, part), x in zip(self._leaving.items(), arrays, strict=True)}
        found = []
        for i, step in enumerate(sorted(done)[-RING:]):
            here = [part for some in done[step].values() for part in some]
            lrs = rates.get(step, {})
            layout: list[Layer] = [(site, FLIGHT, "value", ("lr",)) for site in lrs]
            layout += [layer for part in here for layer in part.layout]
            numbers = [np.array(list(lrs.values()), float), *(tables[id(part)][i] for part in here)]
            weights = [np.full(len(lrs), 1 / ranks.world()), *(part.weights.T.ravel() for part in here)]
            found.append(FlightStep(step, tuple(layout), np.concatenate(numbers), np.concatenate(weights)))
        return found

    def _mine(self, optimizer: torch.optim.Optimizer) -> list[_Part]:
        return self._parts.get(id(optimizer), (None, []))[1]

    def _divided(self, held: Sequence[nn.Parameter]) -> list[_Part]:
        """Put parameters of one device and type together."""
        alike: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for parameter in held:
            alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        return [_Part(some, [self._site(self._names[id(p)]) for p in some]) for some in alike.values()]


def squares(steps: Sequence[FlightStep]) -> np.ndarray:
    """Return what adds up over ranks of some steps, flat."""
    parts = [np.square(item.values) * item.weights for item in steps]
    return np.concatenate(parts) if parts else np.empty(0)


def rooted(steps: Sequence[FlightStep], sums: np.ndarray) -> list[FlightStep]:
    """Return the steps with the values of all ranks, from the sums of their `squares`."""
    ends = np.cumsum([len(item.values) for item in steps])
    parts = np.split(np.sqrt(sums), ends[:-1])
    return [item._replace(values=values) for item, values in zip(steps, parts, strict=True)]


class _Part:
    """The tensors of one optimizer on one device and of one type, and their ring [RING, quantities, tensors]."""

    def __init__(self, parameters: Sequence[nn.Parameter], sites: Sequence[str]) -> None:
        self.parameters, self.device = tuple(parameters), parameters[0].device
        self.layout = tuple((site, FLIGHT, role, stats) for site in sites for role, stats in _LAYERS)
        self.ring = torch.empty(RING, _QUANTITIES, len(parameters), device=self.device)
        self.before = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in self.seen]
        self.entries = np.array([max(x.numel(), 1) for x in self.before], float)
        held = np.array([ranks.local(p).numel() for p in parameters], float)
        self.stretch = np.sqrt(np.maximum(held, 1) / self.entries)
        shares, sizes = [ranks.share(p) for p in parameters], [max(p.numel(), 1) for p in parameters]
        self.weights = np.tile(np.array(shares), (_QUANTITIES, 1))
        self.weights[1] *= held / np.array(sizes)  # a mean: of the parts of a tensor each counts as it is large
        sharded = any(ranks.is_sharded(p) for p in parameters)
        self.shares = torch.tensor(shares, device=self.device) if sharded else None

    @property
    def seen(self) -> list[torch.Tensor]:
        """The rows of each tensor that are looked at."""
        return [thin(p) for p in self.parameters]

    def norms(self, tensors: list[torch.Tensor]) -> torch.Tensor | None:
        """Return the norms of some tensors, [n]; half precision is summed in float32."""
        return torch.stack(torch._foreach_norm(tensors, 2, sum_dtype(tensors[0]))).float() if tensors else None

    def write(self, step: int, quantity: int, columns: Sequence[int], values: torch.Tensor | None) -> None:
        """Put values into some columns of a row, and into the others that nothing was measured."""
        row = self.ring[step % RING, quantity]
        if values is not None and len(columns) == len(row):
            row.copy_(values)
            return
        row.fill_(_ABSENT)
        if values is not None:
            row[torch.tensor(columns, device=row.device)] = values

    def rows(self, steps: Sequence[int]) -> torch.Tensor:
        """Return the rows of some steps, [k, quantities, tensors]."""
        return self.ring[torch.tensor([step % RING for step in steps], device=self.device)]

    def finished(self, rows: np.ndarray) -> np.ndarray:
        """Return rows [k, quantities, tensors] as [k, tensors * quantities], those of the sample as of all entries."""
        rows = np.where(rows == _ABSENT, np.nan, np.where(np.isfinite(rows), rows, np.inf))
        rows[:, 1] /= np.sqrt(self.entries)
        rows[:, 2:] *= self.stretch
        return rows.transpose(0, 2, 1).reshape(len(rows), -1)


class _Moment(NamedTuple):
    """A second moment: column of its tensor, the gradient and the moment where they are looked at, and its settings."""

    column: int
    gradient: torch.Tensor
    moment: torch.Tensor
    step: Any
    beta: float
    least: float


def _second_moments(
    optimizer: torch.optim.Optimizer, part: _Part, groups: Mapping[int, Mapping[str, Any]]
) -> Iterator[_Moment]:
    for i, parameter in enumerate(part.parameters):
        state, gradient = optimizer.state.get(parameter), parameter.grad
        if not state or gradient is None or gradient.is_sparse or gradient.is_complex():
            continue
        moment = next((state[name] for name in _MOMENTS if isinstance(state.get(name), torch.Tensor)), None)
        if moment is None or moment.shape != parameter.shape or "step" not in state:
            continue
        group = groups[id(parameter)]
        betas = group.get("betas")
        beta = float(betas[1] if betas is not None else group.get("alpha", 0.0))
        small = max(float(group.get("eps", 0.0)) ** 2, _LEAST)
        coarse = sum_dtype(moment) or moment.dtype
        yield _Moment(i, thin(gradient), thin(moment).to(coarse), state["step"], beta, small)


def _rms_t(part: _Part, known: Sequence[_Moment], scale: torch.Tensor | None) -> torch.Tensor | None:
    """Return the norm of g / sqrt(max(v, eps^2)), freed of the moment's bias, of each tensor."""
    if not known:
        return None
    roots = torch._foreach_clamp_min([item.moment for item in known], [item.least for item in known])
    torch._foreach_rsqrt_(roots)
    torch._foreach_mul_(roots, [item.gradient for item in known])
    norms = part.norms(list(roots))
    assert norms is not None  # there is one at least
    steps = torch.stack([torch.as_tensor(item.step, dtype=torch.float32) for item in known])
    rates = torch.tensor([math.log(item.beta) if item.beta > 0 else -math.inf for item in known], device=steps.device)
    bias = -torch.expm1(steps * rates)  # 1 - beta^t, to its last digits
    norms = norms * bias.sqrt().to(part.device, non_blocking=True)
    return norms if scale is None else norms / scale.to(part.device)


def thin(x: torch.Tensor) -> torch.Tensor:
    """Return every k-th row (first index) of a tensor, so that about `SAMPLE` entries are left; a view."""
    x = ranks.local(x)
    stride = -(-x.numel() // SAMPLE)
    return x[::stride] if stride > 1 else x


def _number(rate: Any) -> float:
    """Return a learning rate; NaN where it would have to be fetched from a device."""
    if isinstance(rate, torch.Tensor) and rate.device.type != "cpu":
        return float("nan")
    try:
        return float(rate)
    except (TypeError, ValueError):
        return float("nan")
