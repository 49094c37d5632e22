"""Gallery: the survey's analysis figures as last regenerated, with what became of each claim of the literature.

The data are written by `python -m analyses gallery` from the reports that are committed beside the package.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from normscope.core.errors import unknown_name
from normscope.core.source import cite
from normscope.core.survey import Work

VERDICTS = ("reproduced", "partly", "not reproduced", "not testable at this scale")


@dataclass(frozen=True)
class Claim:
    """A claim of the literature, judged over several seeds.

    Attributes:
        statement: the claim, one sentence.
        source: key of the bibliography, then where in the work.
        statistic: what was computed for each seed.
        expected: the expected value, or a bound as ">= 2".
        tolerance: largest absolute distance from an expected value, 0 for a bound.
        measured: the median over seeds.
        spread: the largest minus the smallest over seeds.
        seeds: number of seeds.
        verdict: one of `VERDICTS`.
        reason: why it was not reproduced in full, "" where it was.
    """

    statement: str
    source: str
    statistic: str
    expected: float | str
    tolerance: float
    measured: float
    spread: float
    seeds: int
    verdict: str
    reason: str = ""

    def as_dict(self) -> dict[str, object]:
        """Return the JSON form; a number that is not finite is None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Reproduction:
    """A figure of the survey's analyses, regenerated.

    Attributes:
        id: chapter and number, as "SI-4".
        chapter: title of the gallery's chapter.
        title: title of the figure.
        caption: what is drawn, in which setting, and what to see.
        sources: keys of the bibliography: the works whose figure or claims these are.
        names: what it is called in the survey's catalog, as "figure:spherical-motion-dynamics".
        claims: the claims, judged.
    """

    id: str
    chapter: str
    title: str
    caption: str
    sources: tuple[str, ...]
    names: tuple[str, ...]
    claims: tuple[Claim, ...]

    @property
    def picture(self) -> str:
        """Path of the picture, from the repository's root."""
        return f"reports/{self.id}/figure.png"

    @property
    def command(self) -> str:
        """What regenerates it, in the repository's root."""
        return f"python -m analyses run {self.id}"

    def as_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        plain = {"claims": [claim.as_dict() for claim in self.claims], "picture": self.picture, "command": self.command}
        return asdict(self) | plain


@functools.cache
def reproductions() -> tuple[Reproduction, ...]:
    """Return all figures in the order of the gallery; the data are read once.

    >>> reproductions()[3].id, reproductions()[3].title
    ('SI-1', 'A factor on the weights changes nothing but the step')
    """
    text = resources.files("normscope.core").joinpath("data/figures.json").read_text(encoding="utf-8")
    return tuple(_reproduction(row) for row in json.loads(text))


def _reproduction(row: dict[str, Any]) -> Reproduction:
    claims = tuple(Claim(**claim) for claim in row["claims"])
    return Reproduction(
        row["id"], row["chapter"], row["title"], row["caption"], tuple(row["sources"]), tuple(row["names"]), claims
    )


def reproduction(id: str) -> Reproduction:
    """Return a figure by its id; an unknown one is an `ArgumentError` that names the closest.

    Args:
        id: as "SI-4", in any case.

    Returns:
        The figure.
    """
    known = {item.id: item for item in reproductions()}
    _check("id", id.upper(), known)
    return known[id.upper()]


def named(name: str) -> tuple[Reproduction, ...]:
    """Return the figures that show what the survey's catalog calls by a name; an unknown one is an `ArgumentError`.

    Args:
        name: as "figure:rank-collapse" or "rank-collapse".

    Returns:
        The figures, at least one.

    >>> [item.id for item in named("rank-collapse")]
    ['CO-16']
    """
    full = f"figure:{name.removeprefix('figure:')}"
    _check("name", full, sorted({known for item in reproductions() for known in item.names}))
    return tuple(item for item in reproductions() if full in item.names)


def _check(argument: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise unknown_name(argument, name, known, "`normscope figures` lists all figures with their titles.")


def of_work(work: Work) -> tuple[Reproduction, ...]:
    """Return the figures that come from a work: those that the catalog asks of it, and those that name it as source.

    Args:
        work: a work of the survey.

    Returns:
        The figures, in the order of the gallery.
    """
    return tuple(
        item
        for item in reproductions()
        if set(item.names) & set(work.provides) or work.id in [cite(key).key for key in item.sources]
    )


def tally(claims: Iterable[Claim]) -> str:
    """Return the verdicts in words, as "3 reproduced, 1 partly"."""
    verdicts = [claim.verdict for claim in claims]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS if verdict in verdicts)
