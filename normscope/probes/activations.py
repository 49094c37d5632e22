"""Activations: what the hooks of a sampled step measure, reduced at once, never kept as live tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from normscope.core.site import Site
from normscope.norms.recognize import NormParts, class_name
from normscope.probes import covariance, factors, hooks, layout, moments, noise, normalization, tails, tokens
from normscope.probes.factors import Factors
from normscope.probes.normalization import Calls

MAX_CALLS = 8  # calls of one module in one pass told apart; the rest join the last
_MAX_PASSES = 8  # forward passes of a step kept without a backward; an evaluation loop would pile them up
_PILE = 1 << 16  # values of subsamples that wait to be reduced together

_RELU = (nn.ReLU, nn.ReLU6, nn.Threshold)
_BOUNDS: tuple[tuple[type[nn.Module], tuple[float, float]], ...] = (
    (nn.Tanh, (-1.0, 1.0)),
    (nn.Sigmoid, (0.0, 1.0)),
    (nn.Hardsigmoid, (0.0, 1.0)),
    (nn.Softsign, (-1.0, 1.0)),
)
_MERGES: Mapping[str, Callable[[Any, Any], Any]] = {
    "moments": moments.merge,
    "tails": tails.merge,
    "batch": moments.merge,
    "areas": normalization.merge_areas,
    "tokens": tokens.merge,
    "covariance": covariance.merge,
}

State = torch.Tensor | moments.Moments


class Measured(NamedTuple):
    """A state that a step has left: where, in which role, of which probe."""

    site: str
    role: str
    probe: str
    state: State

    @property
    def key(self) -> str:
        """What it is of, as text."""
        return f"{self.site} {self.role} {self.probe}"

    @property
    def kind(self) -> str:
        """How it is joined with that of other ranks, see `normscope.probes.joining`."""
        return "moments" if self.probe == "batch" else self.probe

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What has to be copied to the host."""
        return self.state[1:] if isinstance(self.state, moments.Moments) else (self.state,)


class Place(NamedTuple):
    """A site that was seen, with what its statistics need."""

    site: str
    axis: int
    bounds: tuple[float, float] | None


class _Output(NamedTuple):
    """An output of this pass: which tensor, where it comes from, and its moments as of a version of its data."""

    tensor: weakref.ref[torch.Tensor]
    site: str
    axis: int
    version: int
    state: moments.Moments | None


class Collected(NamedTuple):
    """What a step has left: states, how normalization layers were called, and their running statistics [2, C]."""

    measured: list[Measured]
    calls: dict[str, Calls]
    running: dict[str, torch.Tensor]


@dataclass
class _Pass:
    """One forward through the model; `live` once a gradient came back through it."""

    calls: dict[int, int] = field(default_factory=dict)
    norms: dict[str, Calls] = field(default_factory=dict)
    running: dict[str, torch.Tensor] = field(default_factory=dict)
    states: dict[tuple[str, str, str], State] = field(default_factory=dict)
    outputs: dict[int, _Output] = field(default_factory=dict)
    before: tuple[torch.Size, int] | None = None
    live: bool = False
    closed: bool = False

    def add(self, site: str, role: str, probe: str, state: State) -> None:
        """Add a state, merged with what the site has already."""
        key = (site, role, probe)
        known = self.states.get(key)
        if known is None:
            self.states[key] = state
        elif _width(known) == _width(state):  # a layer of varying width keeps its first width in a step
            self.states[key] = _MERGES[probe](known, state)

    def absorb(self, other: _Pass) -> None:
        """Take over what another pass has found."""
        for (site, role, probe), state in other.states.items():
            self.add(site, role, probe, state)
        for name, calls in other.norms.items():
            total = self.norms.setdefault(name, Calls())
            total.calls += calls.calls
            total.training, total.batch = calls.training, calls.batch
        self.running |= other.running
        other.close()

    def close(self) -> None:
        """Forget everything; gradients that still come are ignored."""
        self.closed = True
        self.states, self.outputs, self.running = {}, {}, {}


class Activations:
    """Measures the watched modules during a step.

    Args:
        norms: normalization layers among them, by name.
        probes: which of "moments", "tails", "normalization", "covariance" run; a set that shrinks when one fails.
        turns: which linear and convolutional layers have their second moments taken at this step.
        on_site: called with a site and its attributes when it is first seen.
        on_failure: called with (probe, site, error) when one fails.
        on_backward: called when the first gradient comes back through a pass.
    """

    def __init__(
        self,
        norms: Mapping[str, NormParts],
        probes: set[str],
        turns: Factors,
        on_site: Callable[[str, dict[str, object]], None],
        on_failure: Callable[[str, str, Exception], None],
        on_backward: Callable[[], None],
    ) -> None:
        """Start with nothing measured; see the class."""
        self._norms, self._probes, self._turns = norms, probes, turns
        self._on_site, self._on_failure, self._on_backward = on_site, on_failure, on_backward
        self._places: dict[tuple[str, int, str], Place] = {}
        self.owners: dict[str, str] = {}  # of each input site the layer
        self.notes: list[tuple[str, str]] = []  # what a reader of the record should know, by site
        self._joined: set[str] = set()
        self._containers: set[str] = set()
        self._passes: list[_Pass] = []
        self._after_backward = True
        self._calls: dict[str, Calls] = {}
        self._pile: list[tuple[_Pass, str, str, tuple[float, float] | None, torch.Tensor]] = []
        self._piled = 0

    def knows(self, module: str, call: int, slot: str) -> bool:
        """Tell whether a site was seen."""
        return (module, call, slot) in self._places

    @property
    def blind(self) -> bool:
        """Whether no module has reported so far."""
        return not self._places

    @property
    def after_backward(self) -> bool:
        """Whether a gradient has come back since the last forward pass began."""
        return self._after_backward

    def begin_pass(self) -> None:
        """Start a new forward pass: call indices count from 0 again."""
        live, waiting = ([p for p in self._passes if p.live is state] for state in (True, False))
        if len(live) >= _MAX_PASSES:
            self._reduce()
            live[0].absorb(live[1])
            self._passes.remove(live[1])
        if len(waiting) >= _MAX_PASSES:
            self._passes.remove(waiting[0])
        self._passes.append(_Pass())
        self._after_backward = False

    def forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object
    ) -> None:
        """Measure what a module returned, if the forward is one of training."""
        inside = hooks.in_backward()
        parts = self._norms.get(name)
        if not torch.is_grad_enabled():
            if parts is not None:
                self._calls.setdefault(name, Calls()).silent += module.training
            return
        if inside and not self._passes:  # a graph of the step before, which was not sampled
            return
        if self._after_backward and not inside:
            self.begin_pass()
        current = self._passes[-1]
        key = id(module)
        count = current.calls.get(key, 0)
        repeated = inside and count > 0
        if parts is not None:
            self._count(name, module, inside, repeated, current)
        elif not repeated and self._is_container(name, module, current):
            return
        if repeated:
            return
        call = min(count, MAX_CALLS - 1)
        current.calls[key] = count + 1
        if count >= MAX_CALLS and name not in self._joined:
            self._joined.add(name)
            self.notes.append((str(Site(name, call)), f"calls of {name!r} beyond {MAX_CALLS} in a pass are joined"))
        x = layout.first_tensor(args, kwargs)
        if parts is not None and "normalization" in self._probes:
            self._norm(name, call, module, parts, x, current)
        if "covariance" in self._probes and self._turns.wants(name, module):
            self._factor(name, call, module, x, current)
        for slot, tensor in layout.tensors(output):
            place = self._places.get((name, call, slot))
            if place is None:
                place = self._learn(Site(name, call, slot), module, parts, tensor, _source(x, current), current)
            self._output(place, tensor, current)

    def collect(self) -> Collected:
        """Return what the passes that a gradient came back through have found, merged, and forget all passes."""
        self._reduce()
        live = [p for p in self._passes if p.live] or self._passes
        joined = _Pass()
        for item in live:
            joined.absorb(item)
        for name, calls in self._calls.items():
            total = joined.norms.setdefault(name, Calls())
            total.recomputed, total.silent = calls.recomputed, calls.silent
        measured = [Measured(*key, state) for key, state in joined.states.items()]
        found = Collected(measured, joined.norms, joined.running)
        self.discard()
        return found

    def discard(self) -> None:
        """Forget all passes; gradient hooks that still fire are ignored."""
        for item in self._passes:
            item.close()
        self._passes, self._calls, self._pile, self._piled = [], {}, [], 0
        self._after_backward = True

    def _count(self, name: str, module: nn.Module, inside: bool, repeated: bool, current: _Pass) -> None:
        calls = self._calls.setdefault(name, Calls())
        if inside:
            calls.recomputed += module.training
        if repeated:
            return
        if inside and calls.silent:  # reentrant checkpointing: its first forward ran without gradient
            calls.silent -= 1
        here = current.norms.setdefault(name, Calls())
        here.calls += 1
        here.training = module.training

    def _is_container(self, name: str, module: nn.Module, current: _Pass) -> bool:
        if name in self._containers:
            return True
        if module._modules and any(id(m) in current.calls for m in module.modules() if m is not module):
            self._containers.add(name)
            return True
        return False

    def _output(self, place: Place, tensor: torch.Tensor, current: _Pass) -> None:
        if layout.why_unmeasured(tensor):
            return
        current.before = (tensor.shape, place.axis)
        state = self._measure(place, "value", tensor, current)
        version = -1 if tensor.is_inference() else tensor._version  # the data of an inference tensor have none
        current.outputs[id(tensor)] = _Output(weakref.ref(tensor), place.site, place.axis, version, state)
        hooks.on_gradient(tensor, lambda gradient: self._gradient(place, gradient, current))

    def _gradient(self, place: Place, gradient: torch.Tensor, current: _Pass) -> None:
        if not self._after_backward:
            self._on_backward()
        self._after_backward = True
        current.live = True
        if not current.closed and gradient.numel():
            self._measure(place, "gradient", gradient, current)
            if "covariance" in self._probes and self._turns.expects(place.site):
                try:
                    current.add(place.site, "gradient", "covariance", covariance.observe(gradient, place.axis))
                except Exception as error:  # whatever a tensor does, the run goes on
                    self._on_failure("covariance", place.site, error)

    def _measure(self, place: Place, role: str, tensor: torch.Tensor, current: _Pass) -> moments.Moments | None:
        probe, state = "moments", None
        try:
            view = layout.channeled(tensor.detach(), place.axis)
            if "moments" in self._probes:
                state = moments.observe(view)
                current.add(place.site, role, "moments", state)
            probe = "tails"
            if "tails" in self._probes:
                sample = tails.subsample(view)
                self._pile.append((current, place.site, role, place.bounds if role == "value" else None, sample))
                self._piled += sample.numel()
                if self._piled > _PILE:
                    self._reduce()
        except Exception as error:  # whatever a tensor does, the run goes on
            self._on_failure(probe, place.site, error)
        return state

    def _reduce(self) -> None:
        """Reduce the subsamples that wait, those alike side by side: a few operations instead of a few for each."""
        alike: dict[tuple[Any, ...], list[tuple[_Pass, str, str, torch.Tensor]]] = {}
        for current, site, role, bounds, sample in self._pile:
            if not current.closed:
                kind = (len(sample), bounds, sample.dtype, sample.device)
                alike.setdefault(kind, []).append((current, site, role, sample))
        self._pile, self._piled = [], 0
        for (_, bounds, *_), items in alike.items():
            try:
                states = tails.reduce(torch.cat([sample for *_, sample in items], 1), bounds)
                parts = torch.split(states, [sample.shape[1] for *_, sample in items], 1)
                for (current, site, role, _), state in zip(items, parts, strict=True):
                    current.add(site, role, "tails", state)
            except Exception as error:  # whatever a tensor does, the run goes on
                self._on_failure("tails", items[0][1], error)

    def _norm(
        self, name: str, call: int, module: nn.Module, parts: NormParts, x: torch.Tensor | None, current: _Pass
    ) -> None:
        site = str(Site(name, call, "input"))
        try:
            if x is None or layout.why_unmeasured(x):
                return
            if (name, call, "input") not in self._places:
                self._places[name, call, "input"] = Place(site, parts.axis, None)
                self.owners[site] = name
                whitened = noise.whitening(module, x)
                self._on_site(site, {"module": name, "call": call, "slot": "input", "shape": list(x.shape), **whitened})
            current.norms[name].batch = x.shape[0] if x.dim() else 1
            if parts.has_running:
                current.running[name] = normalization.running(module)
            if parts.kind == "batch":
                known = _fresh(x, parts.axis, current)
                state = moments.observe(layout.channeled(x.detach(), parts.axis)) if known is None else known
                current.add(site, "value", "batch", state)
            else:
                seen = normalization.areas(x.detach(), parts, getattr(module, "num_features", None))
                if seen is not None:
                    current.add(site, "value", "areas", seen)
            if tokens.has_tokens(x, parts):
                current.add(site, "value", "tokens", tokens.observe(x))
        except Exception as error:  # whatever a layer does, the run goes on
            self._on_failure("normalization", site, error)

    def _factor(self, name: str, call: int, module: nn.Module, x: torch.Tensor | None, current: _Pass) -> None:
        """Take the second moment of a layer's input, and wait for that of its output's gradient."""
        site = str(Site(name, call, "input"))
        try:
            state = None if x is None else factors.input_of(module, x)
            if x is None or state is None:
                return
            if (name, call, "input") not in self._places:
                axis = factors.axis_of(module, x)
                self._places[name, call, "input"] = Place(site, axis, None)
                attributes = {"module": name, "call": call, "slot": "input", "class": class_name(module)}
                self._on_site(site, attributes | {"shape": list(x.shape), "channels": state.shape[-1]})
            self._turns.expect(Site(name, call), state.shape[-1])
            current.add(site, "value", "covariance", state)
            patched = self._turns.patches_of(module, x)
            if patched is not None:
                self._patches(name, call, module, patched, current)
        except Exception as error:  # whatever a layer does, the run goes on
            self._on_failure("covariance", site, error)

    def _patches(self, name: str, call: int, module: nn.Module, state: torch.Tensor, current: _Pass) -> None:
        site = str(Site(name, call, "patches"))
        if (name, call, "patches") not in self._places:
            self._places[name, call, "patches"] = Place(site, -1, None)
            attributes = {"module": name, "call": call, "slot": "patches", "class": class_name(module)}
            self._on_site(site, attributes | {"channels": state.shape[-1]})
        current.add(site, "value", "covariance", state)

    def _learn(
        self,
        where: Site,
        module: nn.Module,
        parts: NormParts | None,
        tensor: torch.Tensor,
        source: str,
        current: _Pass,
    ) -> Place:
        shape = () if tensor.is_nested else tuple(tensor.shape)
        axis = parts.axis if parts is not None else layout.own_axis(module)
        axis = layout.guessed_axis(shape, current.before) if axis is None else axis
        axis = axis if -len(shape) <= axis < len(shape) else -1
        bounds = _bounds(module)
        note = layout.why_unmeasured(tensor)
        place = self._places[where.module, where.call, where.slot] = Place(str(where), axis, bounds)
        attributes: dict[str, object] = {
            "module": where.module,
            "call": where.call,
            "slot": where.slot,
            "class": class_name(module),
            "shape": list(shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "axis": axis,
            "channels": shape[axis] if len(shape) > 1 else 1,
            "predecessor": source,
            "activation": "bounded" if bounds else "relu" if isinstance(module, _RELU) else "",
            "note": note,
        }
        if parts is not None:
            attributes |= normalization.attributes(parts)
        self._on_site(place.site, attributes)
        return place


def on_host(measured: Sequence[Measured], host: Iterator[np.ndarray]) -> list[np.ndarray]:
    """Return the states as arrays [k, channels].

    Args:
        measured: what a step has left.
        host: the `tensors` of each, copied to the host.

    Returns:
        One array each.
    """
    found = [
        m.state._replace(mean=next(host), var=next(host)) if isinstance(m.state, moments.Moments) else next(host)
        for m in measured
    ]
    states = iter(moments.states([state for state in found if isinstance(state, moments.Moments)]))
    return [next(states) if isinstance(state, moments.Moments) else state for state in found]


def _bounds(module: nn.Module) -> tuple[float, float] | None:
    if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        return float(module.min_val), float(module.max_val)
    return next((bounds for kind, bounds in _BOUNDS if isinstance(module, kind)), None)


def _width(state: State) -> int:
    return len(state.mean) if isinstance(state, moments.Moments) else state.shape[-1]


def _known(x: torch.Tensor | None, current: _Pass) -> _Output | None:
    known = None if x is None else current.outputs.get(id(x))
    return known if known is not None and known.tensor() is x else None


def _source(x: torch.Tensor | None, current: _Pass) -> str:
    """Name the site that produced a tensor in this pass; "" where an operation outside modules did."""
    known = _known(x, current)
    return "" if known is None else known.site


def _fresh(x: torch.Tensor, axis: int, current: _Pass) -> moments.Moments | None:
    """Return the moments taken of this very tensor when it was an output, unless it was changed in place since."""
    known = _known(x, current)
    if known is None or known.state is None or known.version < 0 or known.version != x._version:
        return None
    return known.state if known.axis % x.dim() == axis % x.dim() else None
