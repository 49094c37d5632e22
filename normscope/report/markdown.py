"""The Markdown twin of the page: for a terminal, a pull request, or a colleague's mail."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from normscope.core.finding import Finding
from normscope.core.illustration import illustrations
from normscope.core.record import Record
from normscope.core.table import SYMBOLS, count, counted, printable
from normscope.report.layers import COLUMNS, layers
from normscope.report.summary import events, groups, passed, provenance, runs
from normscope.report.text import number, source, words

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$#])")


def markdown(record: Record, findings: Sequence[Finding]) -> str:
    """Write a record and its findings as Markdown, in the order of the page.

    Args:
        record: what was measured.
        findings: what is concluded from it.

    Returns:
        The text; names of layers are literal in it, whatever characters they have.
    """
    lines = ["# normscope report", ""]
    for run, phrases in runs(record):
        lines += [f"**{_text(run)}**: {_text(' · '.join(phrases))}", ""]
    totals = ", ".join(f"{SYMBOLS[verdict]} {count(verdict, n)}" for verdict, n in counted(findings))
    lines += [totals or "No findings.", ""]
    for group in groups(findings):
        for finding in (group.first, *group.rest, *group.following):
            lines += _finding(finding)
    good = passed(findings)
    if good:
        lines += ["## Looked at, and fine", "", *(f"- {_text(f.message)} ({_code(f.id)})" for f in good), ""]
    rows = [[_code(layer.site), *(_text(cell.text) for cell in layer.cells)] for layer in layers(record)]
    lines += ["## Layers", "", *_table(["layer", *(name for name, _ in COLUMNS)], rows), ""]
    lines += _run(record)
    return "\n".join(lines).rstrip() + "\n"


def _finding(finding: Finding) -> list[str]:
    place = f" at {_code(finding.site)}" if finding.site else ""
    when = "" if finding.step is None else f", step {finding.step}" if place else f" at step {finding.step}"
    others = list(dict.fromkeys(site for site in finding.sites if site != finding.site))
    lines = [
        f"## {SYMBOLS[finding.verdict]} {finding.verdict.value}: {_text(finding.message)}",
        "",
        f"{_code(finding.id)}{place}{when}",
        "",
    ]
    if others:
        shown = ", ".join(_code(site) for site in others[:12])
        lines += [f"Also: {shown}{f' and {len(others) - 12} more' if len(others) > 12 else ''}", ""]
    lines += [f"- {_text(words(name))}: {_text(number(value))}" for name, value in finding.evidence.items()]
    if finding.threshold is not None:
        origin = f" ({_cited(finding.threshold_source)})" if finding.threshold_source else ""
        lines.append(f"- threshold: {number(finding.threshold)}{origin}")
    told = (("Cause", _text(finding.cause)), ("Remedy", _text(finding.remedy)), ("Source", _cited(finding.source)))
    for word, text in told:
        lines += ["", f"**{word}.** {text}"] if text else []
    for figure in illustrations(finding.id):
        lines += [
            "",
            f"**Figure {figure.id}.** {_text(figure.title)}: {_text(figure.shows)} ({_code(figure.command)}).",
        ]
    return [*lines, ""]


def _run(record: Record) -> list[str]:
    lines = ["## Run", ""]
    for run in record.runs:
        lines += [f"- {_text(name)}: {_text(value)}" for name, value in provenance(run)]
    rows, more = events(record)
    if rows:
        cells = [
            [_text(when), _text(kind), _code(site) if site else "", _text(said)] for when, kind, site, said in rows
        ]
        lines += ["", "## Events", "", *_table(["step", "kind", "site", "message"], cells)]
        lines += ["", f"{more} more events are in the record."] if more else []
    return lines


def _cited(key: str) -> str:
    text, address = source(key)
    return f"[{_text(text)}](<{address}>)" if address else _text(text)


def _text(text: str) -> str:
    """Escape what Markdown or HTML would take for markup."""
    return _SPECIAL.sub(r"\\\1", printable(text))


def _code(text: str) -> str:
    """Write a name as code; the fence is longer than any run of backticks in it. A bar would end a cell of a table."""
    name = printable(text)
    if "|" in name:
        return _text(name)
    fence = "`" * (max((len(run) for run in re.findall("`+", name)), default=0) + 1)
    pad = " " if name.startswith("`") or name.endswith("`") else ""
    return f"{fence}{pad}{name}{pad}{fence}"


def _table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> list[str]:
    names = list(header)
    return [f"| {' | '.join(row)} |" for row in [names, ["---"] * len(names), *rows]]
