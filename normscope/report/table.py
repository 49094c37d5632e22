"""The findings as a table for a terminal."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence

from normscope.core.finding import Finding, Verdict, worst_first
from normscope.report.text import SYMBOLS, count, counted, printable

COLORS = {
    Verdict.FAILURE: "31;1",
    Verdict.WARNING: "33",
    Verdict.UNDECIDED: "35",
    Verdict.NOTE: "34",
    Verdict.OK: "32",
}
_HEADER = ("verdict", "id", "site", "step", "message")
_LEAST_MESSAGE = 44
_FEW = 16
_INDENT = " " * 4
_FOLLOWS = "└ "  # before the id of a finding that follows from the one above


def findings_table(findings: Sequence[Finding], width: int, color: bool | None = None) -> str:
    """Write findings as a table, worst first, each message wrapped to what is left of the width.

    What is ok takes one line: its message is cut at the end of it.

    Args:
        findings: the findings.
        width: columns of the terminal. Where they leave a message less than 44, it goes below its finding.
        color: whether to color the verdicts; by default if standard output is a terminal and NO_COLOR is not set.

    Returns:
        The table, then a line that counts the verdicts.
    """
    if not findings:
        return "no findings"
    painted = sys.stdout.isatty() and "NO_COLOR" not in os.environ if color is None else color
    ordered = worst_first(findings)
    cells = [_cells(finding) for finding in ordered]
    sizes = [max(map(len, column)) + 2 for column in zip(_HEADER[:4], *cells, strict=True)]
    beside = width - sum(sizes) >= _LEAST_MESSAGE
    lines = [_joined(_HEADER[:4], sizes) + _HEADER[4]] if beside else []
    for finding, row in zip(ordered, cells, strict=True):
        message = printable(finding.message)
        if beside:
            left = width - sum(sizes)
            text = _filled(
                _joined(row, sizes), _short(message, left) if finding.verdict is Verdict.OK else message, left
            )
        elif finding.verdict is Verdict.OK:
            begin = f"{row[0].ljust(sizes[0])}{row[1]}  "
            text = [begin + _short(message, width - len(begin))]
        else:
            place = f"  at {row[2]}" if row[2] else ""
            when = f"  step {row[3]}" if row[3] else ""
            below = textwrap.wrap(message, max(width, 24), initial_indent=_INDENT, subsequent_indent=_INDENT)
            text = [f"{row[0].ljust(sizes[0])}{row[1]}{place}{when}", *below]
        if painted:
            text[0] = f"\x1b[{COLORS[finding.verdict]}m{row[0]}\x1b[0m{text[0][len(row[0]) :]}"
        lines += text
    totals = ", ".join(count(verdict, n) for verdict, n in counted(findings))
    return "\n".join([*(line.rstrip() for line in lines), "", totals])


def _cells(finding: Finding) -> tuple[str, str, str, str]:
    site = printable(finding.site) + (f" +{len(finding.sites) - 1}" if len(finding.sites) > 1 else "")
    step = "" if finding.step is None else str(finding.step)
    name = f"{_FOLLOWS if finding.follows else ''}{printable(finding.id)}"
    return f"{SYMBOLS[finding.verdict]} {finding.verdict.value}", name, site, step


def _filled(begin: str, message: str, left: int) -> list[str]:
    """Write a message to the right of where its line begins."""
    first, *more = textwrap.wrap(message, left) or [""]
    return [begin + first, *(" " * len(begin) + line for line in more)]


def _short(message: str, width: int) -> str:
    """Cut a message to what fits, nothing where not even a few words do."""
    return textwrap.shorten(message, width, placeholder=" …") if width >= _FEW else ""


def _joined(cells: Sequence[str], sizes: Sequence[int]) -> str:
    return "".join(cell.ljust(size) for cell, size in zip(cells, sizes, strict=True))
