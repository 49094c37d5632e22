"""Comparison: several entries trained alike, as frames, tables, figures and a page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from normscope.core.errors import StoreError, unknown_name
from normscope.figures import draw
from normscope.figures.comparison import OVERLAYS
from normscope.metrics import comparison as metrics
from normscope.metrics import trial as trials_module
from normscope.metrics.trial import Trial
from normscope.report.comparison_page import Checked, Difference, Told, comparison_page
from normscope.report.grid import FORMATS, Cell, Grid, cell
from normscope.report.text import number
from normscope.report.write import write_texts

FILE_NAME = "comparison.json"
_SUFFIXES = (".pdf", ".svg")
_SHOWN = 12


@dataclass(frozen=True)
class Comparison:
    """What `normscope.compare` found; every entry is shown at its best learning rate.

    Attributes:
        entries: the entries in order; the first is what the others are compared with.
        trials: every training run.
        select: the metric on which the learning rate of each entry is chosen.
        higher: metrics of which more is better; None where their names say so.
        checks: (entry, layer class, (law, verdict, what was seen)) of layers that were checked.
    """

    entries: tuple[str, ...]
    trials: tuple[Trial, ...]
    select: str
    higher: tuple[str, ...] | None = None
    checks: tuple[Checked, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a metric that no trial has with an ArgumentError."""
        known = list(dict.fromkeys(name for trial in self.trials for name in trial.metrics))
        for argument, names in (("select", (self.select,)), ("higher", self.higher or ())):
            for name in names:
                _require(argument, name, known, "These are the metrics that fit returned.")

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate at which each entry is shown, NaN where `fit` chose it."""
        return metrics.best_rates(self.trials, self.select, self.higher)

    @property
    def failed(self) -> tuple[Trial, ...]:
        """The trials that raised; `reason` says what."""
        return tuple(trial for trial in self.trials if not trial.done)

    def frame(self) -> pd.DataFrame:
        """Return every number of every run: entry, learning_rate, seed, quantity, value."""
        return metrics.tidy(self.trials)

    def summary(self) -> pd.DataFrame:
        """Return a row an entry and quantity: mean, interval over seeds, paired difference to the first, best."""
        return metrics.summary(self.trials, self.entries, self.select, self.higher)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the tables must know, one sentence each."""
        seeds = sorted({trial.seed for trial in self.trials})
        grid = sorted({trial.rate for trial in self.trials if not np.isnan(trial.rate)})
        told = [
            f"Mean ± half of the 95 % Student interval over {len(seeds)} seeds. Bold (* in text): best, and the paired "
            "95 % Student interval of its difference to every other entry excludes zero."
            if len(seeds) > 1
            else "One seed: no interval, nothing is bold; pass seeds=3 or more."
        ]
        if len(grid) > 1:
            shown = ", ".join(f"{rate:g}" for rate in grid)
            told.append(f"Each entry at its best of the learning rates {shown}, by the mean of {self.select}.")
        told += (
            [f"Best at the end of the grid, which should be wider: {', '.join(at_end)}."]
            if (at_end := self._at_end(grid))
            else []
        )
        if not metrics.is_clear(self.select, self.higher):
            told.append(
                f"select={self.select!r}: its name does not say which is better; less is taken to be. If more is, pass "
                f"higher=[{self.select!r}]."
            )
        needed = [q.label for q in metrics.needing_problem(self.trials)]
        if needed:
            told.append(f"Not measured: {', '.join(needed)}; pass problem=normscope.Problem(...) to attach in fit.")
        return (*told, *self._failures(), *self._broken(), *self._unmeasured())

    def _broken(self) -> list[str]:
        """Say which laws a checked layer breaks."""
        laws = [
            (entry, kind, [law for law, verdict, _ in rows if verdict == "fail"]) for entry, kind, rows in self.checks
        ]
        return [
            f"{entry}: {kind} fails the check of {', '.join(dict.fromkeys(failed))}."
            for entry, kind, failed in laws
            if failed
        ]

    def _at_end(self, grid: Sequence[float]) -> list[str]:
        ends = {grid[0], grid[-1]} if len(grid) > 1 else set()
        done = {trial.entry for trial in self.trials if trial.done}
        return [f"{entry} ({rate:g})" for entry, rate in self.rates.items() if rate in ends and entry in done]

    def _failures(self) -> list[str]:
        reasons: dict[tuple[str, str], int] = {}
        for trial in self.failed:
            reasons[trial.entry, trial.reason] = reasons.get((trial.entry, trial.reason), 0) + 1
        runs = {entry: sum(trial.entry == entry for trial in self.trials) for entry in self.entries}
        return [f"{entry} failed in {n} of {runs[entry]} runs: {reason}" for (entry, reason), n in reasons.items()]

    def _unmeasured(self) -> list[str]:
        told: dict[str, list[str]] = {}
        for trial in self.trials:
            for note in trial.notes:
                told.setdefault(note, []).append(trial.entry)
        return [f"{', '.join(dict.fromkeys(entries))}: {note}." for note, entries in told.items()]

    def grid(self, columns: Sequence[str] | None = None) -> Grid:
        """Return the table of means as cells.

        Args:
            columns: names of quantities, in the order wanted; all that were measured by default.

        Returns:
            A row an entry; an unknown column is an ArgumentError.
        """
        found = self.summary()
        known = {c.name: c for c in metrics.columns(self.trials, self.higher) if c.name in set(found["quantity"])}
        for name in columns or ():
            _require("columns", name, known)
        chosen = [known[name] for name in columns or known]
        several = len({trial.rate for trial in self.trials if not np.isnan(trial.rate)}) > 1
        cells = {
            (row["entry"], row["quantity"]): cell(row["mean"], row["low"], row["high"], row["best"])
            for row in found.to_dict("records")
        }
        rates = self.rates
        rows = []
        for entry in self.entries:
            done = any(trial.done for trial in self.trials if trial.entry == entry)
            rate = (cell(rates[entry], np.nan, np.nan, False) if done else Cell("failed"),) if several else ()
            rows.append((entry, (*rate, *(cells[entry, column.name] for column in chosen))))
        head = (("lr", ""),) if several else ()
        return Grid(
            heads=(*head, *((column.label, column.better) for column in chosen)),
            readings=(
                *(["the learning rate at which the entry is shown"] if several else []),
                *(c.reading for c in chosen),
            ),
            rows=tuple(rows),
            notes=self.notes,
        )

    def table(self, format: str = "text", columns: Sequence[str] | None = None) -> str:
        """Write the table of means.

        Args:
            format: "text", "markdown", "latex" (booktabs) or "html".
            columns: names of quantities, in the order wanted; all that were measured by default.

        Returns:
            The table; an unknown format or column is an ArgumentError.
        """
        _require("format", format, FORMATS)
        return FORMATS[format](self.grid(columns))

    def prepared(self) -> dict[str, pd.DataFrame]:
        """Return the frame of each picture that can be drawn: x, y, low, high, entry."""
        best = [trial for trial in metrics.at_best(self.trials, self.rates) if trial.done]
        frames = {picture.id: picture.prepare(self.trials if picture.every_rate else best) for picture in OVERLAYS}
        return {name: frame for name, frame in frames.items() if np.isfinite(frame["y"].to_numpy(float)).any()}

    def figures(self) -> dict[str, Any]:
        """Return matplotlib figures by name: training, conditioning, learning-rates; those that can be drawn."""
        frames = self.prepared()
        return {p.id: draw.overlay(p, frames[p.id], self.entries) for p in OVERLAYS if p.id in frames}

    def report(self, path: str | Path = "comparison.html") -> Path:
        """Write one self-contained page.

        Args:
            path: the file, in a folder that exists.

        Returns:
            The path.
        """
        target = Path(path)
        target = target / "comparison.html" if target.is_dir() or not target.suffix else target
        figures = self.figures()
        text = comparison_page(
            self.entries,
            self._facts(),
            self.grid(),
            pictures=[(picture, draw.svg(figures[picture.id])) for picture in OVERLAYS if picture.id in figures],
            differences=self._differences(),
            told=self._told(),
            checks=self.checks,
        )
        write_texts({target: text})
        return target

    def _facts(self) -> list[str]:
        seeds = len({trial.seed for trial in self.trials})
        rates = len({trial.rate for trial in self.trials if not np.isnan(trial.rate)})
        facts = [f"{len(self.trials)} runs", f"{seeds} seed{'s' if seeds > 1 else ''}"]
        return [
            *facts,
            *([f"{rates} learning rates"] if rates > 1 else []),
            f"the first, {self.entries[0]}, is the baseline",
        ]

    def _differences(self) -> list[Difference]:
        """Return the differences to the first entry that have an interval, in what has a direction."""
        found = self.summary()
        compared = {c.name: c.label for c in metrics.columns(self.trials, self.higher) if c.better}
        rows = found[found["quantity"].isin(compared) & (found["entry"] != self.entries[0])]
        kept = rows.groupby("quantity")["difference_low"].transform(lambda values: values.notna().any())
        shown = []
        for row in rows[kept.astype(bool)].to_dict("records"):
            mean, low, high = (row[name] for name in ("difference", "difference_low", "difference_high"))
            text = f"{number(mean)} [{number(low)}, {number(high)}]" if np.isfinite(low) else number(mean)
            shown.append(Difference(row["entry"], compared[row["quantity"]], text, row["separated"]))
        return shown

    def _told(self) -> list[Told]:
        """Return the findings of each entry's runs at its best learning rate, each once."""
        best = [trial for trial in metrics.at_best(self.trials, self.rates) if trial.done]
        found = []
        for entry in self.entries:
            runs = [trial for trial in best if trial.entry == entry]
            first = {
                name: (verdict, message) for t in reversed(runs) for name, verdict, message in reversed(t.findings)
            }
            for name, (verdict, message) in first.items():
                count = sum(any(name == other for other, _, _ in trial.findings) for trial in runs)
                found.append(Told(entry, name, verdict, message, count, len(runs)))
        return found

    def save(self, folder: str | Path) -> Path:
        """Write everything: figures as PDF and SVG, tables as LaTeX, Markdown and text, runs as CSV, and the page.

        Args:
            folder: where, created if needed.

        Returns:
            The folder.

        Raises:
            StoreError: it cannot be written.
        """
        target = Path(folder)
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name, figure in self.figures().items():
                for suffix in _SUFFIXES:
                    figure.savefig(target / f"{name}{suffix}")
            for format, suffix in (("latex", "tex"), ("markdown", "md"), ("text", "txt")):
                (target / f"table.{suffix}").write_text(self.table(format), encoding="utf-8")
            self.frame().to_csv(target / "runs.csv", index=False)
            self.summary().to_csv(target / "summary.csv", index=False)
        except OSError as error:
            raise StoreError(f"folder={str(folder)!r} cannot be written ({error}); choose another one.") from error
        self.report(target / "comparison.html")
        return target

    def write(self, folder: str | Path) -> Path:
        """Write what `Comparison.read` reads: one JSON file.

        Args:
            folder: where, created if needed.

        Returns:
            The file.
        """
        file = Path(folder, FILE_NAME)
        stored = {
            "entries": list(self.entries),
            "select": self.select,
            "higher": None if self.higher is None else list(self.higher),
            "checks": self.checks,
            "trials": [trial.as_dict() for trial in self.trials],
        }
        trials_module.write_json(file, stored)
        return file

    @staticmethod
    def read(folder: str | Path) -> Comparison:
        """Read a comparison from the folder of its runs; no torch is needed.

        Args:
            folder: the `out` of `normscope.compare`.

        Returns:
            The comparison.

        Raises:
            StoreError: there is none, or it is damaged.
        """
        file = Path(folder, FILE_NAME)
        if not file.exists():
            raise StoreError(f"folder={str(folder)!r} holds no finished comparison: {file} does not exist.")
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            return Comparison(
                entries=tuple(stored["entries"]),
                trials=tuple(trials_module.from_dict(item) for item in stored["trials"]),
                select=stored["select"],
                higher=None if stored["higher"] is None else tuple(stored["higher"]),
                checks=tuple((entry, kind, tuple(map(tuple, rows))) for entry, kind, rows in stored["checks"]),
            )
        except (ValueError, TypeError, LookupError) as error:
            raise StoreError(f"{file} is damaged ({error}); run the comparison again, its runs are kept.") from error

    def __repr__(self) -> str:
        """Write the table of the metrics, and where the rest is."""
        names = dict.fromkeys(name for trial in self.trials for name in trial.metrics)
        measured = set(self.summary()["quantity"])
        lost = [name for name in names if name not in measured]
        names = dict.fromkeys(name for name in names if name in measured)
        further = [name for name in ("final_loss", "speed", "memory") if name in measured]
        seeds = len({trial.seed for trial in self.trials})
        head = f"Comparison of {len(self.entries)} entries, {len(self.trials)} runs, {seeds} seeds"
        head += f"; never finite: {', '.join(lost)}" if lost else ""
        tail = "more: .table() .summary() .frame() .figures() .save(folder) .report(path)"
        return f"{head}\n\n{self.table('text', [*names, *further][:_SHOWN])}\n\n{tail}"

    def _repr_html_(self) -> str:
        """Show the whole table in a notebook."""
        return self.table("html")


def order_of(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Return the entries of trials in the order in which they come."""
    return tuple(dict.fromkeys(trial.entry for trial in trials))


def _require(argument: str, value: str, options: Iterable[str], hint: str = "") -> None:
    if value not in options:
        raise unknown_name(argument, value, options, hint)
