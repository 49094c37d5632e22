"""Figure: statistics are data to data, marks only draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from normscope.core.record import Record


@dataclass(frozen=True)
class Figure:
    """A picture: which columns `prepare` yields and how they are drawn.

    `prepare(record, sites)` takes the record of one run and returns a tidy frame with exactly `columns`, without rows
    where the record does not hold what the picture needs. What the picture means is in that frame, so that it can be
    tested, exported and drawn by matplotlib (`normscope.figures.draw`) or by the report alike.

    Attributes:
        id: "subject.name".
        title: what it shows, a phrase.
        explains: ids of the findings it is the picture of.
        prepare: (record of one run, sites of the finding, the worst first) -> frame with `columns`.
        columns: the columns of that frame: x, y, the one that tells curves apart, then what else a reader may want to
            know of a point, as its site.
        x_label: label of the x axis, with unit.
        y_label: label of the y axis, with unit.
        reading: how to read it, a sentence.
        log_y: whether y is logarithmic.
        mark: "line" or "point"; or "cell", a map whose fourth column, from -1 to 1, colors the place x, y.
        references: names of curves that were not measured but are what the others are compared with.
        rules: names of curves that are places on the x axis, as a step that was skipped; y is NaN in their rows.
    """

    id: str
    title: str
    explains: tuple[str, ...]
    prepare: Callable[[Record, tuple[str, ...]], pd.DataFrame]
    columns: tuple[str, ...]
    x_label: str
    y_label: str
    reading: str = ""
    log_y: bool = False
    mark: str = "line"
    references: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
