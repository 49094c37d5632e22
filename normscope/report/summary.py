"""Summary: what the page and its Markdown twin say alike about runs, findings, provenance and events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby

import pandas as pd

from normscope.core.finding import Finding, Verdict, worst_first
from normscope.core.record import Record
from normscope.metrics import tables
from normscope.report.text import number, words

MOST_EVENTS = 200
_IN_HEADER = ("run", "model", "parameters", "norms", "structure")


@dataclass(frozen=True)
class Group:
    """Findings of one id, run and verdict, and what follows from them: the worst is told in full, others may be folded.

    Attributes:
        first: the worst.
        rest: the others.
        following: findings that follow from it.
    """

    first: Finding
    rest: tuple[Finding, ...]
    following: tuple[Finding, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of all its own findings, each once, the worst first."""
        every = [site for finding in (self.first, *self.rest) for site in (finding.site, *finding.sites) if site]
        return tuple(dict.fromkeys(every))


def groups(findings: Sequence[Finding]) -> list[Group]:
    """Group findings by verdict, id and run, worst first, with what follows from each; what is ok is left out.

    Args:
        findings: the findings.

    Returns:
        The groups, in the order of their first findings.
    """
    shown = [finding for finding in worst_first(findings) if finding.verdict is not Verdict.OK]
    known = {(finding.run, finding.id) for finding in shown}
    parts: dict[tuple[Verdict, str, str], list[Finding]] = {}
    following: dict[tuple[str, str], list[Finding]] = {}
    for finding in shown:
        root = (finding.run, finding.follows)
        if root in known:
            following.setdefault(root, []).append(finding)
        else:
            parts.setdefault((finding.verdict, finding.id, finding.run), []).append(finding)
    return [
        Group(first, tuple(rest), tuple(following.pop((first.run, first.id), ()))) for first, *rest in parts.values()
    ]


def passed(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings that are ok, by id."""
    return sorted((f for f in findings if f.verdict is Verdict.OK), key=lambda f: (f.id, f.run, f.site))


def runs(record: Record) -> list[tuple[str, list[str]]]:
    """Say in a few phrases what each run is.

    Args:
        record: any record.

    Returns:
        Name of the run, and phrases: model, steps, parameters, normalization layers.
    """
    return [(str(part.names[0]), _phrases(part)) for part in tables.split(record) if part.runs]


def _phrases(record: Record) -> list[str]:
    run, steps = record.runs[0], record.context["step"].nunique()
    phrases = [str(run["model"])] if run.get("model") else []
    sampled = len(record.steps)
    phrases.append(f"{number(steps)} step{'' if steps == 1 else 's'}, {number(sampled)} sampled")
    if run.get("parameters") is not None:
        phrases.append(f"{number(run['parameters'])} parameters")
    if run.get("norms") is not None:
        kinds = tables.layers(record)["norm"].dropna()
        named = f" ({', '.join(dict.fromkeys(map(str, kinds)))})" if len(kinds) else ""
        phrases.append(f"{number(run['norms'])} normalization layer{'' if run['norms'] == 1 else 's'}{named}")
    return phrases


def provenance(run: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return where a run comes from, as pairs of a word and a text.

    Args:
        run: one mapping of `Record.runs`.

    Returns:
        The pairs, without what the header says already.
    """
    return [(words(name), _value(name, value)) for name, value in run.items() if name not in _IN_HEADER and value != ""]


def _value(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if name in ("created", "closed") and isinstance(value, (int, float)):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M UTC")
    if name == "segments" and isinstance(value, list):
        return ", ".join(f"from step {part['step']}: {_value('created', part['created'])}" for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if name == "seed" else number(value)


def events(record: Record) -> tuple[list[tuple[str, ...]], int]:
    """Return what went wrong or was left out, equal messages of one kind and site told once.

    Args:
        record: any record.

    Returns:
        Rows of step (or first step and how often), kind, site, message; and how many further rows there are.
    """
    frame = record.events if len(record.events) else pd.DataFrame(columns=["step", "kind", "site", "message"])
    keys = [(row.kind, row.site, row.message) for row in frame.itertuples()]
    rows = []
    ordered = sorted(zip(keys, frame["step"], strict=True), key=lambda item: (str(item[0]), item[1]))
    for (kind, site, message), same in groupby(ordered, key=lambda item: item[0]):
        steps = [step for _, step in same]
        when = number(int(steps[0])) + (f", {len(steps)} times" if len(steps) > 1 else "")
        rows.append((int(steps[0]), (when, str(kind), str(site), str(message))))
    rows.sort(key=lambda row: row[0])
    return [row for _, row in rows[:MOST_EVENTS]], max(0, len(rows) - MOST_EVENTS)
