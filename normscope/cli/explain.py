"""normscope explain: which spikes a run has, what moved first in each, and why; also of a run that died."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from normscope.cli.folder import one_run
from normscope.core.errors import ArgumentError
from normscope.core.reading import load
from normscope.core.record import Record
from normscope.core.robust import MIN_HISTORY
from normscope.core.table import can_print, printable
from normscope.diagnostics.spikes import RULES, headline, story
from normscope.diagnostics.words import count
from normscope.figures.spikes import ONSETS, cells, raster
from normscope.metrics import spikes, tables
from normscope.metrics.onset import ONSET
from normscope.report.live import tail

_SHADES = " ░▒▓█"
_PLAIN = " .:+#"
_WIDEST = 34  # characters of a tensor's name
_PICTURES = (".png", ".pdf", ".svg")
_FACTS = ("overflow", "outside", "schedule")  # what happened, whether the loss jumped or not


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "path", metavar="RUN", type=Path, help="folder of the run, or its record.sqlite; it may be running or have died"
    )
    parser.add_argument("--step", type=int, metavar="N", help="the spike at this step, or whatever happened there")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--out", metavar="FILE", type=Path, help="also draw the first spike told, as PNG, PDF or SVG")


def run(arguments: argparse.Namespace) -> int:
    """Explain each spike of a run, or one step of it."""
    if arguments.out is not None and arguments.out.suffix.lower() not in _PICTURES:
        raise ArgumentError(f"out={str(arguments.out)!r} must end in one of: {', '.join(_PICTURES)}.")
    (record,) = tables.split(load(one_run(arguments.path)))
    told = _chosen(record, arguments.step)
    if arguments.json:
        print(json.dumps([_plain(account) for account in told], indent=2))
    elif not told:
        print(_none(record))
    else:
        width = max(40, min(shutil.get_terminal_size().columns, 140))
        if arguments.step is not None and arguments.step != told[0].spike.step:
            print(f"Step {arguments.step} belongs to the spike at step {told[0].spike.step}.\n")
        print("\n\n".join(_told(record, account, width) for account in told))
    if arguments.out is not None:
        drawn = _draw(record, told, arguments.out)
        print(drawn, file=sys.stderr if arguments.json else sys.stdout)
    return 0


def _chosen(record: Record, step: int | None) -> list[spikes.Account]:
    """Return all spikes, or that at or nearest before a step; where there is none, an account of the step itself."""
    accounts = list(spikes.accounts(record))
    if step is None:
        return accounts
    context = tables.context(record)
    if step not in context.index:
        known = f"{context.index.min()} to {context.index.max()}" if len(context) else "none"
        raise ArgumentError(f"step={step} is not in the run; recorded steps: {known}.")
    near = [a for a in accounts if a.since <= step <= a.spike.last]
    return near[:1] or [spikes.account(record, spikes.at(record, step))]


def _told(record: Record, account: spikes.Account, width: int) -> str:
    """Write one account: what happened, what came before, the raster, why and what to do."""
    rule = RULES[account.kind]
    found = account.spike.found
    lines = [f"step {account.spike.step}: {account.kind if found else 'no spike'}", ""]
    known = found and account.evidence.get("recorded_steps") != 0
    told = (("why", rule.cause), ("mend", rule.remedy)) if known else ()
    parts = (("what", f"{headline(account)} {story(account) if found else _quiet(account)}"), *told)
    for name, text in parts:
        if text:
            lines.append(textwrap.fill(printable(text), width, initial_indent=f"{name:<6}", subsequent_indent=" " * 6))
    frame = raster(record, account)
    if len(frame):
        lines += ["", *_raster(frame, account, width)]
    return "\n".join(lines)


def _quiet(account: spikes.Account) -> str:
    """Say what moved before a step that is no spike."""
    if account.evidence.get("recorded_steps") == 0:
        return "Too few of the steps before it are in the record; the probe 'flight' keeps them."
    moved = f"{count(len(account.moved), 'tensor')} had moved by then."
    return f"{moved} {story(account)}" if account.kind in _FACTS else moved


def _raster(frame: pd.DataFrame, account: spikes.Account, width: int) -> list[str]:
    """Draw how far tensors lay above their usual range, a row a tensor, a character a step."""
    shades = _SHADES if can_print(_SHADES) else _PLAIN
    names = [printable(str(site).replace("/", ".")) for site in frame.index]
    size = min(max(map(len, names)), _WIDEST)
    frame = frame.iloc[:, -max(width - size - 24, 20) :]
    mark = "".join("v" if step == account.spike.step else "|" if step == account.since else " " for step in frame)
    onsets, shares = account.moved["onset"].to_dict(), account.moved["share"].to_dict()
    lines = [f"{'':<{size}}  {mark}  onset  share"]
    for name, (site, row) in zip(names, frame.iterrows(), strict=True):
        cells = "".join(_shade(value, shades) for value in row)
        ahead = int(onsets[str(site)]) - account.spike.step
        share = "" if math.isnan(shares[str(site)]) else f"{shares[str(site)]:.0%}"
        lines.append(f"{tail(name, size):<{size}}  {cells}  {ahead:>+5d}  {share:>5}")
    first, last = frame.columns[0], frame.columns[-1]
    legend = (
        f"steps {first} to {last}: v the spike, | where it began; {shades[1:]} up to {2 * ONSET:g} robust standard "
        "deviations above the usual range; onset in steps from the spike; share of the squared gradient at the onset"
    )
    return [*lines, "", *textwrap.wrap(legend, width)]


def _shade(value: float, shades: str) -> str:
    if math.isnan(value):
        return " "
    level = min(value / (2 * ONSET), 1.0)
    return shades[math.ceil(level * (len(shades) - 1))]


def _none(record: Record) -> str:
    context = tables.context(record)
    if max(context["loss"].notna().sum(), context["grad_norm"].notna().sum()) <= MIN_HISTORY:
        return f"Too few steps to judge: a spike is seen against {MIN_HISTORY} steps before it at least."
    of = "loss" if context["loss"].notna().any() else "gradient norm, as no loss was told (scope.step(loss=loss))"
    return f"No spike in {len(context)} steps of the {of}. `--step N` tells what moved before any step."


def _plain(account: spikes.Account) -> dict[str, Any]:
    moved = [
        {"site": str(site), **{name: _number(value) for name, value in row.items()}}
        for site, row in account.moved.to_dict("index").items()
    ]
    return {
        "kind": account.kind,
        "spike": {name: _number(value) for name, value in account.spike._asdict().items()},
        "since": account.since,
        "sites": list(account.sites),
        "evidence": {name: _number(value) for name, value in account.evidence.items()},
        "moved": moved,
        "cause": RULES[account.kind].cause,
        "remedy": RULES[account.kind].remedy,
    }


def _number(value: Any) -> Any:
    """Return a value that JSON knows: what is not finite as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _draw(record: Record, told: list[spikes.Account], path: Path) -> str:
    """Draw the raster of the first account into a file, and return a line that says so."""
    frame = cells(record, told[0]) if told else pd.DataFrame()
    if frame.empty:
        return f"no picture: there is nothing to draw, so {path} was not written"
    draw = import_module("normscope.figures.draw")  # it loads matplotlib
    draw.draw(ONSETS, frame).figure.savefig(path, dpi=200)
    return f"picture  {path}"
