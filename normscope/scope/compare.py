"""Compare: several entries trained alike, with the same seeds and learning rates, and laid side by side."""

from __future__ import annotations

import math
import multiprocessing
import numbers
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from normscope.core.errors import ArgumentError, NormscopeError, StoreError, brief
from normscope.metrics import trial as trials
from normscope.metrics.trial import Trial
from normscope.report.comparison import Comparison, order_of
from normscope.scope import trial
from normscope.scope.entries import checked_layers
from normscope.scope.identity import described
from normscope.scope.trial import RATE_NAMES, Task, accepted
from normscope.scope.watch import Layers

SEEDS = 3
SPREAD = (10**-0.5, 1.0, 10**0.5)  # of the grid about the learning rate that `fit` has by default


def compare(
    makers: Mapping[str, Callable[..., nn.Module]],
    fit: Callable[..., Mapping[str, Any]],
    *,
    seeds: int | Iterable[int] = SEEDS,
    learning_rates: float | Iterable[float] | None = None,
    select: str | None = None,
    higher: Iterable[str] | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
    check: bool = True,
    progress: bool | None = None,
    every: int = 10,
    layers: Layers | None = None,
    probes: str | Iterable[str] | None = None,
    known: Iterable[Trial] = (),
) -> Comparison:
    """Train several models alike and lay them side by side: metrics, cost, and every subject of the survey.

    Each entry is trained with every learning rate and every seed. Before a model is made, and again before it is
    trained, Python, numpy and torch are seeded, so that all entries see the same data in the same order. An entry is
    shown at its best learning rate, the one with the best mean of `select`; what the choice hides is its sensitivity,
    E[min(loss(rate), loss at the start) - loss at the best rate] over the grid. Differences are paired by seed.

    `fit` trains a model its own way and attaches with the callable that it is given, which is `normscope.attach`
    without `run`:

        def fit(model, attach, lr=0.1, seed=0):
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            with attach(model, optimizer) as scope:
                ...
            return {"accuracy": accuracy(model)}

    It may take `lr` (or `learning_rate`) and `seed`, a maker may take `seed`; each is passed where the signature names
    it. `problem=Problem(...)` in its attach adds curvature, noise and mismatch; `scope.step(loss=loss)` adds losses.

    Args:
        makers: from the name of an entry to what makes its model; the first is what the others are compared with.
        fit: `fit(model, attach)` to `{metric: value}`.
        seeds: how many, or which.
        learning_rates: the grid; by default three about the default of `fit`'s own `lr`, and a single run where `fit`
            takes none.
        select: the metric on which the learning rate is chosen; the first that `fit` returns by default.
        higher: metrics of which more is better; by default those named so, as accuracy, f1 or auc.
        out: folder of all runs; what it holds already is not run again. None keeps nothing.
        jobs: processes; with more than one, makers and fit must be importable by name.
        check: whether layers of the entries that are neither torch's nor normscope's are checked first.
        progress: whether to draw a progress bar on stderr; by default where that is a terminal.
        every: sampled steps, as for `attach`.
        layers: watched modules, as for `attach`.
        probes: probes, as for `attach`.
        known: trials from elsewhere with the same protocol, shown after the entries, as `workbench.baselines` reads.

    Returns:
        The comparison.

    Raises:
        ArgumentError: an argument cannot work.
        NormscopeError: every run has failed.

    Source: wortsman2023 (sensitivity to the learning rate).
    """
    entries = _checked_makers(makers)
    if not callable(fit):
        raise ArgumentError(f"fit={brief(fit)} must be callable as fit(model, attach) and return {{metric: value}}.")
    options = {"every": every, "layers": layers, "probes": probes}
    rates = _checked_rates(fit, learning_rates)
    tasks = _tasks(entries, fit, rates, _checked_seeds(seeds), options, out)
    _check_jobs(jobs, tasks)
    checks = checked_layers(entries) if check else ()
    done = _finished(tasks, jobs, progress)
    if not any(result.done for result in done):
        reasons = dict.fromkeys(f"{result.entry}: {result.reason}" for result in done)
        raise NormscopeError(f"every run has failed. {' '.join(reasons)}")
    found = (*done, *known)
    comparison = Comparison(
        entries=order_of(found),
        trials=found,
        select=select or next(name for result in done for name in result.metrics),
        higher=None if higher is None else tuple(higher),
        checks=checks,
    )
    if out is not None:
        comparison.write(out)
    return comparison


# ---- what is asked for -------------------------------------------------------------------------------------------


def _checked_makers(makers: object) -> dict[str, Callable[..., nn.Module]]:
    if not isinstance(makers, Mapping) or not makers:
        raise ArgumentError(f"makers={brief(makers)} must map names to functions that make a model, as {{'bn': make}}.")
    for name, make in makers.items():
        if not isinstance(name, str) or not name.strip():
            raise ArgumentError(f"makers: the name {name!r} must be a text that is not empty.")
        if isinstance(make, nn.Module) or not callable(make):
            made = "a model" if isinstance(make, nn.Module) else brief(make)
            raise ArgumentError(
                f"makers[{name!r}] is {made}; it must be a function that makes a new model for each run, as "
                f"lambda: Net(norm={name!r})."
            )
    return dict(makers)


def _checked_seeds(seeds: object) -> tuple[int, ...]:
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds >= 1:
        return tuple(range(seeds))
    found = tuple(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, str) else ()
    if not found or len(set(found)) < len(found) or not all(type(seed) is int and seed >= 0 for seed in found):
        raise ArgumentError(f"seeds={seeds!r} must be how many, at least 1, or different ones, as [0, 1, 2].")
    return found


def _checked_rates(fit: Callable[..., Any], learning_rates: object) -> tuple[float | None, ...]:
    takes = accepted(fit, RATE_NAMES)
    if learning_rates is None:
        return _default_rates(takes)
    if not takes:
        raise ArgumentError(
            f"learning_rates={brief(learning_rates)} cannot reach fit: give it an argument lr, as "
            "def fit(model, attach, lr)."
        )
    listed = isinstance(learning_rates, Iterable) and not isinstance(learning_rates, str)
    found: tuple[Any, ...] = tuple(learning_rates) if listed else (learning_rates,)  # type: ignore[arg-type]
    good = [isinstance(rate, numbers.Real) and 0 < float(rate) < math.inf for rate in found]
    if not found or not all(good) or len(set(found)) < len(found):
        raise ArgumentError(
            f"learning_rates={learning_rates!r} must be different numbers above 0, as [0.03, 0.1, 0.3]."
        )
    return tuple(sorted(float(rate) for rate in found))


def _default_rates(takes: Mapping[str, Any]) -> tuple[float | None, ...]:
    if not takes:
        return (None,)
    name, parameter = next(iter(takes.items()))
    if not isinstance(parameter.default, (int, float)) or not parameter.default > 0:
        raise ArgumentError(
            f"learning_rates=None: fit takes {name} without a default to put a grid about; pass learning_rates=[0.03, "
            f"0.1, 0.3], or give fit a default, as {name}=0.1."
        )
    return tuple(float(f"{float(parameter.default) * factor:.3g}") for factor in SPREAD)


def _tasks(
    makers: Mapping[str, Callable[..., nn.Module]],
    fit: Callable[..., Any],
    rates: Sequence[float | None],
    seeds: Sequence[int],
    options: Mapping[str, Any],
    out: str | Path | None,
) -> list[Task]:
    """Return the trials in the order in which they run: entries follow each other, so that times compare."""
    if out is not None and (not isinstance(out, (str, Path)) or not str(out)):
        raise ArgumentError(f"out={out!r} must be a folder for the runs, as 'runs/norms', or None to keep none.")
    root = None if out is None else Path(out).resolve()
    folders = _folders(makers)
    shared = {"fit": described(fit)} | {name: described(value) for name, value in options.items()}
    return [
        Task(
            entry=name,
            make=make,
            fit=fit,
            rate=rate,
            seed=seed,
            folder=None if root is None else root / folders[name] / f"lr-{_text(rate)}" / f"seed-{seed}",
            options=options,
            setting={"make": described(make), **shared},
        )
        for seed in seeds
        for rate in rates
        for name, make in makers.items()
    ]


def _folders(names: Iterable[str]) -> dict[str, str]:
    """Return a folder for each entry; letters that a file system may not take become hyphens."""
    folders: dict[str, str] = {}
    for name in names:
        plain = "".join(c if c.isalnum() or c in "._-+=" else "-" for c in name).strip(".") or "entry"
        taken = {folder.lower() for folder in folders.values()}
        number = next(n for n in range(1, len(taken) + 2) if (plain if n == 1 else f"{plain}-{n}").lower() not in taken)
        folders[name] = plain if number == 1 else f"{plain}-{number}"
    return folders


def _text(rate: float | None) -> str:
    return "own" if rate is None else f"{rate:.12g}"


def _check_jobs(jobs: object, tasks: Sequence[Task]) -> None:
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ArgumentError(f"jobs={jobs!r} must be a number of processes, at least 1.")
    if jobs == 1:
        return
    for name, function in (("fit", tasks[0].fit), *((f"makers[{t.entry!r}]", t.make) for t in tasks)):
        try:
            pickle.dumps(function)
        except Exception as error:
            raise ArgumentError(
                f"{name}={brief(function)} cannot go to another process with jobs={jobs} ({error}); define it at the "
                "top level of a module, not as a lambda or inside a function, or use jobs=1."
            ) from error


# ---- runs --------------------------------------------------------------------------------------------------------


def _finished(tasks: Sequence[Task], jobs: int, progress: bool | None) -> list[Trial]:
    """Return all trials in the order of the tasks: those finished before are read, the others run."""
    found: dict[int, Trial] = {}
    for number, task in enumerate(tasks):
        before = None if task.folder is None else trials.read(task.folder)
        if before is not None:
            _check_setting(task, before)
            if before.done:  # what failed is tried again
                found[number] = before
    waiting = {number: task for number, task in enumerate(tasks) if number not in found}
    quiet = not sys.stderr.isatty() if progress is None else not progress
    with tqdm(total=len(tasks), initial=len(found), desc="compare", unit="run", disable=quiet) as bar:
        for number, result in _results(waiting, jobs):
            folder = tasks[number].folder
            if folder is not None:
                trials.write(result, folder)
            found[number] = result
            bar.set_postfix_str(result.entry if result.done else f"{result.entry} failed", refresh=False)
            bar.update()
    return [found[number] for number in range(len(tasks))]


def _check_setting(task: Task, before: Trial) -> None:
    """Refuse a folder whose run was made otherwise."""
    old, new = before.setting, task.setting
    changed = [name for name in new if old.get(name) != new[name]]
    if changed:
        raise StoreError(
            f"{task.folder} holds a run of another setting: {', '.join(changed)} changed since ({task.entry}, seed "
            f"{task.seed}). Choose another out=, or delete the folders of what is to be run again."
        )


def _results(tasks: Mapping[int, Task], jobs: int) -> Iterator[tuple[int, Trial]]:
    if jobs == 1 or len(tasks) < 2:
        for number, task in tasks.items():
            yield number, trial.run(task)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        try:
            yield from _completed(pool, tasks)
        except BrokenProcessPool as error:
            raise NormscopeError(
                f"jobs={jobs}: a process died, for lack of memory or because the script starts processes when it is "
                "imported; put its calls under if __name__ == '__main__': and pass out= to go on where it stopped."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _completed(pool: Executor, tasks: Mapping[int, Task]) -> Iterator[tuple[int, Trial]]:
    waiting: dict[Future[Trial], int] = {pool.submit(trial.run, task): number for number, task in tasks.items()}
    while waiting:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            yield waiting.pop(future), future.result()
