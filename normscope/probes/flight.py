"""Flight recorder: size of each parameter tensor, of its gradient and its update at every step, without module hooks.

A ring of the last `RING` steps on each device, four float32 a tensor and step, filled by foreach kernels without
synchronization and copied to the host in one go. Of a large tensor all but the gradient is estimated
from a fixed sample of its entries.
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

SAMPLE = 1 << 14  # entries of a tensor that are looked at, at most; the gradient's norm is always of all
_LINE = 256  # of these lie beside each other
# what the ring holds of a tensor, in this order
_LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gradient", ("norm", "rms_t")),
    ("update", ("norm",)),
    ("value", ("norm",)),
)
_QUANTITIES = sum(len(stats) for _, stats in _LAYERS)
_ABSENT = -1.0
_PLAIN = (torch.Tensor, nn.Parameter)
_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)  # others are kept in float32
_LEAST = float(np.finfo(np.float32).tiny)
_MOMENTS = ("exp_avg_sq", "square_avg")  # of the Adam family, of RMSprop and Adadelta
_DECAYS = ("alpha", "rho")  # of the moment, where there are no betas


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
    Squares are summed in float32: norms beyond 1e19 are infinite, below 1e-22 zero. A tensor that cannot be copied is
    left out.

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
        self._labels = {id(o): optimizers.label(o, self._optimizers) for o in self._optimizers}
        self._names = {id(parameter): name for name, parameter in named.items()}
        self._parts: dict[int, tuple[object, list[tuple[_Part, _Flat]]]] = {}
        self._rates: dict[int, dict[str, float]] = {}  # by step
        self._done: dict[int, dict[int, list[_Part]]] = {}  # by step and optimizer
        self._leaving: dict[int, _Part] = {}

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Note the learning rates and copy the weights that are looked at."""
        rates = self._rates.setdefault(step, {})
        name = self._labels[id(optimizer)]
        rates |= {f"{name}/group{i}": _number(group.get("lr")) for i, group in enumerate(optimizer.param_groups)}
        held = [p for group in optimizer.param_groups for p in group["params"]]
        held = [p for p in held if id(p) in self._names and not is_lazy(p)]
        key = [(id(p), p.device, p.dtype, p.shape) for p in held]
        known, parts = self._parts.get(id(optimizer), (None, []))
        if key != known:
            parts = self._divided(held)
            self._parts[id(optimizer)] = key, parts
        for part, looked in parts:
            looked.copy(0, part.parameters)
            part.gradients = None

    @torch.no_grad()
    def gradients(
        self, optimizer: torch.optim.Optimizer, scale: torch.Tensor | None, known: Mapping[int, torch.Tensor]
    ) -> tuple[list[torch.Tensor], set[int]]:
        """Measure the gradients.

        Args:
            optimizer: the optimizer whose parameters they are of.
            scale: loss scale that a fused optimizer undoes itself, None where gradients are as they should be.
            known: squared norms that were measured already, by id of the parameter, not divided by the scale.

        Returns:
            Squared norms of some gradients together, not divided by the scale, and the ids of the parameters that they
            are of.
        """
        squares, covered = [], set()
        for part, _ in self._mine(optimizer):
            having = [(i, g) for i, p in enumerate(part.parameters) if (g := p.grad) is not None]
            if not having:
                continue
            columns, held = zip(*having, strict=True)
            ids = [id(part.parameters[i]) for i in columns]
            if part.shares is None and known.keys() >= set(ids):
                norms = torch.stack([known[i] for i in ids]).sqrt_().float()
            else:
                tensors = [g if type(g) in _PLAIN and not g.is_sparse else dense_values(g) for g in held]
                norms = torch.stack(torch._foreach_norm(tensors, 2, sum_dtype(tensors[0]))).float()
            weighted = norms if part.shares is None else norms * part.shares[part.places(columns)]
            squares.append(torch.dot(norms, weighted))
            covered |= set(ids)
            part.gradients = part.row(columns, norms if scale is None else norms / scale.to(norms.device))
        return squares, covered

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Measure what the step has changed, the weights, and how well second moments fit the gradients.

        An optimizer that undoes a loss scale itself leaves gradients without it.
        """
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for part, looked in self._mine(optimizer):
            looked.copy(1, part.parameters)
            looked.both[0].sub_(looked.both[1])
            sizes = looked.norms(0, 1)
            gradients = part.absent if part.gradients is None else part.gradients
            rms_t = part.row(*_rms_t(part, looked, list(_second_moments(optimizer, part, groups))))
            torch.cat((gradients, rms_t, sizes), out=part.ring[step % RING].view(-1))
        self._done.setdefault(step, {})[id(optimizer)] = [part for part, _ in self._mine(optimizer)]

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

    def _mine(self, optimizer: torch.optim.Optimizer) -> list[tuple[_Part, _Flat]]:
        return self._parts.get(id(optimizer), (None, []))[1]

    @torch.inference_mode(False)  # what is made here is written into later
    @torch.no_grad()
    def _divided(self, held: Sequence[nn.Parameter]) -> list[tuple[_Part, _Flat]]:
        """Put parameters of one device and type together."""
        alike: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for parameter in filter(_can_be_copied, held):
            alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        found = []
        for some in alike.values():
            looked = _Flat(some)
            found.append((_Part(some, [self._site(self._names[id(p)]) for p in some], looked.sizes), looked))
        return found


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

    def __init__(self, parameters: Sequence[nn.Parameter], sites: Sequence[str], looked: Sequence[int]) -> None:
        self.parameters, self.device = tuple(parameters), parameters[0].device
        self.layout = tuple((site, FLIGHT, role, stats) for site in sites for role, stats in _LAYERS)
        self.ring = torch.empty(RING, _QUANTITIES, len(parameters), dtype=torch.float32, device=self.device)
        self.absent = torch.full((len(parameters),), _ABSENT, dtype=torch.float32, device=self.device)
        self.gradients: torch.Tensor | None = None  # what the next row of the ring holds of them
        held = np.array([ranks.local(p).numel() for p in parameters], float)
        self.entries = np.maximum(looked, 1.0)
        self.stretch = np.sqrt(np.maximum(held, 1) / self.entries)
        shares, sizes = [ranks.share(p) for p in parameters], [max(p.numel(), 1) for p in parameters]
        self.weights = np.tile(np.array(shares), (_QUANTITIES, 1))
        self.weights[1] *= held / np.array(sizes)  # a mean: of the parts of a tensor each counts as it is large
        sharded = any(ranks.is_sharded(p) for p in parameters)
        self.shares = torch.tensor(shares, dtype=torch.float32, device=self.device) if sharded else None

    def row(self, columns: Sequence[int], values: torch.Tensor | None) -> torch.Tensor:
        """Return a row of the ring with values in some columns, and in the others that nothing was measured."""
        if values is None or len(columns) == len(self.parameters):
            return self.absent if values is None else values
        return self.absent.index_copy(0, self.places(columns), values)

    def places(self, columns: Sequence[int]) -> torch.Tensor:
        """Return an index of columns on the device, without waiting for it."""
        return torch.tensor(columns).to(self.device, non_blocking=True)

    def rows(self, steps: Sequence[int]) -> torch.Tensor:
        """Return the rows of some steps, [k, quantities, tensors]."""
        return self.ring[torch.tensor([step % RING for step in steps], device=self.device)]

    def finished(self, rows: np.ndarray) -> np.ndarray:
        """Return rows [k, quantities, tensors] as [k, tensors * quantities], those of the sample as of all entries."""
        rows = np.where(rows == _ABSENT, np.nan, np.where(np.isfinite(rows), rows, np.inf))
        rows[:, 1] /= np.sqrt(self.entries)
        rows[:, 2:] *= self.stretch
        return rows.transpose(0, 2, 1).reshape(len(rows), -1)


class _Flat:
    """Two copies of what is looked at of some tensors, each in one piece: few operations serve all of them.

    First of weights before a step and after it, then of gradients and second moments. Of a tensor beyond `SAMPLE`
    entries every k-th line of `_LINE` of them is looked at, k odd; where its memory has another order than its
    indices, every k-th row (first index). Half precision is kept in float32.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        held = [ranks.local(x) for x in tensors]
        self._strides = [_stride(x) for x in held]
        seen = [_thin(x, stride) for x, stride in zip(held, self._strides, strict=True)]
        self.sizes = [x.numel() for x in seen]
        dtype = held[0].dtype if held[0].dtype in _WIDE else torch.float32
        self.both = torch.empty(2, sum(self.sizes), dtype=dtype, device=held[0].device)
        self.places = [
            [place.view(x.shape) for place, x in zip(flat.split(self.sizes), seen, strict=True)] for flat in self.both
        ]

    def copy(self, which: int, tensors: Sequence[torch.Tensor], columns: Sequence[int] | None = None) -> None:
        """Fill the first (0) or second (1) copy, of all tensors or of those of some columns."""
        chosen = range(len(self._strides)) if columns is None else columns
        held = [x if type(x) in _PLAIN else ranks.local(x) for x in tensors]
        seen = [_thin(x, self._strides[i]) for i, x in zip(chosen, held, strict=True)]
        torch._foreach_copy_([self.places[which][i] for i in chosen], seen)

    def norms(self, *which: int) -> torch.Tensor:
        """Return the norm of each tensor in some of the copies, [copies * tensors]."""
        places = [place for i in which for place in self.places[i]]
        return torch.stack(torch._foreach_norm(places)).float()


class _Moment(NamedTuple):
    """A second moment: column of its tensor, the gradient, the moment, and its settings."""

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
        if not isinstance(state, dict) or gradient is None or gradient.is_sparse or gradient.is_complex():
            continue
        moment = next((state[name] for name in _MOMENTS if isinstance(state.get(name), torch.Tensor)), None)
        if moment is None or moment.shape != parameter.shape or "step" not in state:
            continue
        if type(moment) in _PLAIN or ranks.is_sharded(moment):  # not one that is kept in eight bits
            group = groups[id(parameter)]
            betas: Sequence[Any] = group.get("betas") or ()
            beta = betas[1] if len(betas) > 1 else next((group[name] for name in _DECAYS if name in group), None)
            eps = _number(group.get("eps"))  # of some optimizers two numbers that mean another thing
            small = max(eps**2, _LEAST) if eps == eps else _LEAST
            yield _Moment(i, gradient, moment, state["step"], max(_number(beta), 0.0), small)


def _rms_t(part: _Part, looked: _Flat, known: Sequence[_Moment]) -> tuple[Sequence[int], torch.Tensor | None]:
    """Return the norm of g / sqrt(max(v, eps^2)), freed of the moment's bias, and the columns of the tensors."""
    if not known:
        return (), None
    columns = [item.column for item in known]
    looked.copy(0, [item.gradient for item in known], columns)
    looked.copy(1, [item.moment for item in known], columns)
    gradients, roots = looked.both
    bias = _bias(known)
    if isinstance(bias, torch.Tensor):
        least = torch.tensor([item.least for item in known], dtype=torch.float32).to(part.device, non_blocking=True)
        for column, floor in zip(columns, (least * bias).clamp_min_(_LEAST), strict=True):
            looked.places[1][column].clamp_min_(floor)
    else:
        floors = [max(item.least * b, _LEAST) for item, b in zip(known, bias, strict=True)]
        lowest = min(floors)
        roots.clamp_min_(lowest)
        for column, floor in zip(columns, floors, strict=True):
            if floor > lowest:
                looked.places[1][column].clamp_min_(floor)
        bias = torch.tensor(bias, dtype=torch.float32).to(part.device, non_blocking=True)
    roots.rsqrt_().mul_(gradients)
    norms = looked.norms(1)
    norms = norms if len(known) == len(norms) else norms[part.places(columns)]
    return columns, norms * bias.sqrt()


def _bias(known: Sequence[_Moment]) -> torch.Tensor | list[float]:
    """Return 1 - beta^t of each second moment, to its last digits: numbers, or on the device that counts the steps."""
    rates = [math.log(item.beta) if item.beta > 0 else -math.inf for item in known]
    if all(_is_here(item.step) for item in known):  # numbers: a dozen small operations cost more
        return [-math.expm1(float(item.step) * rate) for item, rate in zip(known, rates, strict=True)]
    device = next(item.moment.device for item in known)
    steps = torch.stack([torch.as_tensor(item.step, dtype=torch.float32, device=device) for item in known])
    return -torch.expm1(steps * torch.tensor(rates, dtype=torch.float32).to(device, non_blocking=True))


def _stride(x: torch.Tensor) -> int:
    """Return how many lines lie between two that are looked at; 1 for all of a tensor, negative for its rows."""
    if x.numel() <= SAMPLE:
        return 1
    stride = -(-x.numel() // SAMPLE)
    return stride | 1 if x.is_contiguous() else -stride


def _thin(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Return what is looked at of a tensor, a view where its memory allows."""
    if stride == 1:
        return x
    if stride < 0:
        return x[::-stride]
    x = x if x.is_contiguous() else x.contiguous()  # a gradient whose memory has another order
    return x.as_strided((-(-(x.numel() // _LINE) // stride), _LINE), (stride * _LINE, 1))


def _can_be_copied(x: torch.Tensor) -> bool:
    """Tell whether a tensor has values that can be read, whatever its class and layout."""
    try:
        _Flat([x]).copy(0, [x])
    except Exception:  # of classes that others have written
        return False
    return not x.is_meta


def _is_here(number: Any) -> bool:
    """Tell whether a number can be read without waiting for a device."""
    return not isinstance(number, torch.Tensor) or number.device.type == "cpu"


def _number(setting: Any) -> float:
    """Return a setting of an optimizer; NaN where it is no number, or would have to be fetched from a device."""
    if not _is_here(setting):
        return float("nan")
    try:
        return float(setting)
    except (TypeError, ValueError):
        return float("nan")
