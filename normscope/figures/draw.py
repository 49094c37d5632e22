"""Drawing: a prepared frame on matplotlib axes. The only file that knows matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Protocol

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from normscope.core.figure import Figure
from normscope.figures.comparison import Overlay
from normscope.figures.frames import logarithmic
from normscope.figures.palette import CURVES, REFERENCE, RULE

FLOOR = 1e-10  # of the density; below, nothing is drawn


def draw(figure: Figure, frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw what `figure.prepare` returned.

    Args:
        figure: the figure.
        frame: its prepared frame.
        ax: where to draw; new axes of a figure of their own by default, to be saved by `ax.figure.savefig(path)`.

    Returns:
        The axes; without artists where the frame has no rows.
    """
    if ax is None:
        ax = Canvas(figsize=(6.4, 3.6), layout="constrained").subplots()
    if figure.mark == "cell":
        return _draw_cells(figure, frame, ax)
    x, y, curve = figure.columns[:3]
    handles: dict[str, Artist] = {}
    measured = 0
    for name, part in frame.groupby(curve, sort=False):
        points = part[x].to_numpy(float), part[y].to_numpy(float)
        if name in figure.rules:
            across = ax.get_xaxis_transform()
            handles[str(name)] = ax.vlines(
                points[0], 0, 1, colors=RULE, linestyles="-" if name == figure.rules[0] else ":", transform=across
            )
        elif name in figure.references:
            (handles[str(name)],) = ax.plot(*points, color=REFERENCE, linestyle="--", linewidth=1.2)
        else:
            dots = figure.mark == "point" or np.isfinite(points[1]).sum() == 1
            color = CURVES[measured % len(CURVES)]
            (handles[str(name)],) = ax.plot(*points, "o" if dots else "-", color=color, linewidth=1.6, markersize=3)
            measured += 1
    _dress(ax, figure, handles, logarithmic(figure, frame))
    return ax


def draw_ranking(norms: pd.DataFrame, metric: str, ax: Axes | None = None, most: int = 20) -> Axes:
    """Draw what each norm costs, the worst on top, with bars of two standard errors.

    Args:
        norms: as `normscope.metrics.gap.ranking` returns it.
        metric: name of the metric.
        ax: where to draw; new axes of a figure of their own by default.
        most: so many norms at most.

    Returns:
        The axes; without artists where no norm was switched.
    """
    drawn = norms[norms["recovered"].notna()].head(most)
    if ax is None:
        ax = Canvas(figsize=(6.4, 1.4 + 0.28 * len(drawn)), layout="constrained").subplots()
    beyond = (drawn["recovered"] > drawn["chance"]).to_numpy()
    places, values = np.arange(len(drawn)), drawn["recovered"].to_numpy(float)
    errors = 2 * drawn["standard_error"].fillna(0.0).to_numpy(float)
    for which, color, name in ((beyond, CURVES[1], "beyond chance"), (~beyond, CURVES[0], "within chance")):
        if which.any():
            ax.errorbar(
                values[which], places[which], xerr=errors[which], fmt="o", color=color, markersize=4, label=name
            )
    ax.axvline(0.0, color=REFERENCE, linewidth=1)
    ax.set_yticks(places, drawn["norm"].astype(str).tolist(), parse_math=False)
    ax.invert_yaxis()
    ax.set_title("What each norm costs", fontsize="medium", loc="left")
    ax.set_xlabel(f"{metric} recovered with this norm alone on statistics of the data", parse_math=False)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if len(drawn):
        ax.legend(fontsize="small", frameon=False)
    return ax


def overlay(picture: Overlay, frame: pd.DataFrame, entries: Sequence[str]) -> Canvas:
    """Draw the entries of a comparison over each other, each with its band.

    Args:
        picture: the picture.
        frame: its prepared frame.
        entries: the entries in order, which decides their colors; the first is drawn thicker.

    Returns:
        A matplotlib figure, to be saved by `savefig(path)`.
    """
    canvas = Canvas(figsize=(6.4, 3.8), layout="constrained")
    ax = canvas.subplots()
    handles: dict[str, Artist] = {}
    for number, entry in enumerate(entries):
        part = frame[frame["entry"] == entry]
        if not np.isfinite(part["y"].to_numpy(float)).any():
            continue
        x, y, low, high = (part[name].to_numpy(float) for name in ("x", "y", "low", "high"))
        color, dashes = CURVES[number % len(CURVES)], _DASHES[number // len(CURVES) % len(_DASHES)]
        few = picture.dots or np.isfinite(y).sum() == 1
        width = 2.2 if number == 0 else 1.4
        (handles[entry],) = ax.plot(x, y, dashes, color=color, linewidth=width, marker="o" if few else "", markersize=3)
        ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    if picture.log_x:
        ax.set_xscale("log")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(ax, picture, handles, picture.log_y)
    legend = ax.get_legend()
    if legend is not None and len(handles) > len(CURVES):
        legend.set_loc("upper left")
        legend.set_bbox_to_anchor((1.01, 1.0))
    return canvas


_DASHES = ("-", "--", ":", "-.")
_INK = "#010203"  # stands for the color of the text around a picture


def svg(canvas: Canvas) -> str:
    """Return a figure as an SVG element without a background, its text as text and in the color of what is around.

    Args:
        canvas: a matplotlib figure; black in it becomes the color of the surrounding text.

    Returns:
        The element.
    """
    file = io.StringIO()
    for words in canvas.findobj(Text):
        words.set(color=_INK)
    for axes in canvas.axes:
        for spine in axes.spines.values():
            spine.set_edgecolor(_INK)
        axes.tick_params(which="both", colors=_INK)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "normscope"}):
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def _draw_cells(figure: Figure, frame: pd.DataFrame, ax: Axes) -> Axes:
    """Draw a map, the first row on top, with its scale beside it."""
    for name, part in frame.groupby(figure.columns[2], sort=False):
        cells = part.pivot(index=figure.columns[1], columns=figure.columns[0], values=figure.columns[3])
        cells = cells.loc[part[figure.columns[1]].drop_duplicates()]
        named = isinstance(cells.index[0], str)
        rows = np.arange(len(cells)) if named else cells.index
        image = ax.pcolormesh(_edges(cells.columns), _edges(rows), cells, cmap="RdBu_r", vmin=-1, vmax=1)
        if named:
            ax.set_yticks(rows, list(cells.index), parse_math=False, fontsize="small")
        ax.figure.colorbar(image, ax=ax, label=figure.columns[3])
        ax.invert_yaxis()
        ax.set_title(str(name), fontsize="small", loc="right", parse_math=False)
    _dress(ax, figure, {}, log=False)
    return ax


def _edges(centers: Sequence[float] | np.ndarray | pd.Index) -> np.ndarray:
    """Return the borders of cells halfway between their centers; matplotlib gives a single cell no width."""
    at = np.asarray(centers, float)
    between = (at[1:] + at[:-1]) / 2
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    return np.concatenate([[2 * at[0] - between[0]], between, [2 * at[-1] - between[-1]]])


def _dress(ax: Axes, figure: Figure | Overlay, handles: dict[str, Artist], log: bool) -> None:
    """Label axes and curves; names are not markup, and one that begins with an underscore is shown like any other."""
    ax.set_title(figure.title, fontsize="medium", loc="left")
    ax.set_xlabel(figure.x_label)
    ax.set_ylabel(figure.y_label)
    if log:
        ax.set_yscale("log", nonpositive="mask")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if handles:
        numbers = [str(i) for i in range(len(handles))]
        legend = ax.legend(list(handles.values()), numbers, fontsize="small", frameon=False)
        for text, name in zip(legend.get_texts(), handles, strict=True):
            text.set_text(name)
            text.set_parse_math(False)


class Density(Protocol):
    """What `normscope.spectrum` returns, as far as it is drawn."""

    @property
    def exact(self) -> bool:
        """Whether the nodes are all eigenvalues."""

    def grid(self, points: int = ...) -> np.ndarray:
        """Return points over all of the spectrum."""

    def density(self) -> np.ndarray:
        """Return the density at the points of `grid()`."""


def draw_spectrum(found: Density, ax: Axes | None = None, *, name: str = "curvature") -> Axes:
    """Draw the density of eigenvalues.

    Args:
        found: what `normscope.spectrum(problem)` returned.
        ax: where to draw; new axes of a figure of their own by default, to be saved by `ax.figure.savefig(path)`.
        name: what the eigenvalues are of, as "Hessian" or "Fisher".

    Returns:
        The axes.
    """
    if ax is None:
        ax = Canvas(figsize=(6.4, 3.6), layout="constrained").subplots()
    points, values = found.grid(), found.density()
    ax.semilogy(points, np.maximum(values, FLOOR), color=CURVES[0], linewidth=1.2)
    ax.fill_between(points, FLOOR, np.maximum(values, FLOOR), color=CURVES[0], alpha=0.15, linewidth=0)
    ax.axvline(0.0, color=RULE, linestyle=":", linewidth=1)
    ax.set_ylim(FLOOR, 3 * float(values.max()))
    ax.set_xlabel(rf"eigenvalue $\lambda$ of the {name}")
    ax.set_ylabel(r"density $\phi(\lambda)$" + (", exact" if found.exact else ", by Lanczos quadrature"))
    return ax
