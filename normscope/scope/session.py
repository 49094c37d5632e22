"""Session: one attachment at work: which step it is, what is sampled and written; never the cause of a stop."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from normscope.core.earlier import Earlier
from normscope.core.errors import StoreError, Unmeasurable
from normscope.core.schedule import FLIGHT, RING, is_rare, is_sampled, keeps_arrays
from normscope.core.site import Site
from normscope.core.store import Store
from normscope.linalg.problem import Problem
from normscope.norms.recognize import NormParts
from normscope.probes import flight, hooks, layout, optimizers, ranks, structure, summary, tokens
from normscope.probes.activations import Activations, Measured, on_host
from normscope.probes.attention import Attention
from normscope.probes.factors import MOST_HELD, Factors
from normscope.probes.flight import Flight, FlightStep
from normscope.probes.joining import Item
from normscope.probes.normalization import MAX_CHANNELS, Normalization
from normscope.probes.parameters import Parameters, squared_norm
from normscope.probes.placement import Placement
from normscope.probes.ranks import Ranks
from normscope.probes.snapshots import ENDS, RARE, SNAPSHOTS, Held
from normscope.probes.stream import Stream
from normscope.probes.transfer import to_host
from normscope.scope import together
from normscope.scope.trigger import Trigger

log = logging.getLogger("normscope")

PROBES = (
    *("moments", "tails", "parameters", "flight", "normalization", "attention", "covariance"),
    *SNAPSHOTS,
)
ON_REQUEST = ("correlation", "patches")  # beside "covariance": d^2 values a layer; k^2 times as many features
SUBJECTS: Mapping[str, tuple[str, ...]] = {  # in the order in which they are told, with their probes
    "propagation": ("moments", "tails", "normalization"),
    "attention": ("attention", "normalization"),
    "conditioning": ("covariance",),
    "curvature": ("curvature",),
    "scale": ("parameters", "invariance"),
    "noise": ("normalization", "noise", "noise-scale"),
    "mismatch": ("normalization", "population"),
}
T = TypeVar("T")
_PATIENCE = 100  # repeated steps of one optimizer before the others are asked for
_FLUSH_STEPS = RING  # contexts of steps that wait for a sampled step at most
_GIVE_UP_ROWS = 500_000  # rows that wait for a full disk before they are dropped
_UNHEARD = "no activation: no watched module ran as a module with gradient"
_COMPILED = (
    "the model runs compiled, where no hook fires: parameters, gradients, updates, gains and running statistics are "
    "recorded, activations are not"
)


class Session:
    """Watches a training run for the hooks; see `normscope.probes.hooks.Watcher`.

    Args:
        modules: the watched modules, by name.
        norms: normalization layers among them.
        named: watched parameters, by name.
        stepped: the optimizers whose steps together are one step.
        store: where the record goes.
        every: a step is sampled if its index is a multiple.
        probes: names of the probes that run.
        problem: held data, or None.
        scaler: the gradient scaler, or None.
        reduction: how the loss joins samples, "mean" or "sum".
        earlier: what the store holds of the run that goes on, None if it begins.
        among: the ranks that train the model together, None where this process trains it alone.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        norms: Mapping[str, NormParts],
        named: Mapping[str, nn.Parameter],
        stepped: Sequence[torch.optim.Optimizer],
        store: Store,
        *,
        every: int,
        probes: Sequence[str],
        problem: Problem | None,
        scaler: Any,
        reduction: str = "mean",
        earlier: Earlier | None = None,
        among: Ranks | None = None,
    ) -> None:
        """Set the first step up as sampled; see the class."""
        self.store, self.every, self.problem, self.scaler = store, every, problem, scaler
        self._norms, self._optimizers, self._named = norms, tuple(stepped), named
        self._probes = set(probes)
        self._mean = reduction == "mean"
        asked = ("correlation" in self._probes, "patches" in self._probes)
        self._factors = Factors(every, self._mean, *asked, most=MOST_HELD if stepped else math.inf)
        self._activations = Activations(
            norms, self._probes, self._factors, self._on_site, self.fail, self._begin_backward
        )
        self._attention = Attention(modules, self._probes, self._on_site, self.fail)
        self._placement = Placement(norms, self._probes, self._on_site, self.fail)
        self._parameters = Parameters(named, self._optimizers, self._on_site)
        self._flight = Flight(named, self._optimizers, self._parameters.site)
        self._normalization = Normalization(norms, modules, self._on_site)
        self._stream = Stream()
        self._forward_batch = 0  # samples in the last forward pass of training
        self._trained = 0  # samples in all of them
        self._mine: set[str] = set()  # sites of the user's own numbers
        self._ends: set[str] = set()  # sites of the whole model that the record knows
        self._sites = {} if earlier is None else dict(earlier.sites)  # of the run before it was resumed
        self._order = len(self._sites)
        self._samples = 0 if earlier is None else earlier.samples
        self._sampled_at: int | None = None
        self._taken: set[str] = set()  # snapshots of the last sampled step that have found something
        self._unheard = False  # whether a sampled step without any forward hook was reported
        self._latest: tuple[int, list[tuple[str, summary.Row]]] | None = None
        self._failed_commits = 0
        self._rows: dict[int, dict[str, Any]] = {}
        self._last_row: dict[str, Any] | None = None
        self._told: set[str] = set()  # of the step just finished
        self._telling: set[str] = set()  # of the step in progress
        self._root_runs = False
        self._judged_inside = False
        self._repeats = 0  # steps of one optimizer while another was waited for
        self._process = os.getpid()
        self._scale = self._loss_scale()
        self.step = 0 if earlier is None else earlier.step
        self._trigger = Trigger(self.step)
        self._flown: list[FlightStep] = []  # steps of the flight recorder that wait to be written
        self.active = False
        self._synchronized = {name for name in norms if structure.is_synchronized(modules[name])}
        self._together = together.Together(among or Ranks(), self._parameters.sharded, self._note)
        self._begin_step()
        if self._together.size > 1 and problem is not None:
            self._hold_alone(problem)
        if earlier is not None:
            self.store.event(self.step, "resumed", "", f"resumed: recorded before are {self.step} steps")

    # ---- what the hooks report -------------------------------------------------------------------------------------

    def on_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> None:
        """Begin a forward pass of the model: batch size, and whether the scaler skipped the step before."""
        try:
            if not torch.is_grad_enabled() or self._suspended or self.forked:
                return
            self._see_skip()
            self._forward_batch = layout.batch_size(args, kwargs)
            self._trained += self._forward_batch
            if self.active:
                self._see_batch(layout.first_tensor(args, kwargs))
            self._forwards += 1
            self._root_runs = True
            self._batch[training] += self._forward_batch
            if self.active:
                self._activations.begin_pass()
        except Exception as error:  # the run goes on
            self.fail("moments", "", error)

    def on_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object
    ) -> None:
        """Measure what a module returned."""
        self._see_held()
        self._placement.forward(name, args, kwargs, output)
        try:
            self._activations.forward(name, module, args, kwargs, output)
        except Exception as error:  # the run goes on
            self.fail("moments", name, error)
        self._attention.forward(name, module, args, kwargs, output)

    def before_step(self, optimizer: torch.optim.Optimizer, has_closure: bool) -> None:
        """Read settings and gradients, copy weights; with a closure gradients are read afterwards."""
        if self.forked:
            return
        try:
            self._see_skip()
            if self.active:
                self._settings[id(optimizer)] = optimizers.settings(optimizer, self._optimizers)
                if "parameters" in self._probes:
                    self._parameters.before_step(optimizer)
            self._fly(partial(self._flight.before_step, optimizer, self.step))
            if not has_closure:
                self._read_gradients(optimizer)
        except Exception as error:  # the run goes on
            self.fail("parameters", "", error)

    def after_step(self, optimizer: torch.optim.Optimizer, has_closure: bool) -> None:
        """Measure updates; when every optimizer has stepped, the step ends."""
        if self.forked:
            return
        try:
            if has_closure:
                self._read_gradients(optimizer)
            self._fly(partial(self._flight.after_step, optimizer, self.step))
            if self.active and "parameters" in self._probes:
                self._parameters.after_step(optimizer)
        except Exception as error:  # the run goes on
            self.fail("parameters", "", error)
        self._judged_inside = (
            getattr(optimizer, "found_inf", None) is not None
        )  # a fused optimizer that may have skipped
        self._see_repeat(optimizer)
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._optimizers):
            self._end_step(skipped=False)

    def look(self, holder: torch.optim.Optimizer) -> None:
        """End a step in which nothing was trained; an optimizer that never steps holds what has gradients."""
        try:
            self._read_gradients(holder)
        except Exception as error:  # the look goes on
            self.fail("parameters", "", error)
        self._end_step(skipped=False)

    @property
    def forked(self) -> bool:
        """Whether this is a child process: the record belongs to its parent."""
        return os.getpid() != self._process

    # ---- what the scope asks ---------------------------------------------------------------------------------------

    def annotate(self, values: Mapping[str, Any]) -> None:
        """Add what the user knows to the step just finished, unless the next has begun or it has been told already."""
        known = {name: value for name, value in values.items() if value is not None}
        begun = self._forwards > 0 if self._root_runs else bool(self._told & set(known))
        if self._last_row is None or begun:
            self._telling |= set(known)
            self._row.update(known)
        else:
            self._told |= set(known)
            self._last_row.update(known)
            self._write_again(self._last_row)

    def tell(self, module: str, values: Mapping[str, float]) -> None:
        """Write numbers of the user's own about a module at this step."""
        site = str(Site(module, 0, "mine"))
        if site not in self._sites and site not in self._mine:
            self._mine.add(site)
            self._on_site(site, {"module": module, "call": 0, "slot": "mine"})
        self.store.scalars(self.step, site, "train", "value", tuple(values), np.array([*values.values()]))

    def settle(self) -> None:
        """Wait for the eigenvalues that are being taken, and add them to what waits to be written."""
        for step, row in self._factors.collect(partial(self.fail, "covariance"), settle=True):
            self._write(step, row)

    def flush(self) -> None:
        """Write what waits; a full disk is reported once and tried again at the next sampled step."""
        rows, self._rows = list(self._rows.values()), {}
        flying = together.on_host(rows, self._land(self._flight.waiting) or ())
        flown, self._flown = [*self._flown, *(self._land(partial(self._flight.taken, flying)) or ())], []
        if not self.writes:
            self.store.drop_waiting()
            return
        for item in flown:
            self.store.series(item.step, item.layout, item.values)
        for row in rows:
            told = {name: optimizers.known(value) for name, value in row.items()}
            self.store.step(told)
            self._trigger.see(told["step"], told["loss"], told["grad_norm"])
        for first, last in self._trigger.passed(rows[-1]["step"]) if rows else ():
            self.store.forget(FLIGHT, first, last)
        try:
            self.store.commit()
            self._failed_commits = 0
        except StoreError as error:
            self._failed_commits += 1
            if self._failed_commits == 1:
                log.warning("normscope cannot write and keeps the record in memory for now: %s", error)
            if self.store.waiting > _GIVE_UP_ROWS:
                log.warning("normscope stops recording: %d rows cannot be written.", self.store.waiting)
                self.store.drop_waiting()
                self._probes.clear()

    def finish(self, measure: bool) -> None:
        """Write the latest full arrays, and a last snapshot of the held batches unless the run broke off."""
        if not measure:  # the other ranks may be anywhere
            self._together.leave()
        try:
            self._see_skip()
            self.active = False
            self._activations.discard()
            self._exchange((), ends=True)
            if self._sampled_at is not None:
                step, rows = self._latest or (self._sampled_at, [])
                due = set(SNAPSHOTS) if self._latest else RARE - self._taken
                fresh = self._snapshots(due, ends=True) if measure else []
                self._learn_ends([row for _, row in fresh])
                for phase, row in fresh:
                    self.store.scalars(step, row.site, phase, row.role, row.stats, row.values)
                for phase, row in [*rows, *fresh]:
                    self._write_arrays(step, phase, row)
            self.settle()
            for step, row in self._factors.last():
                self._write_arrays(step, "train", row)
        except Exception as error:  # the record so far is worth more than its last arrays
            self.fail("population", "", error)
        try:
            self.store.end()
            self.flush()
        except Exception as error:  # as a device that was lost: the user's own error matters more
            log.warning("normscope could not write its last steps: %s", error)
        if self.store.waiting:
            log.warning("normscope lost %d rows that could not be written.", self.store.waiting)

    def fail(self, probe: str, site: str, error: Exception) -> None:
        """Switch a probe off and say so, once."""
        if probe not in self._probes:
            return
        self._probes.discard(probe)
        if not self._probes:  # no step is sampled any more
            self._together.leave()
        message = f"{probe}: {type(error).__name__}: {error}"
        log.warning("normscope switched a probe off at step %d, %s: %s", self.step, site or "the model", message)
        self.store.event(self.step, "probe-failed", site, message)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        self._forwards = 0
        self._looked = False  # whether a module has returned in this step
        self._heard = False  # whether a gradient has come back in it
        self._batch = {True: 0, False: 0}
        self._suspended = False
        self._squares: dict[int, list[torch.Tensor]] = {}
        self._stepped: set[int] = set()
        self._settings: dict[int, list[dict[str, Any]]] = {}
        self.active = is_sampled(self.step, self.every) and bool(self._probes)
        self._row: dict[str, Any] = dict.fromkeys(("loss", "grad_norm", "batch_size"))
        if self.active:
            self._factors.begin(self._samples)
        self._row |= {"step": self.step, "sampled": self.active, "loss_scale": self._scale, "skipped": False}

    def _end_step(self, skipped: bool) -> None:
        sampled, self.active = self.active, False
        row = self._row
        row["skipped"] = skipped
        row["batch_size"] = row["batch_size"] or self._batch[True] or self._batch[False] or None
        self._last_row = row
        if self._together.size > 1:
            self._together.hold(row)
        else:
            self._rows[self.step] = row
        self._told, self._telling = self._telling, set()
        try:
            full = max(len(self._rows), self._together.waiting) >= _FLUSH_STEPS
            if sampled:
                self._sample()
            elif full:
                self._exchange(())
            if sampled or full:
                self.flush()
        except Exception as error:  # the run goes on
            for probe in sorted(self._probes):
                self.fail(probe, "", error)
        self._activations.discard()
        self._attention.discard()
        self._placement.discard()
        self._parameters.discard()
        self._stream.discard()
        self.step += 1
        self._begin_step()

    # ---- other ranks -----------------------------------------------------------------------------------------------

    @property
    def writes(self) -> bool:
        """Whether this is the rank that writes the record."""
        return self._together.writes

    def leave(self) -> None:
        """Exchange nothing with other ranks any more, as the program is about to end."""
        self._together.leave()

    def _note(self, message: str) -> None:
        log.warning("normscope: %s", message)
        self.store.event(self.step, "note", "", message)

    def _joins(self, measured: Measured) -> bool:
        """Tell whether a state is that of all ranks: not tokens, nor a batch of which each has its own statistics."""
        apart = measured.probe == "batch" and self._activations.owners[measured.site] not in self._synchronized
        return measured.probe != "tokens" and not apart

    def _exchange(self, offers: Sequence[tuple[str, str, Any, Any]], *, ends: bool = False) -> None:
        """Replace what this rank has, each with key, kind, container and place in it, by what all ranks have."""
        sharded = self._parameters.sharded and self._together.size > 1
        flying = to_host(self._land(self._flight.waiting) or []) if sharded else []
        taken = (self._land(partial(self._flight.taken, flying)) or []) if sharded else []
        sums: list[np.ndarray | None] = [flight.squares(taken)]
        offers = [*offers, ("flight", "sum", sums, 0)] if sharded else offers
        items = [Item(key, kind, held[place]) for key, kind, held, place in offers]
        states, steps = (self._together.finish if ends else self._together.exchange)(self.step, items)
        self._settle_steps(steps)
        for (_, _, held, place), state in zip(offers, states, strict=True):
            held[place] = state
        if taken and sums[0] is not None:
            self._flown += flight.rooted(taken, sums[0])

    def _settle_steps(self, steps: Iterable[dict[str, Any]]) -> None:
        self._rows |= {row["step"]: row for row in steps}

    def _write_again(self, row: dict[str, Any]) -> None:
        if not self._together.holds(row):
            self._rows[row["step"]] = row

    def _hold_alone(self, problem: Problem) -> None:
        """Measure held batches on one rank, where their forward pass needs no other."""
        apart = not self._parameters.sharded and not self._synchronized
        self.problem = problem.alone() if apart else None
        if not apart and self.writes:
            names = sorted(self._probes & set(SNAPSHOTS))
            why = "parameters are sharded" if self._parameters.sharded else "normalization layers are synchronized"
            self._note(f"problem is not used, as {why}: a forward pass needs every rank. Left out: {', '.join(names)}")

    def _see_repeat(self, optimizer: torch.optim.Optimizer) -> None:
        """Say once that steps do not end because another optimizer does not step."""
        self._repeats = self._repeats + 1 if id(optimizer) in self._stepped else 0
        if self._repeats == _PATIENCE:
            waited = [optimizers.label(o, self._optimizers) for o in self._optimizers if id(o) not in self._stepped]
            message = (
                f"step {self.step} does not end: {', '.join(waited)} has not stepped; attach those that step together"
            )
            log.warning("normscope: %s", message)
            self.store.event(self.step, "note", "", message)

    def _see_skip(self) -> None:
        """Close the step before as skipped if the scaler has lowered its scale since: it lowers it only then."""
        if self.scaler is None:
            return
        scale, before = self._loss_scale(), self._scale
        if scale is not None and before is not None and scale < before:
            if self._judged_inside and self._last_row is not None and not self._stepped:
                self._last_row["skipped"] = True
                self._write_again(self._last_row)
            else:
                self._end_step(skipped=not self._stepped)
        self._judged_inside = False
        self._scale = self._row["loss_scale"] = scale

    def _loss_scale(self) -> float | None:
        return None if self.scaler is None else float(self.scaler.get_scale())

    def _read_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # set only while a fused optimizer undoes the scale itself
        found: Mapping[int, torch.Tensor] = {}
        if self.active and "parameters" in self._probes:
            found = self._parameters.gradients(optimizer, scale, keeps_arrays(self._samples))
        seen = self._fly(partial(self._flight.gradients, optimizer, scale, found))
        known, covered = seen or (list(found.values()), set(found))
        held = (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        grads = (p.grad for p in held if id(p) not in covered)
        squares = squared_norm(grads, known, self._parameters.weight)
        if scale is not None:
            squares = [square / scale.to(square.device).square() for square in squares]
        self._squares[id(optimizer)] = squares  # of its last step, where it steps more often than the others
        if self._row["grad_norm"] is None or isinstance(self._row["grad_norm"], list):
            self._row["grad_norm"] = [square for some in self._squares.values() for square in some]

    def _see_held(self) -> None:
        """Look at which gradients there are as the first module of a step returns."""
        if not self._looked and "parameters" in self._probes:
            self._looked = True
            try:
                self._parameters.see_held()
            except Exception as error:  # the run goes on
                self.fail("parameters", "", error)

    def _begin_backward(self) -> None:
        """Look for gradients that the step before has left, at the first backward pass of a step."""
        if not self._heard and "parameters" in self._probes:
            self._heard = True
            try:
                self._parameters.see_left()
            except Exception as error:  # the run goes on
                self.fail("parameters", "", error)

    def _see_batch(self, x: torch.Tensor | None) -> None:
        """Look at the batch of a forward pass, and at the gradient that passes before it in the step have left."""
        if "noise" not in self._probes:
            return
        try:
            self._stream.see_batch(x)
            if self._forwards and self._activations.after_backward and self._together.size == 1:
                held = (p.grad for o in self._optimizers for group in o.param_groups for p in group["params"])
                self._stream.see_gradient(squared_norm(g for g in held if g is not None))
        except Exception as error:  # the run goes on
            self.fail("noise", "", error)

    # ---- finalization of a sampled step ----------------------------------------------------------------------------

    def _sample(self) -> None:
        with np.errstate(all="ignore"):  # a diverged run holds infinities
            rows = [("train", row) for row in self._measured_rows()]
        self._samples += 1
        self._sampled_at, self._taken = self.step, set()
        keep = keeps_arrays(self._samples - 1)
        if keep:
            rows += self._snapshots(self._due(), ends=self._samples == 1)
        self._learn_ends([row for _, row in rows])
        for phase, row in rows:
            self.store.scalars(self.step, row.site, phase, row.role, row.stats, row.values)
            if keep:
                self._write_arrays(self.step, phase, row)
        self._latest = None if keep else (self.step, rows)
        for step, row in self._factors.collect(partial(self.fail, "covariance"), settle=False):
            self._write(step, row)
        for settings in self._settings.values():
            for group in settings:
                self.store.group({"step": self.step, **group})

    def _fly(self, act: Callable[[], T]) -> T | None:
        """Let the flight recorder do something, if it is on."""
        return self._land(act) if "flight" in self._probes else None

    def _land(self, act: Callable[[], T]) -> T | None:
        """Let the flight recorder hand over what it has, also once it was switched off."""
        try:
            return act()
        except Exception as error:  # the run goes on
            self.fail("flight", "", error)
        return None

    def _write(self, step: int, row: summary.Row) -> None:
        self.store.scalars(step, row.site, "train", row.role, row.stats, row.values)
        for stat, array in row.arrays.items():
            self.store.array(step, row.site, "train", row.role, stat, array)

    def _write_arrays(self, step: int, phase: str, row: summary.Row) -> None:
        for stat, array in row.arrays.items():
            if len(array) <= MAX_CHANNELS:
                self.store.array(step, row.site, phase, row.role, stat, array)

    def _measured_rows(self) -> list[summary.Row]:
        measured, calls, running = self._activations.collect()
        for site, message in self._activations.notes:
            self.store.event(self.step, "note", site, message)
        self._activations.notes.clear()
        if self._activations.blind and "normalization" in self._probes:
            running = self._normalization.running()
        if self._activations.blind and "moments" in self._probes and not self._unheard:
            self._unheard = True
            self._tell_unheard()
        vectors = self._normalization.vectors() if "normalization" in self._probes else {}
        parts = {site for site, vector in vectors.items() if ranks.is_sharded(vector)}
        vectors |= {site: ranks.spread(vectors[site], ranks.local(vectors[site])) for site in parts}
        found = self._parameters.states()
        drawn, attended = self._stream.states(), self._attention.states()
        tensors = [t for m in measured for t in m.tensors] + [item.state for item in found]
        host = iter(to_host([*tensors, *vectors.values(), *running.values(), *drawn, *attended]))
        states = on_host(measured, host)
        values: list[Any] = [next(host) for _ in found]
        whole: dict[str, Any] = {site: next(host) for site in vectors}
        kept = {name: next(host) for name in running}
        seen = [next(host) for _ in drawn]
        scores = [next(host) for _ in attended]
        if self._together.size > 1:
            offers: list[tuple[str, str, Any, Any]]
            offers = [(m.key, m.kind, states, i) for i, m in enumerate(measured) if self._joins(m)]
            offers += [(item.key, "sum", values, i) for i, item in enumerate(found) if item.sharded]
            offers += [(site, "sum", whole, site) for site in sorted(parts)]
            offers += [("batch", "moments", seen, i) for i in range(len(seen))]
            self._exchange(offers)
            if not self.writes:
                return []
        rows = self._stream.rows(seen) + self._attention.rows(scores)
        for probe in ("moments", "tails"):
            here = [(m, state) for m, state in zip(measured, states, strict=True) if m.probe == probe]
            sites = [(m.site, m.role) for m, _ in here]
            rows += summary.summarize(probe, sites, [state for _, state in here], self._gradient_scale)
        whole = {site: vector for site, vector in whole.items() if vector is not None}
        rows += self._parameters.rows(values, {site: v for site, v in whole.items() if v.ndim})
        inputs = {m.site: state for m, state in zip(measured, states, strict=True) if m.probe in ("batch", "areas")}
        self._submit(measured, states)
        for name in self._synchronized & calls.keys():
            calls[name].batch *= self._together.size
        rows += tokens.rows((m.site, state) for m, state in zip(measured, states, strict=True) if m.probe == "tokens")
        rows += self._normalization.rows(inputs, self._activations.owners, kept, calls, whole)
        return summary.joined(rows)

    def _tell_unheard(self) -> None:
        """Say that no hook of a module has fired, and whether a compiler is the reason."""
        if hooks.compiled():
            log.warning("normscope: %s. See the finding run.compiled.", _COMPILED)
            self.store.event(self.step, "compiled", "", _COMPILED)
        else:
            self.store.event(self.step, "unmeasured", "", _UNHEARD)

    def _submit(self, measured: Sequence[Measured], states: Sequence[np.ndarray]) -> None:
        pairs = zip(measured, states, strict=True)
        found = [(m.site, m.role, state) for m, state in pairs if m.probe == "covariance"]
        batch = self._row["batch_size"]
        if found:
            self._factors.submit(self.step, found, None if batch is None else float(batch), self._gradient_scale)

    @property
    def _gradient_scale(self) -> float:
        """What gradients of activations are divided by: the loss of all ranks is the mean of their mean losses."""
        return (self._row["loss_scale"] or 1.0) * (self._together.size if self._mean else 1)

    def _due(self) -> set[str]:
        """Return the snapshots of a sampled step that keeps arrays; weights at rest are looked at but once."""
        rare = is_rare(self._samples - 1) and bool(self._optimizers)
        passed_over = set() if self._samples == 1 else ENDS if rare else ENDS | RARE
        return set(SNAPSHOTS) - passed_over

    def _snapshots(self, due: Collection[str], *, ends: bool) -> list[tuple[str, summary.Row]]:
        """Measure the held batches; a snapshot that fails is switched off, the others go on."""
        if self.problem is None or not self.writes:
            return []
        rows: list[tuple[str, summary.Row]] = []
        active, self.active, self._suspended = self.active, False, True
        sizes = self._forward_batch, self._trained
        held = Held(self.problem, self._norms, self._named, *sizes, ends, self._optimizers)
        for name, measure in SNAPSHOTS.items():
            if name in self._probes and name in due:
                try:
                    found = [(phase, row) for phase, some in measure(held).items() for row in some]
                    rows += found
                    self._taken |= {name} if found else set()
                except Unmeasurable as error:
                    self._probes.discard(name)
                    self.store.event(self.step, "note", "", f"{name} cannot be measured here: {error}")
                except Exception as error:  # the run goes on
                    self.fail(name, "", error)
        self.active, self._suspended = active, False
        return rows

    def _learn_ends(self, rows: Iterable[summary.Row]) -> None:
        """Tell the record of the whole model's input and output, where a row is about these."""
        for slot in ("input", "output"):
            site = str(Site("", 0, slot))
            if site not in self._ends and any(row.site == site for row in rows):
                self._ends.add(site)
                if not self._activations.knows("", 0, slot):
                    self._on_site(site, {"module": "", "call": 0, "slot": slot, "class": "model"})

    def _on_site(self, site: str, attributes: dict[str, object]) -> None:
        known = self._sites.get(site)
        self.store.site(site, {**attributes, "order": self._order if known is None else known.get("order")})
        self._order += known is None
        if attributes.get("note"):
            self.store.event(self.step, "unmeasured", site, str(attributes["note"]))
