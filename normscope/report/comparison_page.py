"""The page of a comparison: one HTML file without scripts or requests, in the style of the page of a run."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined

from normscope.core.table import printable
from normscope.figures.comparison import Overlay
from normscope.figures.palette import CURVES, REFERENCE, RULE
from normscope.report.grid import Grid, to_html
from normscope.report.text import breakable, source


@dataclass(frozen=True)
class Told:
    """A finding of an entry at its best learning rate: its id, verdict and message, and in how many of its runs."""

    entry: str
    id: str
    verdict: str
    message: str
    runs: int
    of: int


@dataclass(frozen=True)
class Difference:
    """An entry against the first in one column, as text, and whether the interval excludes zero."""

    entry: str
    column: str
    text: str
    separated: bool


Checked = tuple[str, str, tuple[tuple[str, str, str], ...]]


def comparison_page(
    entries: Sequence[str],
    facts: Sequence[str],
    grid: Grid,
    *,
    pictures: Sequence[tuple[Overlay, str]],
    differences: Sequence[Difference],
    told: Sequence[Told],
    checks: Sequence[Checked],
) -> str:
    """Write the page.

    Args:
        entries: the entries in order.
        facts: phrases about the runs.
        grid: the table of means.
        pictures: pictures with their SVG elements.
        differences: paired differences to the first entry.
        told: findings at the best learning rates.
        checks: what was seen of layers checked before: entry, class, rows.

    Returns:
        HTML.
    """
    columns = list(dict.fromkeys(item.column for item in differences))
    paired: Mapping[tuple[str, str], Difference] = {(item.entry, item.column): item for item in differences}
    return (
        _environment()
        .get_template("comparison.html")
        .render(
            entries=entries,
            facts=facts,
            table=to_html(Grid(grid.heads, grid.readings, grid.rows)),
            readings=list(zip((label for label, _ in grid.heads), grid.readings, strict=True)),
            notes=grid.notes,
            pictures=pictures,
            columns=columns,
            paired=paired,
            told=told,
            checks=checks,
            cited=source("wortsman2023"),
            style=resources.files("normscope.report").joinpath("templates/style.css").read_text(encoding="utf-8"),
            curves=CURVES,
            reference=REFERENCE,
            rule=RULE,
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        loader=PackageLoader("normscope.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
    )
    environment.filters.update(breakable=breakable)
    return environment
