"""Laws of an attachment, checked on a case: training is untouched, state is bounded, nothing waits for the device."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch

import normscope as ns
from tests.awkward.base import Case, Job

_WAITS = ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__contains__")


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind: every bit of its state by name, and its scope."""

    state: dict[str, object]
    job: Job
    scope: ns.Scope | None


def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def train(case: Case, every: int | None, steps: int | None = None) -> Outcome:
    """Run a case, watched if `every` is given, and take down all that training has changed."""
    seed()
    job = case.build()
    before = hook_counts(job)
    scope = None
    if every is not None:
        scope = ns.attach(job.model, job.optimizers, every=every, scaler=job.scaler, problem=job.problem)
    try:
        for _ in range(steps or case.steps):
            job.step()
    except Exception as error:
        if case.raises is None or type(error) is not case.raises:
            raise
    else:
        assert case.raises is None or steps is not None
    finally:
        if scope is not None:
            scope.close()
    return Outcome(state_of(job) | {"hooks added": hooks_added(before, hook_counts(job))}, job, scope)


def state_of(job: Job) -> dict[str, object]:
    """Return parameters, buffers, gradients, optimizer states, modes and random states, bit for bit."""
    state: dict[str, object] = {}
    for name, p in job.model.named_parameters(remove_duplicate=False):
        state[f"parameter {name}"] = bits(p)
        state[f"gradient {name}"] = None if p.grad is None else bits(p.grad)
    state |= {f"buffer {name}": bits(b) for name, b in job.model.named_buffers(remove_duplicate=False)}
    state |= {f"training {name}": m.training for name, m in job.model.named_modules(remove_duplicate=False)}
    for number, optimizer in enumerate(job.optimizers):
        state |= {f"optimizer {number} {k}": v for k, v in flat(optimizer.state_dict())}
    if job.scaler is not None:
        state |= {f"scaler {k}": v for k, v in flat(job.scaler.state_dict())}
    state["random of torch"] = bits(torch.get_rng_state())
    state |= {f"random of numpy {k}": v for k, v in flat(dict(enumerate(np.random.get_state())))}
    state["random of Python"] = random.getstate()
    return state


def bits(tensor: torch.Tensor) -> tuple[object, ...]:
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        return "sparse", bits(tensor.indices()), bits(tensor.values())
    return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        yield from flat(dict(enumerate(value)), name)
    elif isinstance(value, torch.Tensor):
        yield name, bits(value)
    elif isinstance(value, np.ndarray):
        yield name, value.tobytes()
    else:
        yield name, value


def hook_counts(job: Job) -> dict[str, int]:
    """Return how many hooks of each sort each module and optimizer has."""
    owners: list[tuple[str, object]] = [
        *job.model.named_modules(),
        *((f"optimizer {i}", o) for i, o in enumerate(job.optimizers)),
    ]
    return {
        f"{name}.{sort}": len(hooks)
        for name, owner in owners
        for sort, hooks in vars(owner).items()
        if "_hooks" in sort and hasattr(hooks, "__len__")
    }


def hooks_added(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: n - before.get(name, 0) for name, n in after.items() if n != before.get(name, 0)}


def check_untouched(case: Case, every: int) -> None:
    """Training is bit-identical with and without, hooks are gone, and no probe has failed."""
    plain, watched = train(case, None), train(case, every)
    differing = [name for name in plain.state | watched.state if plain.state.get(name, 0) != watched.state.get(name, 0)]
    assert not differing
    assert watched.scope is not None
    events = watched.scope.record().events
    assert list(events.loc[events["kind"] == "probe-failed", "message"]) == []


def check_sites(case: Case) -> None:
    """The sites that show that the model was understood are there, and no others of the same modules."""
    scope = train(case, 1).scope
    assert scope is not None
    record = scope.record()
    known = set(record.sites["site"])
    assert [site for site in case.present if site not in known] == []
    assert [site for site in case.absent if site in known] == []
    seen = {block.site for block in record.blocks if block.role == "gradient"}
    assert [site for site in case.gradients if site not in seen] == []
    steps = record.context.drop_duplicates("step")
    assert tuple(steps.loc[steps["skipped"], "step"]) == case.skipped
    assert len(steps) == case.steps - (case.raises is not None)
    if case.finite:
        assert not_finite(record) == []


def not_finite(record: ns.Record) -> list[tuple[str, str]]:
    """List scalars that are NaN or infinite though every tensor was finite; the few that may be undefined excepted."""
    undefined = {"change", "kurtosis", "saturated", "drift", "gap", "batch", "training", "updates", "loss"}
    undefined |= {"cosine", "relative", "radial", "angle"}  # of a bias that is zero
    undefined |= {"rms_t", "damped"}  # without a second moment, or where all of it is zero
    return [
        (block.site, stat)
        for block in record.blocks
        for stat, column in zip(block.stats, block.values.T, strict=True)
        if stat.partition(".")[0] not in undefined
        and not (np.isfinite(column) | (block.phase == "flight") & np.isnan(column)).all()  # NaN: it had no gradient
    ]


def check_bounded(case: Case, steps: int) -> None:
    """The session and the tensors alive are no more after `steps` steps than after 20."""
    seed()
    job = case.build()
    with ns.attach(job.model, job.optimizers, every=1, scaler=job.scaler, problem=job.problem) as scope:
        sizes = []
        for count in (20, steps - 20):
            for _ in range(count):
                job.step()
            gc.collect()
            tensors = sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())
            sizes.append((tensors, held(scope)))
    assert sizes[1][0] <= sizes[0][0]
    assert sizes[1][1] <= sizes[0][1] + 2  # a last row that waits for a note


def held(scope: ns.Scope) -> int:
    """Count the elements of every container that a session and its parts hold; the record itself is elsewhere."""
    session = scope._session
    parts = [part for part in vars(session).values() if type(part).__module__.startswith("normscope.")]
    containers = [v for owner in (session, *parts) for v in vars(owner).values() if isinstance(v, (dict, list, set))]
    return sum(map(len, containers))


@contextmanager
def waits() -> Iterator[list[str]]:
    """List, while it lasts, who makes a tensor's values reach the host: the names of the calling functions."""
    callers: list[str] = []

    def spied(name: str) -> Callable[..., object]:
        original = getattr(torch.Tensor, name)

        def spy(self: torch.Tensor, *args: object, **kwargs: object) -> object:
            callers.append(f"{sys._getframe(1).f_code.co_name}: {name}")
            return original(self, *args, **kwargs)

        return spy

    with mock.patch.multiple(torch.Tensor, **{name: spied(name) for name in _WAITS}):
        yield callers


def check_never_waits(case: Case) -> None:
    """Values reach the host in the transfer at the end of a step, and in a check of `moments` on the CPU alone."""
    seed()
    job = case.build()
    with ns.attach(job.model, job.optimizers, every=1, scaler=job.scaler):
        job.step()
        with waits() as callers:
            job.step()
    allowed = {"to_host: cpu", "to_host: numpy", "_planes: __bool__"}
    assert [caller for caller in callers if caller not in allowed] == []
    assert callers.count("to_host: cpu") <= 2  # what was measured, and the gradient norm
