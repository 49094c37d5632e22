"""The page: one HTML file without a request to anywhere; names of layers stay text wherever they appear."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib import resources

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from normscope.core.figure import Figure
from normscope.core.finding import Finding
from normscope.core.illustration import illustrations
from normscope.core.record import Record
from normscope.core.table import SYMBOLS, count, counted, printable
from normscope.figures import OVERVIEW, figure_for
from normscope.figures.palette import CURVES, REFERENCE, RULE
from normscope.figures.run import GRADIENT_NORM, LEARNING_RATE, LOSS
from normscope.metrics import tables
from normscope.report.layers import COLUMNS, layers
from normscope.report.maps import PHASES, maps, payload
from normscope.report.pictures import Picture, picture
from normscope.report.summary import Group, events, groups, passed, provenance, runs
from normscope.report.text import breakable, number, source, words

log = logging.getLogger("normscope")

# scripts are parts of one: each file may use what those before it define
SCRIPTS = ("plot.js", "pictures.js", "explorer.js", "table.js")
_GUARD = "\ue000"


def page(
    record: Record, findings: Sequence[Finding], *, markdown_name: str = "report.md", json_name: str = "findings.json"
) -> str:
    """Write the page.

    Args:
        record: what was measured.
        findings: what is concluded from it.
        markdown_name: name of the Markdown twin, for the link.
        json_name: name of the JSON twin, for the link.

    Returns:
        HTML.
    """
    told = groups(findings)
    pictures = _pictures(record, told)
    explored = payload(maps(record))
    rows, more = events(record)
    losses = record.context["loss"] if len(record.context) else pd.Series([0.0])
    facts = {
        "pictures": pictures,
        "sites": explored.sites,
        "axes": explored.axes,
        "maps": explored.maps,
        "phases": PHASES,
    }
    script, plotly = _script(), _plotly()
    return (
        environment()
        .get_template("page.html")
        .render(
            runs=runs(record),
            counts=counted(findings),
            groups=told,
            passed=passed(findings),
            pictures=pictures,
            context=[key for key in ("loss", "norm", "rate") if key in pictures],
            subjects=_subjects(pictures),
            no_loss=bool(losses.isna().all()),
            columns=COLUMNS,
            layers=layers(record),
            provenance=[(str(run["run"]), provenance(run)) for run in record.runs],
            events=rows,
            more_events=more,
            markdown_name=markdown_name,
            json_name=json_name,
            facts=_json(facts),
            facts_maps=bool(explored.maps),
            data=explored.data,
            style=template("style.css"),
            script=script,
            plotly=plotly,
            hashes=[_digest(script), _digest(plotly.replace(_GUARD, ""))],
            curves=CURVES,
            reference=REFERENCE,
            rule=RULE,
        )
    )


def _pictures(record: Record, told: Sequence[Group]) -> dict[str, Picture]:
    """Prepare a picture a group, by the group's number, and those of the training itself."""
    parts = {part.names[0]: part for part in tables.split(record) if part.runs}
    only = next(iter(parts.values()), record)
    found: dict[str, Picture | None] = {}
    for i, group in enumerate(told):
        figure = figure_for(group.first.id)
        found[str(i)] = _drawn(figure, parts.get(group.first.run, only), group.sites) if figure else None
    for key, figure in (("loss", LOSS), ("norm", GRADIENT_NORM), ("rate", LEARNING_RATE)):
        found[key] = _drawn(figure, only, ())
    for _, figures in OVERVIEW:
        found |= {figure.id: _drawn(figure, only, ()) for figure in figures}
    return {key: value for key, value in found.items() if value is not None}


def _drawn(figure: Figure, record: Record, sites: tuple[str, ...]) -> Picture | None:
    try:
        return picture(figure, record, sites)
    except Exception as error:  # one broken picture must not take the page away
        log.warning("normscope left the picture %r out: %s: %s", figure.id, type(error).__name__, error)
        return None


def _subjects(pictures: Mapping[str, Picture]) -> list[tuple[str, list[str]]]:
    """Return the subjects that have pictures whatever was found, with the keys of these."""
    shown = [(subject, [figure.id for figure in figures if figure.id in pictures]) for subject, figures in OVERVIEW]
    return [(subject, keys) for subject, keys in shown if keys]


@functools.cache
def environment() -> Environment:
    """Return the environment of every page: names of layers are escaped in it, and an unknown variable is an error."""
    made = Environment(
        autoescape=True,
        loader=PackageLoader("normscope.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    made.globals.update(SYMBOLS=SYMBOLS, count=count)
    made.filters.update(breakable=breakable, illustrations=illustrations, number=number, source=source, words=words)
    return made


def _visible(value: object) -> object:
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _json(value: object) -> str:
    """Write JSON that cannot end the element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def template(name: str) -> str:
    """Return the text of a file among the templates."""
    return resources.files("normscope.report").joinpath(f"templates/{name}").read_text(encoding="utf-8")


@functools.cache
def _script() -> str:
    parts = "\n".join(template(name) for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}\n}})();\n'


@functools.cache
def _plotly() -> str:
    """Return plotly's source as inert text: a guard character keeps it from closing or opening an element."""
    return str(get_plotlyjs()).replace("</", f"<{_GUARD}/").replace("<!", f"<{_GUARD}!")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
