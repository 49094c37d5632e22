"""The outline of the survey: the works of a section, what provides them, and what became of their claims."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence

from normscope.cli.figures import figure_lines
from normscope.core.errors import ArgumentError
from normscope.core.gallery import Reproduction, of_work, tally
from normscope.core.survey import Section, Work, entry, outline


def show(number: str, *, status: str | None, as_json: bool, width: int) -> int:
    """Print a section, or the outline where no section is named.

    Args:
        number: number of a section or chapter, "" for the outline.
        status: only works with something of this status.
        as_json: whether to print JSON.
        width: columns of the terminal.

    Returns:
        0.

    Raises:
        ArgumentError: if the survey has no such section; the outline is printed then too.
    """
    sections = {section.number: section for section in outline()}
    found = sections.get(number.rstrip("."))
    if found is None:
        print(json.dumps([_summary(item) for item in sections.values()], indent=1) if as_json else _outline(width))
        if number:
            raise ArgumentError(f"section={number!r} is unknown; the outline above has {', '.join(sections)}.")
        return 0
    works = [work for work in found.works if status is None or status in {item["status"] for item in _provided(work)}]
    if as_json:
        print(json.dumps([_row(work) for work in works], indent=1, ensure_ascii=False))
    else:
        print(_walk(found, works, width))
    return 0


def _provided(work: Work) -> list[dict[str, str]]:
    provided: list[dict[str, str]] = entry(work)["provides"]  # type: ignore[assignment]  # one of the row's values
    return provided


def _figures(works: Sequence[Work]) -> list[Reproduction]:
    return list({item.id: item for work in works for item in of_work(work)}.values())


def _summary(section: Section) -> dict[str, object]:
    ids = [item.id for item in _figures(section.works)]
    return {"number": section.number, "title": section.title, "works": len(section.works), "figures": ids}


def _row(work: Work) -> dict[str, object]:
    figures = [
        {
            "id": item.id,
            "title": item.title,
            "claims": [{"statement": claim.statement, "verdict": claim.verdict} for claim in item.claims],
            "command": _command(item),
        }
        for item in of_work(work)
    ]
    return {**entry(work), "number": work.number, "figures": figures}


def _command(item: Reproduction) -> str:
    return f"normscope figures {item.id}"


def _counts(works: Sequence[Work]) -> str:
    figures = _figures(works)
    words = f"{len(works)} work{'' if len(works) == 1 else 's'}"
    if not figures:
        return words
    claims = [claim for item in figures for claim in item.claims]
    return f"{words}, {len(figures)} figure{'' if len(figures) == 1 else 's'}: {tally(claims)}"


def _outline(width: int) -> str:
    lines: list[str] = []
    for section in outline():
        indent = "  " * section.number.count(".")
        text = f"{section.number:<6} {section.title} ({_counts(section.works)})"
        lines += ["", *_filled(text, width, indent)] if not indent else _filled(text, width, indent)
    return "\n".join([*lines[1:], "", "normscope catalog --section NUMBER walks one."])


def _filled(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent + " " * 7)


def _walk(section: Section, works: Sequence[Work], width: int) -> str:
    lines = [f"{section.number} {section.title}", _counts(works)]
    told: set[str] = set()
    for work in works:
        lines += ["", *_work(work, width)]
        for item in of_work(work):
            first, *claims = figure_lines(item, width)
            lines += [first, *(["         claims above"] if item.id in told else claims), f"         {_command(item)}"]
            told.add(item.id)
    return "\n".join(lines)


def _work(work: Work, width: int) -> list[str]:
    lines = _filled(f"{work.id} {work.year} {work.title}", width, "")
    lines += [f"     {work.paper}"] if work.paper else []
    provided = [item for item in _provided(work) if not item["name"].startswith("figure:")]
    return [*lines, *(f"     {item['name']}: {_usage(**item)}" for item in provided)]


def _usage(name: str, object: str | None, status: str) -> str:
    """Write an object as one types it; what builds by name gets the name."""
    if object is None:
        return status
    call = object.replace(":", ".")
    return f'{call}("{name.partition(":")[2]}", ...)' if object.endswith(":build") else call
