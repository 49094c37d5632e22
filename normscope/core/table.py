"""Table: findings as a terminal and a notebook show them. Names of layers are not trusted anywhere."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from html import escape

from normscope.core.finding import Finding, Verdict, worst_first

SYMBOLS: dict[Verdict, str] = {
    Verdict.FAILURE: "✕",
    Verdict.WARNING: "▲",
    Verdict.UNDECIDED: "?",
    Verdict.NOTE: "•",
    Verdict.OK: "✓",
}
_PLURALS = {Verdict.UNDECIDED: "undecided", Verdict.OK: "ok"}
COLORS: dict[Verdict, tuple[str, str]] = {  # in a terminal and in a notebook
    Verdict.FAILURE: ("31;1", "#b3261e"),
    Verdict.WARNING: ("33", "#9a6700"),
    Verdict.UNDECIDED: ("35", "#8250df"),
    Verdict.NOTE: ("34", "#0969da"),
    Verdict.OK: ("32", "#1a7f37"),
}
_HEADER = ("verdict", "id", "site", "step", "message")
_LEAST_MESSAGE = 44
_FEW = 16
_INDENT = " " * 4
_FOLLOWS = "└ "  # before the id of a finding that follows from the one above


class Findings(list[Finding]):
    """Findings, worst first: a list that prints as a table and shows itself in a notebook."""

    def __repr__(self) -> str:
        """Write the table, as wide as the terminal."""
        return findings_table(self, shutil.get_terminal_size().columns)

    def _repr_html_(self) -> str:
        """Write the table as HTML, with cause and remedy below each message."""
        if not self:
            return "<p>no findings</p>"
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in _HEADER)
        rows = "".join(_html_row(finding) for finding in worst_first(self))
        totals = ", ".join(count(verdict, n) for verdict, n in counted(self))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table><p>{totals}</p>"


def printable(text: str) -> str:
    """Make control characters, line breaks and direction marks visible, as Python writes them in a string.

    Args:
        text: any text.

    Returns:
        A text of one line.

    >>> printable(f"a{chr(0x202E)}b").isascii()
    True
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def can_print(text: str) -> bool:
    """Tell whether standard output has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


def count(verdict: Verdict, n: int) -> str:
    """Say how many findings have a verdict.

    Args:
        verdict: the verdict.
        n: how many.

    Returns:
        Number and word.

    >>> count(Verdict.NOTE, 1), count(Verdict.NOTE, 2), count(Verdict.OK, 3)
    ('1 note', '2 notes', '3 ok')
    """
    plural = _PLURALS.get(verdict, f"{verdict.value}s")
    return f"{n} {verdict.value if n == 1 else plural}"


def counted(findings: Sequence[Finding]) -> list[tuple[Verdict, int]]:
    """Count the findings of each verdict that occurs, worst first."""
    counts = [(verdict, sum(finding.verdict is verdict for finding in findings)) for verdict in Verdict]
    return [(verdict, n) for verdict, n in counts if n]


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
            below = textwrap.wrap(
                message, max(width, 24), initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False
            )
            text = [f"{row[0].ljust(sizes[0])}{row[1]}{place}{when}", *below]
        if painted:
            text[0] = f"\x1b[{COLORS[finding.verdict][0]}m{row[0]}\x1b[0m{text[0][len(row[0]) :]}"
        lines += text
    totals = ", ".join(count(verdict, n) for verdict, n in counted(findings))
    return "\n".join([*(line.rstrip() for line in lines), "", totals])


def _cells(finding: Finding) -> tuple[str, str, str, str]:
    site = printable(finding.site) + (f" +{len(finding.sites) - 1}" if len(finding.sites) > 1 else "")
    step = "" if finding.step is None else str(finding.step)
    name = f"{_FOLLOWS if finding.follows else ''}{printable(finding.id)}"
    return f"{SYMBOLS[finding.verdict]} {finding.verdict.value}", name, site, step


def _html_row(finding: Finding) -> str:
    verdict, *others = (escape(cell) for cell in _cells(finding))
    told = escape(printable(finding.message))
    if finding.verdict is not Verdict.OK:
        more = [text for text in (finding.cause, finding.remedy) if text]
        told += "".join(f"<br><small>{escape(printable(text))}</small>" for text in more)
    color = COLORS[finding.verdict][1]
    cells = [f"<td style='color:{color};white-space:nowrap'>{verdict}</td>", *(f"<td>{cell}</td>" for cell in others)]
    return f"<tr>{''.join(cells)}<td style='text-align:left'>{told}</td></tr>"


def _filled(begin: str, message: str, left: int) -> list[str]:
    """Write a message to the right of where its line begins."""
    first, *more = textwrap.wrap(message, left, break_on_hyphens=False) or [""]
    return [begin + first, *(" " * len(begin) + line for line in more)]


def _short(message: str, width: int) -> str:
    """Cut a message to what fits, nothing where not even a few words do."""
    return textwrap.shorten(message, width, placeholder=" …") if width >= _FEW else ""


def _joined(cells: Sequence[str], sizes: Sequence[int]) -> str:
    return "".join(cell.ljust(size) for cell, size in zip(cells, sizes, strict=True))
