"""Pictures: prepared figures as plain data for the page's script."""

from __future__ import annotations

import math
from collections.abc import Hashable

import numpy as np
import pandas as pd

from normscope.core.figure import Figure
from normscope.core.record import Record
from normscope.figures.frames import logarithmic
from normscope.figures.palette import CURVES
from normscope.report.thin import extremes

POINTS = 240

Picture = dict[str, object]


def picture(figure: Figure, record: Record, sites: tuple[str, ...]) -> Picture | None:
    """Prepare a figure and return what the script draws.

    Args:
        figure: the figure.
        record: the record of one run.
        sites: sites of the finding, the worst first.

    Returns:
        Title, reading, labels and curves; each curve has a name, a kind ("measured", "reference" or "rule"), its place
        in the palette, x, y and texts for hovering; a map has kind "cells" and rows z; numbers that are not finite are
        None. None if nothing can be drawn.
    """
    frame = figure.prepare(record, sites)
    drawn = frame[~frame[figure.columns[2]].isin(figure.rules)] if len(frame) else frame
    if not np.isfinite(drawn[figure.columns[3 if figure.mark == "cell" else 1]].to_numpy(float)).any():
        return None
    curves: list[Picture] = []
    for name, part in frame.groupby(figure.columns[2], sort=False):
        index = sum(curve["kind"] == "measured" for curve in curves)
        cells = figure.mark == "cell"
        curves.append(_cells(figure, name, part) if cells else _curve(figure, name, part, index % len(CURVES)))
    return {
        "title": figure.title,
        "reading": figure.reading,
        "x": figure.x_label,
        "y": figure.y_label,
        "log": logarithmic(figure, frame),
        "mark": figure.mark,
        "curves": curves,
    }


def _curve(figure: Figure, name: Hashable, part: pd.DataFrame, index: int) -> Picture:
    kind = "rule" if name in figure.rules else "reference" if name in figure.references else "measured"
    values = part[figure.columns[1]].to_numpy(float)
    kept = extremes(values, POINTS)
    if kind == "rule":
        kept = np.unique(np.linspace(0, len(part) - 1, min(len(part), POINTS // 2)).astype(int))
    shown = part.iloc[kept]
    texts = [", ".join(str(value) for value in row) for row in shown[list(figure.columns[3:])].itertuples(index=False)]
    return {
        "name": str(name),
        "kind": kind,
        "color": figure.rules.index(str(name)) if kind == "rule" else index,
        "x": [_plain(value) for value in shown[figure.columns[0]].to_numpy(float)],
        "y": [] if kind == "rule" else [_plain(value) for value in values[kept]],
        "text": texts if any(texts) else [],
    }


def _cells(figure: Figure, name: Hashable, part: pd.DataFrame) -> Picture:
    cells = part.pivot(index=figure.columns[1], columns=figure.columns[0], values=figure.columns[3])
    cells = cells.loc[part[figure.columns[1]].drop_duplicates()]
    return {
        "name": str(name),
        "kind": "cells",
        "color": 0,
        "x": [_plain(value) for value in cells.columns.to_numpy(float)],
        "y": [value if isinstance(value, str) else _plain(float(value)) for value in cells.index],
        "z": [[_plain(value) for value in row] for row in cells.to_numpy(float).round(3)],
        "text": [],
    }


def _plain(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 2**53 else float(f"{value:.6g}")
