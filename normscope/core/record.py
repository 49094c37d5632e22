"""Record: everything measured in one or several runs, immutable, in numpy and pandas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd

from normscope.core.errors import ArgumentError, unknown_name
from normscope.core.schedule import FLIGHT

COLUMNS = ("run", "step", "site", "phase", "role", "stat", "value")


@dataclass(frozen=True)
class Block:
    """The scalars of one site, phase and role through a run.

    Attributes:
        run: name of the run.
        site: the site as a string.
        phase: "train", "batch", "population", "noise" or "flight" (see `normscope.core.site.Key`).
        role: "value", "gradient" or "update".
        stats: names of the columns of `values`.
        steps: [n] sampled steps, increasing.
        values: [n, len(stats)] float32.
    """

    run: str
    site: str
    phase: str
    role: str
    stats: tuple[str, ...]
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Channels:
    """Full per-channel arrays of one statistic, at the few steps where they were kept.

    Attributes:
        run: name of the run.
        site: the site as a string.
        phase: "train", "batch", "population", "noise" or "flight".
        role: "value", "gradient" or "update".
        stat: name of the statistic.
        steps: [n] steps, increasing.
        values: n float32 vectors [channels].
    """

    run: str
    site: str
    phase: str
    role: str
    stat: str
    steps: np.ndarray
    values: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Record:
    """An immutable snapshot of what was measured; reading it needs no torch.

    Attributes:
        runs: one mapping a run: name, versions, seed, device, git revision, command.
        sites: one row a site: run, site, module, call, slot, class, shape, norm parts, predecessor, ...
        context: one row a step and parameter group: run, step, sampled, optimizer, group, lr, momentum, decay,
            batch_size, loss, loss_scale, grad_norm, skipped. Steps that were not sampled have one row, without group.
        events: what went wrong or was left out: run, step, kind, site, message.
        blocks: the scalars.
        channels: the per-channel arrays.
    """

    runs: tuple[Mapping[str, object], ...]
    sites: pd.DataFrame
    context: pd.DataFrame
    events: pd.DataFrame
    blocks: tuple[Block, ...]
    channels: tuple[Channels, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the runs."""
        return tuple(str(run["run"]) for run in self.runs)

    @property
    def steps(self) -> np.ndarray:
        """All sampled steps, increasing."""
        found = [block.steps for block in self.blocks if block.phase != FLIGHT]
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)

    def __repr__(self) -> str:
        """Say what the record holds."""
        values = sum(block.values.size for block in self.blocks)
        names = ", ".join(map(repr, self.names)) or "no run"
        seen = self.context["step"].nunique() if len(self.context) else 0
        return f"Record({names}: {seen} steps, {len(self.steps)} sampled, {len(self.sites)} sites, {values:,} values)"

    def _repr_html_(self) -> str:
        """Show what was recorded at which slots, in a notebook."""
        slots: dict[tuple[str, str, str], list[str]] = {}
        for block in self.blocks:
            found = slots.setdefault((block.phase, block.site.rpartition("/")[2], block.role), [])
            found += [stat for stat in block.stats if stat not in found]
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in (*key, ', '.join(stats)))}</tr>"
            for key, stats in sorted(slots.items())
        )
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("phase", "slot", "role", "statistics"))
        return f"<p>{escape(repr(self))}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    @property
    def stats(self) -> tuple[str, ...]:
        """Names of all statistics that were recorded anywhere, sorted; see `wide`, `series` and `select`."""
        return tuple(sorted({name for block in self.blocks for name in block.stats}))

    def frame(self, index: bool = False) -> pd.DataFrame:
        """Return all values as a tidy frame.

        Args:
            index: False for the scalars of every sampled step, True for per-channel values at the steps that kept them.

        Returns:
            Columns run, step, site, phase, role, stat, value; with `index` also `index`, the channel.
        """
        parts = [_channel_rows(c) for c in self.channels] if index else [_scalar_rows(b) for b in self.blocks]
        columns = [*COLUMNS[:-1], "index", "value"] if index else list(COLUMNS)
        if not parts:
            return pd.DataFrame(columns=columns)
        merged: dict[str, object] = {
            name: np.concatenate([part[name] for part in parts])
            for name in ("step", "index", "value")
            if name in parts[0]
        }
        sizes = np.array([len(part["value"]) for part in parts])
        source = self.channels if index else self.blocks
        for name in ("run", "site", "phase", "role"):
            merged[name] = _repeated([getattr(item, name) for item in source], sizes)
        merged["stat"] = pd.Categorical(np.concatenate([part["stat"] for part in parts]))
        return pd.DataFrame({name: merged[name] for name in columns})

    def select(
        self,
        site: str = "*",
        *,
        role: str = "*",
        stat: str = "*",
        phase: str = "*",
        run: str = "*",
        steps: tuple[int, int] | None = None,
    ) -> Record:
        """Return the part of the record that matches; each name is a glob.

        Args:
            site: glob over sites, as "layer3.*" or "*/output".
            role: glob over "value", "gradient", "update".
            stat: glob over statistics; "rms" takes the layer's scalar alone, "rms*" its extremes over channels too.
            phase: glob over "train", "batch", "population", "noise", "flight".
            run: glob over names of runs.
            steps: first and last step, both included.

        Returns:
            A record with the same context; empty where nothing matches.

        Raises:
            ArgumentError: if `steps` is not an increasing pair.
        """
        if steps is not None and (not isinstance(steps, (tuple, list)) or len(steps) != 2 or steps[0] > steps[1]):
            raise ArgumentError(f"steps={steps!r} must be (first, last) with first <= last; for one step pass (n, n).")

        def matches(item: Block | Channels) -> bool:
            pairs = ((item.run, run), (item.site, site), (item.phase, phase), (item.role, role))
            return all(fnmatchcase(name, pattern) for name, pattern in pairs)

        blocks = [_cut_block(b, stat, steps) for b in self.blocks if matches(b)]
        channels = [_cut_channels(c, steps) for c in self.channels if matches(c) and fnmatchcase(c.stat, stat)]
        return replace(
            self,
            blocks=tuple(b for b in blocks if b.stats and len(b.steps)),
            channels=tuple(c for c in channels if len(c.steps)),
        )

    def series(
        self, site: str, stat: str, *, role: str = "value", phase: str = "train", run: str | None = None
    ) -> pd.Series:
        """Return one statistic of one site by step.

        Args:
            site: the site, as "layer1.conv/output".
            stat: the statistic, as "rms" or "rms.max".
            role: "value", "gradient" or "update".
            phase: "train", "batch", "population", "noise" or "flight".
            run: name of the run; the only one by default.

        Returns:
            float32 values indexed by step; where no such statistic was recorded, an empty series.
        """
        name = self._run(run)
        self._check_site(site)
        self._check_stat(stat)
        found = [
            b for b in self.blocks if (b.run, b.site, b.phase, b.role) == (name, site, phase, role) and stat in b.stats
        ]
        parts = [pd.Series(b.values[:, b.stats.index(stat)], index=b.steps) for b in found]
        joined = (
            pd.concat(parts).sort_index() if parts else pd.Series([], index=np.empty(0, np.int64), dtype=np.float32)
        )
        return joined.rename(stat).rename_axis("step")

    def array(
        self, site: str, stat: str, *, role: str = "value", phase: str = "train", run: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the per-channel arrays of one statistic of one site.

        Args:
            site: the site, as "layer1.conv/output".
            stat: the statistic, as "rms".
            role: "value", "gradient" or "update".
            phase: "train", "batch", "population", "noise" or "flight".
            run: name of the run; the only one by default.

        Returns:
            Steps [n] and values [n, channels]; n = 0 where no array was kept.

        Raises:
            ArgumentError: if the number of channels changed during the run.
        """
        name = self._run(run)
        self._check_site(site)
        for item in self.channels:
            if (item.run, item.site, item.phase, item.role, item.stat) == (name, site, phase, role, stat):
                if len({len(v) for v in item.values}) > 1:
                    raise ArgumentError(f"site={site!r} changed its number of channels; use frame(index=True).")
                return item.steps, np.stack(item.values)
        return np.empty(0, np.int64), np.empty((0, 0), np.float32)

    def wide(self, stat: str, *, slot: str = "output*", role: str = "value", phase: str = "train") -> pd.DataFrame:
        """Return one statistic of all sites: a row a step, a column a site, in the order of execution.

        Args:
            stat: the statistic, as "rms".
            slot: glob over slots.
            role: "value", "gradient" or "update".
            phase: "train", "batch", "population", "noise" or "flight".

        Returns:
            float32 frame; NaN where a site was not measured at a step. A statistic that was not recorded is an
            ArgumentError.
        """
        self._check_stat(stat)
        columns: dict[str, list[pd.Series]] = {}
        for block in self.blocks:
            slot_matches = fnmatchcase(block.site.rpartition("/")[2], slot)
            if slot_matches and (block.phase, block.role) == (phase, role) and stat in block.stats:
                part = pd.Series(block.values[:, block.stats.index(stat)], index=block.steps)
                columns.setdefault(block.site, []).append(part)
        order = [site for site in self.sites["site"] if site in columns] if len(self.sites) else []
        joined = {site: pd.concat(columns[site]).sort_index() for site in order}  # statistics may change during a run
        return pd.DataFrame(joined).rename_axis("step")

    def to_csv(self, path: str | Path) -> Path:
        """Write `frame()` as CSV and return the path."""
        self.frame().to_csv(path, index=False)
        return Path(path)

    def to_parquet(self, path: str | Path) -> Path:
        """Write `frame()` as Parquet and return the path.

        Args:
            path: the file to write.

        Returns:
            The path.

        Raises:
            ArgumentError: where no Parquet engine (pyarrow) is installed.
        """
        try:
            self.frame().to_parquet(path, index=False)
        except ImportError as error:
            raise ArgumentError("to_parquet needs pyarrow: pip install pyarrow, or use to_csv.") from error
        return Path(path)

    def _run(self, run: str | None) -> str:
        if run is None and len(self.runs) == 1:
            return self.names[0]
        if run not in self.names:
            raise unknown_name("run", run, self.names, "A record of several runs needs one named.")
        return str(run)

    def _check_stat(self, stat: str) -> None:
        if self.blocks and stat not in self.stats:
            raise unknown_name("stat", stat, self.stats, "record.stats lists them.")

    def _check_site(self, site: str) -> None:
        known = set(self.sites["site"]) if len(self.sites) else set()
        if site not in known:
            raise unknown_name("site", site, sorted(known), "A site is 'module/slot'; see record.sites.")


def join(records: list[Record]) -> Record:
    """Join the records of several runs into one.

    Args:
        records: records with distinct names of runs.

    Returns:
        One record that holds all runs.

    Raises:
        ArgumentError: if two runs have the same name.
    """
    names = [name for record in records for name in record.names]
    if len(set(names)) < len(names):
        raise ArgumentError(f"records={names!r}: two runs have the same name; name them apart by their paths.")
    return Record(
        runs=tuple(run for record in records for run in record.runs),
        sites=pd.concat([r.sites for r in records], ignore_index=True),
        context=pd.concat([r.context for r in records], ignore_index=True),
        events=pd.concat([r.events for r in records], ignore_index=True),
        blocks=tuple(block for record in records for block in record.blocks),
        channels=tuple(item for record in records for item in record.channels),
    )


def _scalar_rows(block: Block) -> dict[str, np.ndarray]:
    n, k = block.values.shape
    return {
        "step": np.repeat(block.steps, k),
        "stat": np.tile(np.array(block.stats, object), n),
        "value": block.values.ravel(),
    }


def _channel_rows(item: Channels) -> dict[str, np.ndarray]:
    sizes = [len(v) for v in item.values]
    return {
        "step": np.repeat(item.steps, sizes),
        "index": np.concatenate([np.arange(size) for size in sizes]),
        "stat": np.repeat(np.array([item.stat], object), sum(sizes)),
        "value": np.concatenate(item.values),
    }


def _repeated(names: list[str], sizes: np.ndarray) -> pd.Categorical:
    codes, levels = pd.factorize(np.array(names, object))
    return pd.Categorical.from_codes(np.repeat(codes, sizes).astype(np.int64), categories=pd.Index(levels))


def _cut_block(block: Block, stat: str, steps: tuple[int, int] | None) -> Block:
    columns = [i for i, name in enumerate(block.stats) if fnmatchcase(name, stat)]
    rows = slice(None) if steps is None else slice(*np.searchsorted(block.steps, (steps[0], steps[1] + 1)))
    return replace(
        block,
        stats=tuple(block.stats[i] for i in columns),
        steps=block.steps[rows],
        values=block.values[rows][:, columns],
    )


def _cut_channels(item: Channels, steps: tuple[int, int] | None) -> Channels:
    if steps is None:
        return item
    low, high = np.searchsorted(item.steps, (steps[0], steps[1] + 1))
    return replace(item, steps=item.steps[low:high], values=item.values[low:high])
