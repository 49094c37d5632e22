"""The driver: computes what is not cached, one process a seed, and writes a folder a figure."""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import pickle
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from tqdm import tqdm

from analyses.picture import save
from analyses.script import Script
from analyses.style import STYLE
from analyses.version import ROOT, code_version

_LIBRARIES = ("normscope", "torch", "numpy", "pandas", "matplotlib")


@dataclass(frozen=True)
class Unit:
    """One figure with one seed: what a process computes.

    Attributes:
        module: name of the script's module.
        id: id of the figure.
        setting: the script's setting.
        seed: the seed.
        key: hash of setting and code.
    """

    module: str
    id: str
    setting: Any
    seed: int
    key: str

    def cached(self, out: Path) -> Path:
        """Return where the result lies once it is computed."""
        return out / ".cache" / f"{self.id}-{self.seed}-{self.key}.pkl"


def units(script: ModuleType, *, fast: bool, seeds: int) -> tuple[Unit, ...]:
    """Return the units of a figure, one for each seed from 0.

    Args:
        script: the script.
        fast: whether in the fast setting.
        seeds: how many seeds.

    Returns:
        The units.
    """
    setting = script.setting(fast)
    code = code_version(Path(str(script.__file__)))
    key = hashlib.sha256(f"{setting!r} {code}".encode()).hexdigest()[:16]
    return tuple(Unit(script.__name__, script.ID, setting, seed, key) for seed in range(seeds))


def compute(unit: Unit, out: Path) -> None:
    """Compute a unit with torch's seed set and one thread; cache the frame with its seconds, by the clock and of CPU.

    Args:
        unit: the unit.
        out: folder of the reports.
    """
    torch.set_num_threads(1)
    torch.manual_seed(unit.seed)
    script: Script = importlib.import_module(unit.module)
    begin, used = time.perf_counter(), time.process_time()
    frame = script.run(unit.setting, unit.seed)
    taken = (time.perf_counter() - begin, time.process_time() - used)
    frame.insert(0, "seed", unit.seed)
    path = unit.cached(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(pickle.dumps((frame, *taken)))
    unfinished.replace(path)


def produce(
    scripts: Sequence[ModuleType], out: Path, *, fast: bool, jobs: int, seeds: int, progress: bool = True
) -> list[str]:
    """Compute what the cache lacks and write each figure as soon as its seeds are there.

    Args:
        scripts: the scripts.
        out: folder of the reports, made if missing.
        fast: whether in the fast setting.
        jobs: number of processes, each with one thread.
        seeds: how many seeds.
        progress: whether to draw a progress bar on stderr.

    Returns:
        What failed, a line each; the other figures are written all the same.
    """
    work = {script.ID: units(script, fast=fast, seeds=seeds) for script in scripts}
    lacking = [unit for group in work.values() for unit in group if not unit.cached(out).exists()]
    failures: dict[str, str] = {}
    left = {script.ID: sum(unit.id == script.ID for unit in lacking) for script in scripts}
    named = {script.ID: script for script in scripts}
    total = sum(len(group) for group in work.values())
    with tqdm(
        total=total,
        initial=total - len(lacking),
        unit="seed",
        disable=not progress,
        mininterval=0.1 if sys.stderr.isatty() else 5.0,
    ) as bar:
        for script in scripts:
            if not left[script.ID]:
                _finish(script, work[script.ID], out, fast, failures)
        for unit, error in _computed(lacking, out, jobs):
            left[unit.id] -= 1
            bar.set_postfix_str(unit.id)
            bar.update()
            if error is not None:
                failures[unit.id] = f"{unit.id}, seed {unit.seed}: {type(error).__name__}: {error}"
            if not left[unit.id] and unit.id not in failures:
                _finish(named[unit.id], work[unit.id], out, fast, failures)
    return list(failures.values())


def _computed(lacking: Sequence[Unit], out: Path, jobs: int) -> Iterator[tuple[Unit, BaseException | None]]:
    """Yield each unit as it ends, with what it raised."""
    if not lacking:
        return
    # read when a process loads numpy and torch, so it has to be there before the process starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(lacking)), mp_context=spawn) as pool:
        futures = {pool.submit(compute, unit, out): unit for unit in lacking}
        try:
            for future in as_completed(futures):
                yield futures[future], future.exception()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _finish(script: ModuleType, group: Sequence[Unit], out: Path, fast: bool, failures: dict[str, str]) -> None:
    """Write a figure; what its claims or its drawing raise is a failure of this figure alone."""
    try:
        write(script, group, out, fast=fast)
    except Exception as error:
        failures[script.ID] = f"{script.ID}, while judging or drawing: {type(error).__name__}: {error}"


def write(script: ModuleType, group: Sequence[Unit], out: Path, *, fast: bool) -> None:
    """Write figure.png, data.csv, claims.json and provenance.json of a figure from its cached units.

    Args:
        script: the script.
        group: its units, all in the cache.
        out: folder of the reports.
        fast: whether in the fast setting.
    """
    loaded = [pickle.loads(unit.cached(out).read_bytes()) for unit in group]
    frame = pd.concat([part for part, _, _ in loaded], ignore_index=True)
    folder = out / script.ID
    folder.mkdir(parents=True, exist_ok=True)
    claims = [asdict(claim) for claim in script.claims(frame)]
    _write_json(folder / "claims.json", {"id": script.ID, "claims": claims})
    provenance = {
        "id": script.ID,
        "setting": asdict(group[0].setting),
        "fast": fast,
        "seeds": [unit.seed for unit in group],
        "threads": 1,
        "seconds": round(sum(seconds for _, seconds, _ in loaded), 1),
        "cpu_seconds": round(sum(seconds for _, _, seconds in loaded), 1),
        "key": group[0].key,
        "versions": versions(),
        "revision": revision(),
    }
    _write_json(folder / "provenance.json", provenance)
    frame.to_csv(folder / "data.csv", index=False, float_format="%.6g")
    with rc_context(STYLE):
        canvas = Canvas(layout="constrained")
        script.draw(frame, canvas)
        save(canvas, folder / "figure.png")


def stale(script: ModuleType, out: Path) -> bool:
    """Return whether a report was computed by other code, or in another setting, than a run would use now.

    Args:
        script: the script.
        out: folder of the reports; that of the script may be missing, which is not stale.

    Returns:
        True where it is out of date.
    """
    path = out / script.ID / "provenance.json"
    if not path.exists():
        return False
    provenance = json.loads(path.read_text(encoding="utf-8"))
    return bool(provenance["key"] != units(script, fast=provenance["fast"], seeds=1)[0].key)


def versions() -> dict[str, str]:
    """Return the versions of what computes: Python, libraries, machine."""
    found = {"python": platform.python_version(), "machine": f"{sys.platform} {platform.machine()}"}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def revision() -> str:
    """Return git's revision of the code, with "+" where the code has changed since; "" where git knows none."""
    try:
        return _git("rev-parse", "--short=12", "HEAD") + (
            "+" if _git("status", "--short", "normscope", "analyses") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
