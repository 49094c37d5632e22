"""The survey's catalog: its 245 works, what each of them asks for, and where that is found."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib import resources

# name in the catalog -> "package.module:object"; a name stands here once its object runs and a test checks it
PROVIDED: dict[str, str] = {}


@dataclass(frozen=True)
class Work:
    """One work of the survey, as the catalog lists it.

    Attributes:
        id: "S000" to "S244".
        number: number of the survey's section, as "1.2.1".
        chapter: "methodology", "analysis" or "application".
        section: title of the section.
        subsection: title of the subsection, "" where there is none.
        title: title of the work.
        venue: where it appeared.
        year: year of publication.
        paper: address of the paper, "" where there is none.
        provides: names of what it asks for, as "layer:batch"; several works may share one.
    """

    id: str
    number: str
    chapter: str
    section: str
    subsection: str
    title: str
    venue: str
    year: int
    paper: str
    provides: tuple[str, ...]


@functools.cache
def works() -> tuple[Work, ...]:
    """Return all works in the survey's order; the catalog is read once.

    >>> works()[11].title, works()[11].provides
    ('Layer Normalization', ('layer:layer',))
    """
    text = resources.files("normscope.core").joinpath("data/catalog.csv").read_text(encoding="utf-8")
    return tuple(_work(row) for row in csv.DictReader(text.splitlines()))


def _work(row: dict[str, str]) -> Work:
    fields = {name: value for name, value in row.items() if name not in {"year", "provides"}}
    return Work(**fields, year=int(row["year"]), provides=tuple(row["provides"].split()))


def catalog() -> list[dict[str, object]]:
    """Return the public JSON form of the catalog.

    Returns:
        A list of `{id, chapter, section, title, year, provides: [{name, object, status}]}`, one per work; `object` is
        an import path "package.module:object" and `status` "done", or they are None and "planned".
    """
    return [
        {
            "id": work.id,
            "chapter": work.chapter,
            "section": work.section,
            "title": work.title,
            "year": work.year,
            "provides": [_provision(name) for name in work.provides],
        }
        for work in works()
    ]


def _provision(name: str) -> dict[str, str | None]:
    return {"name": name, "object": PROVIDED.get(name), "status": "done" if name in PROVIDED else "planned"}
