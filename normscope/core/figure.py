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

    `prepare(record, sites)` returns a tidy frame with exactly `columns`; what a picture means is in that frame, so it
    can be tested, exported and drawn by matplotlib (`normscope.figures.draw`) or by the report (plotly) alike.

    Attributes:
        id: "subject.name".
        title: what it shows, a phrase.
        explains: ids of the findings it is the picture of.
        prepare: (record, sites of the finding) -> frame with `columns`.
        columns: the columns of that frame: x, y, then the one that tells curves apart.
        x_label: label of the x axis, with unit.
        y_label: label of the y axis, with unit.
        log_y: whether y is logarithmic.
        mark: "line" or "bar".
    """

    id: str
    title: str
    explains: tuple[str, ...]
    prepare: Callable[[Record, tuple[str, ...]], pd.DataFrame]
    columns: tuple[str, str, str]
    x_label: str
    y_label: str
    log_y: bool = False
    mark: str = "line"
