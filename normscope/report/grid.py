"""Grid: entries by columns as text, Markdown, LaTeX or HTML; bold where an entry leads beyond doubt."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from normscope.core.table import printable
from normscope.report.text import number

_ARROWS = {"higher": "↑", "lower": "↓", "": ""}
_DIGITS = 2  # of the half width of an interval
_MISSING = "–"
_WIDTH = 118


@dataclass(frozen=True)
class Cell:
    """A mean with the half width of its interval, "" where there is none, and whether it is bold."""

    mean: str
    error: str = ""
    bold: bool = False


@dataclass(frozen=True)
class Grid:
    """A table of entries.

    Attributes:
        heads: a label and a direction ("higher", "lower" or "") a column.
        readings: what each column is measured on.
        rows: an entry and a cell a column.
        notes: what a reader must know, one sentence each.
    """

    heads: tuple[tuple[str, str], ...]
    readings: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    notes: tuple[str, ...] = ()


def cell(mean: float, low: float, high: float, bold: bool) -> Cell:
    """Write a mean and its interval, rounded alike: two digits of the half width.

    Args:
        mean: the mean; NaN where nothing was measured.
        low: lower end of its interval, NaN where there is none.
        high: upper end.
        bold: whether it leads.

    Returns:
        The cell.

    >>> cell(0.93421, 0.9211, 0.9473, False)
    Cell(mean='0.934', error='0.013', bold=False)
    """
    if math.isnan(mean):
        return Cell(_MISSING)
    half = (high - low) / 2
    if not math.isfinite(half) or half <= 1e-9 * abs(mean):
        return Cell(number(int(mean) if math.isfinite(mean) and mean == int(mean) else mean), "", bold)
    places = _DIGITS - 1 - math.floor(math.log10(half))
    if places > 6 or abs(mean) >= 1e6:
        return Cell(number(mean), f"{half:.1e}", bold)
    shown = max(places, 0)
    return Cell(f"{round(mean, places):.{shown}f}", f"{round(half, places):.{shown}f}", bold)


def text(grid: Grid, width: int = _WIDTH) -> str:
    """Write a grid for a terminal: as many columns beside each other as fit, the others below; * marks what is bold."""
    names = ["", *(printable(entry) for entry, _ in grid.rows)]
    first = max(map(len, names)) + 2
    blocks: list[list[list[str]]] = [[]]
    used = first
    for i, head in enumerate(grid.heads):
        column = [_head(head), *(_plain(cells[i], "*", "") for _, cells in grid.rows)]
        size = max(map(len, column)) + 2
        if used + size > width and blocks[-1]:
            blocks.append([])
            used = first
        used += size
        blocks[-1].append([value.ljust(size) for value in column])
    lines = []
    for block in blocks:
        for i, name in enumerate(names):
            lines.append((name.ljust(first) + "".join(column[i] for column in block)).rstrip())
        lines.append("")
    return "\n".join([*lines, *(printable(note) for note in grid.notes)]).rstrip()


def markdown(grid: Grid) -> str:
    """Write a grid as a Markdown table, notes below."""
    heads = ["entry", *(_escaped(_head(head)) for head in grid.heads)]
    rows = [[_escaped(entry), *(_plain(c, "**", "**") for c in cells)] for entry, cells in grid.rows]
    aligned = ["---", *("---:" for _ in grid.heads)]
    lines = [f"| {' | '.join(row)} |" for row in (heads, aligned, *rows)]
    return "\n".join([*lines, "", *(f"- {_escaped(note)}" for note in grid.notes)]).rstrip() + "\n"


def latex(grid: Grid) -> str:
    """Write a grid as a LaTeX tabular in the style of booktabs, notes as comments above it."""
    heads = ["", *(_tex(label) + _TEX_ARROWS[better] for label, better in grid.heads)]
    rows = [[_tex(entry), *map(_tex_cell, cells)] for entry, cells in grid.rows]
    comments = [f"% {printable(note)}" for note in ("needs \\usepackage{booktabs}", *grid.notes)]
    body = [r"\begin{tabular}{l" + "r" * len(grid.heads) + "}", r"\toprule", _tex_row(heads), r"\midrule"]
    return "\n".join([*comments, *body, *map(_tex_row, rows), r"\bottomrule", r"\end{tabular}"]) + "\n"


def to_html(grid: Grid) -> str:
    """Write a grid as an HTML table, notes below; what a column is measured on is its tooltip."""
    heads = "".join(
        f'<th scope="col" class="number" title="{html.escape(reading)}">{html.escape(_head(head))}</th>'
        for head, reading in zip(grid.heads, grid.readings, strict=True)
    )
    rows = "".join(
        f'<tr><th scope="row">{html.escape(printable(entry))}</th>{"".join(map(_html_cell, cells))}</tr>'
        for entry, cells in grid.rows
    )
    notes = "".join(f"<p>{html.escape(printable(note))}</p>" for note in grid.notes)
    table = f"<thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody>"
    return f'<table class="layers">{table}</table>{notes}'


FORMATS: Mapping[str, Callable[[Grid], str]] = {"text": text, "markdown": markdown, "latex": latex, "html": to_html}


def _head(head: tuple[str, str]) -> str:
    label, better = head
    return f"{label} {_ARROWS[better]}".rstrip()


def _plain(value: Cell, begin: str, end: str) -> str:
    written = f"{value.mean} ± {value.error}" if value.error else value.mean
    return f"{begin}{written}{end}" if value.bold else written


def _html_cell(value: Cell) -> str:
    written = html.escape(_plain(value, "", ""))
    return f'<td class="number">{f"<strong>{written}</strong>" if value.bold else written}</td>'


def _escaped(name: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", printable(name))


_TEX_ARROWS = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "": ""}
_TEX_SIGNS = {
    "\\": r"\textbackslash{}",
    "κ": r"$\kappa$",
    "₅₀": r"$_{50}$",
    "±": r"$\pm$",
    "∞": r"$\infty$",
    "–": "--",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}
_TEX_SPECIAL = re.compile("|".join(map(re.escape, _TEX_SIGNS)))


def _tex(name: str) -> str:
    return _TEX_SPECIAL.sub(lambda found: _TEX_SIGNS[found[0]], printable(name))


def _tex_cell(value: Cell) -> str:
    mean = f"\\textbf{{{_tex(value.mean)}}}" if value.bold else _tex(value.mean)
    return f"{mean} $\\pm$ {_tex(value.error)}" if value.error else mean


def _tex_row(values: Sequence[str]) -> str:
    return " & ".join(values) + r" \\"
