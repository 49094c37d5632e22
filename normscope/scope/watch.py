"""Watch: what a model, its layers and its norms are to a session, and the session's hooks on them."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normscope.core.earlier import Earlier, earlier
from normscope.core.errors import ArgumentError, unknown_name
from normscope.core.site import Site
from normscope.core.store import Store, check_run, run_exists
from normscope.linalg.problem import Problem
from normscope.norms.recognize import class_name, find_norms
from normscope.probes import parameters, structure
from normscope.probes.hooks import Hooks
from normscope.probes.ranks import LostError, Ranks, is_sharded, world
from normscope.scope.session import ON_REQUEST, PROBES, Session

Layers = str | type[nn.Module] | Iterable[str | type[nn.Module]]


def watch(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    run: str | Path | None,
    every: int,
    layers: Layers | None,
    probes: str | Iterable[str] | None,
    problem: Problem | None,
    scaler: Any,
    reduction: str,
    resume: bool = False,
    name: str = "run",
    size: int = 1,
) -> tuple[Session, Hooks, Path | None, str]:
    """Begin a record and put the hooks on a model; the arguments are those of `attach`, and the number of ranks.

    Returns:
        The session, its hooks, the folder of the record, and a few words on what is watched.
    """
    _check_reduction(reduction)
    chosen = _checked_probes(probes)
    modules = selected(model, layers)
    norms = {name: parts for name, parts in find_norms(model).items() if name in modules}
    owned = {name: p for name, p in parameters.named(model).items() if _owner(name) in modules}
    check_run(run)
    among = Ranks(size, repr((every, reduction, sorted(chosen), list(modules), resume)))
    path = None if run is None or among.rank else Path(run).resolve()  # the program may change its folder
    before = earlier(path) if resume and path is not None and run_exists(path) else None
    if before is not None:
        _check_same(model, before)
    begun = _begun(among, before) if resume and size > 1 else before
    facts = {
        "every": every,
        "reduction": reduction,
        "probes": list(chosen),
        "problem": problem is not None,
        "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
        "model": class_name(model),
        "parameters": sum(p.numel() for p in parameters.named(model).values() if not is_lazy(p)),
        "modules": len(modules),
        "norms": len(norms),
        "structure": structure.describe(model, modules, norms, owned, optimizers),
    }
    store = Store(path, name if path is None else path.name, _provenance(model) | facts, before)
    session = Session(
        modules,
        norms,
        owned,
        optimizers,
        store,
        every=every,
        probes=chosen,
        problem=problem,
        scaler=scaler,
        reduction=reduction,
        earlier=begun,
        among=among,
    )
    hooks = Hooks(session, model, modules.items(), optimizers)
    said = f"{class_name(model)}, {len(modules)} modules, {len(norms)} norms"
    return session, hooks, path, said if size == 1 else f"{said}, rank {among.rank} of {size}"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module behind the wrappers of torch.compile and of data parallelism: its names are the user's.

    Args:
        model: a module, wrapped or not.

    Returns:
        The innermost of them, which runs as itself.

    Raises:
        ArgumentError: if it runs as copies instead.
    """
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ArgumentError(
            f"model=DataParallel runs a copy of the model on each of {len(model.device_ids)} devices, and copies carry "
            "no hooks; use torch.nn.parallel.DistributedDataParallel, a process a device, and attach in the first."
        )
    wraps = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = model.module if wraps else getattr(model, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def ranks_of(model: nn.Module) -> int:
    """Return how many processes train a model together.

    Args:
        model: a module, wrapped or not.

    Returns:
        The ranks of DistributedDataParallel or of fully_shard, 1 for another model, and for one of a part of them.

    Raises:
        ArgumentError: if parameters are sharded over a part of the ranks.
    """
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return ranks_of(inner)
    sharded: list[Any] = [p for p in model.parameters() if is_sharded(p)]
    meshes = {p.device_mesh.size() for p in sharded}
    if meshes - {world()}:
        raise ArgumentError(
            f"model={class_name(model)} is sharded over {max(meshes)} of {world()} ranks; call fully_shard with a "
            "mesh of all of them, or train without normscope."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        size = torch.distributed.get_world_size(model.process_group)
        return size if size == world() else 1
    return max(meshes, default=1)


def _begun(among: Ranks, before: Earlier | None) -> Earlier | None:
    """Return what goes on, as the rank that writes has found it."""
    try:
        found = among.told("" if before is None else f"{before.step} {before.samples}")
    except LostError:
        return before
    if not found or before is not None:
        return before
    step, samples = map(int, found.split())
    return Earlier("", {}, step, samples, {}, {})


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise unknown_name("reduction", reduction, ("mean", "sum"), "It says how the loss joins the samples.")


def _checked_probes(probes: str | Iterable[str] | None) -> tuple[str, ...]:
    if probes is None:
        return PROBES
    options = PROBES + ON_REQUEST
    if not isinstance(probes, Iterable):
        raise ArgumentError(f"probes={probes!r} must be a name or a sequence of names; options: {', '.join(options)}.")
    chosen = (probes,) if isinstance(probes, str) else tuple(probes)
    for probe in chosen:
        if probe not in options:
            raise unknown_name("probes", probe, options)
    if not chosen:
        raise ArgumentError(f"probes=() is empty; options: {', '.join(options)}; None takes all.")
    return chosen


def selected(model: nn.Module, layers: Layers | None = None) -> dict[str, nn.Module]:
    """Return the watched modules by name, all by default: no parametrizations, whose outputs are weights."""
    modules = {
        name: module
        for name, module in model.named_modules()
        if "parametrizations" not in name.split(".") and not isinstance(module, torch.jit.ScriptModule)
    }
    if layers is None:
        return modules
    wanted = (layers,) if isinstance(layers, (str, type)) or not isinstance(layers, Iterable) else tuple(layers)
    if not wanted:
        raise ArgumentError(f"layers={layers!r} is empty; None watches all layers.")
    roots: set[str] = set()
    for want in wanted:
        if isinstance(want, str):
            found = {name for name, m in modules.items() if want == class_name(m) or fnmatchcase(name, want)}
        elif isinstance(want, type) and issubclass(want, nn.Module):
            found = {name for name, module in modules.items() if isinstance(module, want)}
        else:
            raise ArgumentError(f"layers={want!r} must be a glob over module paths or a subclass of torch.nn.Module.")
        if not found:
            options = sorted({*modules, *(class_name(module) for module in modules.values())} - {""})
            raise unknown_name("layers", want, options, "It matches no module; a glob is matched against whole paths.")
        roots |= found
    return {name: module for name, module in modules.items() if any(_below(name, root) for root in roots)}


def _check_same(model: nn.Module, before: Earlier) -> None:
    """Refuse to go on with a run of another model."""
    mine = {str(Site(*_split(name))): list(p.shape) for name, p in parameters.named(model).items() if not is_lazy(p)}
    theirs: dict[str, Any] = {
        s: known["shape"] for s, known in before.sites.items() if known.get("class") == "Parameter"
    }
    lazy = any(is_lazy(p) for p in model.parameters())
    said = f"resume=True: run {before.run!r} is of another model"
    advice = "build the model that the run began with, or choose another folder."
    for site, shape in theirs.items():
        if site in mine and mine[site] != shape:
            raise ArgumentError(f"{said}: {site} has shape {mine[site]}, in the run {shape}; {advice}")
        if site not in mine and not lazy:
            raise ArgumentError(f"{said}: it has no {site}, which in the run has shape {shape}; {advice}")
    described = before.provenance.get("structure")
    classes = {row["module"]: row["class"] for row in described["modules"]} if isinstance(described, dict) else {}
    for name, module in model.named_modules():
        if classes.get(name, class_name(module)) != class_name(module) and not lazy:
            raise ArgumentError(f"{said}: {name or 'it'} is {class_name(module)}, in the run {classes[name]}; {advice}")
    count, known = sum(map(math.prod, mine.values())), before.provenance.get("parameters")
    began_lazy = isinstance(known, int) and sum(map(math.prod, theirs.values())) > known
    if count != known and not began_lazy and not lazy:
        raise ArgumentError(f"{said}: it has {count} parameters, the run {known}; {advice}")


def _split(parameter: str) -> tuple[str, int, str]:
    module, _, slot = parameter.rpartition(".")
    return module, 0, slot


def _below(name: str, root: str) -> bool:
    return name == root or not root or name.startswith(root + ".")


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0].partition(".parametrizations")[0]


def _provenance(model: nn.Module) -> dict[str, object]:
    device = next((str(p.device) for p in model.parameters()), "cpu")
    return {
        "versions": {
            "normscope": _version("normscope"),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "seed": torch.initial_seed(),
        "device": device,
        "threads": torch.get_num_threads(),
        "revision": _revision(),
        "command": " ".join(sys.argv),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _revision() -> str:
    command = ("git", "rev-parse", "--short", "HEAD")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
