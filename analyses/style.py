"""One style for all figures: readable in print and by color-blind readers, with the spread over seeds shown."""

from __future__ import annotations

from typing import Any, Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from normscope.figures.palette import CURVES, REFERENCE, RULE

# curves differ in color, marker and dashes, so that a gray print still tells them apart
COLORS: Final = (*CURVES, "#7a6400", "#4a4e55")
MARKERS: Final = ("o", "s", "^", "D", "v", "P")
DASHES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
STYLE: Final[Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e5e8",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "mathtext.fontset": "dejavusans",
    "savefig.dpi": 300,
}
_WIDTH: Final = {1: 4.6, 2: 7.0, 3: 8.4, 4: 9.6}


def panels(canvas: Canvas, columns: int = 1, rows: int = 1, *, height: float = 2.9) -> list[Axes]:
    """Lay out panels, lettered (a), (b), ... where there are several.

    Args:
        canvas: the canvas that `draw` was given; its size is set.
        columns: panels side by side, 1 to 4.
        rows: rows of panels.
        height: inches for each row.

    Returns:
        The axes, row by row.
    """
    canvas.set_size_inches(_WIDTH[columns], height * rows)
    axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
    if len(axes) > 1:
        for letter, ax in zip("abcdefghijkl", axes, strict=False):
            ax.set_title(f"({letter})")
    return axes


def label(ax: Axes, title: str, x: str, y: str) -> None:
    """Title a panel after its letter, and name its axes with symbols and units.

    Args:
        ax: the panel.
        title: what it shows, short.
        x: label of the horizontal axis.
        y: label of the vertical axis.
    """
    letter = ax.get_title(loc="left")
    ax.set_title(f"{letter} {title}".strip(), loc="left")
    ax.set_xlabel(x)
    ax.set_ylabel(y)


def curve(ax: Axes, frame: pd.DataFrame, x: str, y: str, *, name: str, index: int, points: bool = False) -> None:
    """Draw the median over seeds, with a band from the smallest to the largest seed.

    Args:
        ax: the panel.
        frame: a frame with the columns seed, `x` and `y`.
        x: column of the horizontal axis.
        y: column of the vertical axis.
        name: name in the legend.
        index: number of the curve, from 0, which picks color, marker and dashes.
        points: whether to mark the points, for curves of few.
    """
    over = frame.groupby(x)[y]
    middle = over.median()
    (line,) = ax.plot(middle.index, middle, color=color(index), linestyle=DASHES[index % len(DASHES)], label=name)
    line.set_marker(MARKERS[index % len(MARKERS)] if points else "")
    ax.fill_between(middle.index, over.min(), over.max(), color=color(index), alpha=0.2, linewidth=0)


def logarithmic(ax: Axes, axis: str = "y") -> None:
    """Make an axis logarithmic with plain numbers at 1, 2 and 5, for ranges of less than two decades.

    Args:
        ax: the panel.
        axis: "x" or "y".
    """
    ax.set(**{f"{axis}scale": "log"})
    drawn = ax.xaxis if axis == "x" else ax.yaxis
    drawn.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    drawn.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    drawn.set_minor_formatter(NullFormatter())


def color(index: int) -> str:
    """Return the color of the curve with a number, from 0."""
    return COLORS[index % len(COLORS)]


def theory(ax: Axes, x: Any, y: Any, *, name: str) -> None:
    """Draw what theory predicts: a thin dashed gray curve above the measured ones.

    Args:
        ax: the panel.
        x: horizontal values.
        y: vertical values.
        name: name in the legend.
    """
    ax.plot(x, y, color=REFERENCE, linestyle=(0, (4, 2)), linewidth=1.1, label=name, zorder=4)


def rule(ax: Axes, y: float, name: str) -> None:
    """Draw a horizontal limit in red, named in the legend.

    Args:
        ax: the panel.
        y: height of the line.
        name: name in the legend.
    """
    ax.axhline(y, color=RULE, linewidth=0.9, linestyle=":", label=name)


def limit(ax: Axes, x: float, name: str) -> None:
    """Draw a vertical limit in red, named in the legend.

    Args:
        ax: the panel.
        x: where the line stands.
        name: name in the legend.
    """
    ax.axvline(x, color=RULE, linewidth=0.9, linestyle=":", label=name)
