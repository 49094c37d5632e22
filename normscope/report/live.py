"""Live: one frame of a run for a terminal: how far it is, its curves, its worst findings, its layers as bars."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from normscope.core.finding import Finding, Verdict, worst_first
from normscope.core.record import Record
from normscope.core.table import COLORS, SYMBOLS, count, counted, printable
from normscope.metrics import conditioning, propagation, tables
from normscope.report.text import number

_NARROW = 72  # columns below which a finding takes two lines and a layer one bar
_FINDINGS = 6
_LEAST_LAYERS = 4
_LEAST_CURVE = 12  # characters; where they are not left, the extremes go
_CURVES = (("loss", "loss"), ("grad_norm", "gradient norm"), ("lr", "learning rate"))
_SHOWN = (Verdict.FAILURE, Verdict.WARNING, Verdict.NOTE)


class Style(NamedTuple):
    """What a terminal can show.

    Attributes:
        width: columns.
        height: lines; None for a frame as long as it gets.
        color: whether verdicts are colored.
        blocks: whether it knows block characters; if not, bars are made of "#".
    """

    width: int = 80
    height: int | None = None
    color: bool = False
    blocks: bool = True


def live(record: Record, findings: Sequence[Finding], written: float, now: float, style: Style) -> str:
    """Draw a run as it is.

    Args:
        record: record of one run.
        findings: its findings.
        written: when its file was last written, in seconds since the epoch.
        now: the present time.
        style: what the terminal can show.

    Returns:
        Lines of at most `style.width` characters, not counting colors.
    """
    context = tables.context(record)
    lines = [*_head(record, len(context), written, now, style.width), "", *_curves(context, style)]
    lines += ["", *_findings(findings, style)]
    left = 1000 if style.height is None else max(style.height - len(lines) - 3, _LEAST_LAYERS)
    bars = _layers(record, left, style)
    lines += ["", *bars] if bars else []
    return "\n".join(lines[: None if style.height is None else style.height - 1])


def sparkline(values: Sequence[float] | np.ndarray, width: int, blocks: bool = True) -> str:
    """Draw numbers as a line of blocks, the mean of each bucket from the least to the largest.

    Args:
        values: the numbers; those that are not finite leave a gap.
        width: characters at most.
        blocks: whether to use block characters.

    Returns:
        One character a bucket.

    >>> sparkline([0.0, 1.0, 2.0, 3.0], 4), sparkline([5.0, 5.0], 4), sparkline([0.0, float("nan"), 1.0], 4)
    ('▁▃▆█', '▄▄', '▁ █')
    """
    levels = "▁▂▃▄▅▆▇█" if blocks else "_.-=+*%#"
    array = np.asarray(values, float)
    parts = np.array_split(np.where(np.isfinite(array), array, np.nan), max(min(width, len(array)), 1))
    means = [float(np.nanmean(part)) if np.isfinite(part).any() else np.nan for part in parts]
    finite = [mean for mean in means if mean == mean]
    if not finite:
        return " " * len(means)
    low, high = min(finite), max(finite)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    middle = 0 if scale else len(levels) // 2 - 1
    return "".join(" " if mean != mean else levels[round(middle + (mean - low) * scale)] for mean in means)


def _head(record: Record, steps: int, written: float, now: float, width: int) -> list[str]:
    run = record.runs[0]
    said = [str(run["run"]), str(run.get("model", "model"))]
    said += [
        f"{number(run[key])} {word}" for key, word in (("parameters", "parameters"), ("norms", "norms")) if key in run
    ]
    segment = _segment(run)
    seconds = max(written - float(segment["created"]), 0.0)
    pace = (steps - int(segment["step"])) / seconds if seconds else 0.0
    closed = run.get("closed")
    idle = max(now - written, 0.0)
    state = f"closed {_duration(now - float(str(closed)))} ago" if closed else f"last written {_duration(idle)} ago"
    going = [f"{number(steps)} step{'' if steps == 1 else 's'}", f"{number(len(record.steps))} sampled"]
    going += [f"{pace:.3g} steps/s over {_duration(seconds)}", state]
    return [line for phrases in (said, going) for line in textwrap.wrap(printable("  ".join(phrases)), width)]


def _segment(run: Mapping[str, object]) -> dict[str, float]:
    """Return the first step and the beginning of a run, or of what was last resumed of it."""
    segments = run.get("segments")
    last: Mapping[str, Any] = segments[-1] if isinstance(segments, list) else run
    return {"step": float(last.get("step", 0)), "created": float(last.get("created", 0.0))}


def _duration(seconds: float) -> str:
    """Write a time in its two largest units."""
    minutes, rest = divmod(int(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _curves(context: pd.DataFrame, style: Style) -> list[str]:
    """Draw what the optimizer sees; a curve of which nothing was recorded is left out."""
    rows = []
    for column, name in _CURVES:
        known = context[column].dropna() if column in context else pd.Series([], dtype=float)
        if len(known):
            last, finite = float(known.iloc[-1]), known[np.isfinite(known)]
            ends = f"  {number(float(finite.min()))} to {number(float(finite.max()))}" if len(finite) else ""
            begin = f"{name:<14}{number(last):>10}  "
            room = style.width - len(begin)
            ends = ends if room - len(ends) >= _LEAST_CURVE else ""
            line = sparkline(known.to_numpy(float), max(room - len(ends), 1), style.blocks)
            rows.append(_cut(begin + line + ends, style.width))
    return rows or ["no step yet"]


def _findings(findings: Sequence[Finding], style: Style) -> list[str]:
    """Tell the worst findings, one or two lines each, and how many there are."""
    told = [finding for finding in worst_first(findings) if finding.verdict in _SHOWN][:_FINDINGS]
    lines = []
    for finding in told:
        verdict = f"{SYMBOLS[finding.verdict]} {finding.verdict.value}"
        place = f" at {finding.site}" if finding.site else ""
        begin = f"{verdict:<11}{finding.id}{place}"
        message = printable(finding.message)
        if style.width < _NARROW:
            rows = [_cut(printable(begin), style.width), _cut(f"    {message}", style.width)]
        else:
            rows = [_cut(f"{printable(begin)}  {message}", style.width)]
        if style.color:
            rows[0] = f"\x1b[{COLORS[finding.verdict][0]}m{verdict}\x1b[0m{rows[0][len(verdict) :]}"
        lines += rows
    totals = ", ".join(count(verdict, n) for verdict, n in counted(findings)) or "no findings"
    return [*lines, _cut(totals, style.width)]


def _layers(record: Record, rows: int, style: Style) -> list[str]:
    """Draw the weighted layers in order of execution: size of the gradient, condition number of the input."""
    gradients = _last(tables.table(record, "rms", role="gradient"))
    conditions = _last(conditioning.condition_numbers(record, 50, carried=True))
    kinds = tables.layers(record)["class"].astype(str)
    weighted = [str(module) for module, kind in kinds.items() if propagation.weighted(kind)]
    modules = [module for module in weighted or gradients if module in gradients]
    if not modules:
        return []
    thin = np.unique(np.linspace(0, len(modules) - 1, min(rows, len(modules))).round().astype(int))
    chosen = [modules[i] for i in thin]
    title = "layer" if len(chosen) == len(modules) else f"layer ({len(chosen)} of {len(modules)})"
    columns = {title: [printable(module) or "(model)" for module in chosen]}
    size = min(max(map(len, (title, *columns[title]))), style.width // 3)
    both = bool(conditions) and style.width >= _NARROW
    room = (style.width - size) // (1 + both) - 2
    columns["gradient rms"] = _bars([gradients[module] for module in chosen], room, style.blocks)
    if both:
        columns["kappa50 of input"] = _bars([conditions.get(m, np.nan) for m in chosen], room, style.blocks)
    named, *others = ([head, *cells] for head, cells in columns.items())
    lines = [
        f"{tail(name, size):<{size}}  " + "  ".join(cells)
        for name, *cells in zip(named, *_padded(others, room), strict=True)
    ]
    return [line.rstrip() for line in lines]


def _padded(columns: Sequence[Sequence[str]], width: int) -> list[list[str]]:
    return [[cell[:width].ljust(width) for cell in cells] for cells in columns]


def _last(frame: pd.DataFrame) -> dict[str, float]:
    """Return the last value of each module's first site that has one."""
    values = frame.ffill().iloc[-1].dropna() if len(frame) else pd.Series([], dtype=float)
    found: dict[str, float] = {}
    for site, value in values.items():
        found.setdefault(tables.module_of(str(site)), float(value))
    return found


def _bars(values: Sequence[float], width: int, blocks: bool) -> list[str]:
    """Draw positive numbers as bars of their logarithms, from one character for the least, each before its number."""
    texts = ["" if value != value else f"{value:.2g}" for value in values]
    label = max(map(len, texts)) + 1
    room = max(width - label, 1)
    array = np.asarray(values, float)
    logs = np.log(np.where(np.isfinite(array) & (array > 0), array, np.nan))
    known = logs[np.isfinite(logs)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
    sizes = [
        0 if log != log else 1 + round((room - 1) * (log - low) / (high - low)) if high > low else 1 for log in logs
    ]
    mark = "█" if blocks else "#"
    return [f"{mark * size:<{room}}{text:>{label}}" for size, text in zip(sizes, texts, strict=True)]


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: max(width - 1, 0)] + "…"


def tail(name: str, width: int) -> str:
    """Keep the end of a name that is longer than some characters: it tells layers apart."""
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]
