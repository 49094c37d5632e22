"""normscope catalog: the survey's works, what each asks for, and what of it is here."""

from __future__ import annotations

import argparse
import importlib
import json
import textwrap
from itertools import groupby
from typing import Any

from normscope.cli.figures import text_width
from normscope.cli.outline import show
from normscope.core.survey import catalog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--json", action="store_true", help="print JSON: [{id, chapter, section, title, year, provides}]"
    )
    parser.add_argument(
        "--norms",
        action="store_true",
        help="print the activation normalizations instead: area, operation, recovery, population of each "
        "(as JSON with --json)",
    )
    parser.add_argument(
        "--section",
        nargs="?",
        const="",
        metavar="NUMBER",
        help="walk a section of the survey, as 2.2: its works, what provides them, and what became of their claims; "
        "without a number print the outline",
    )
    parser.add_argument("--status", choices=("done", "planned"), help="only works with something of this status")


def run(arguments: argparse.Namespace) -> int:
    """Print the catalog."""
    if arguments.norms:
        return _print_norms(as_json=arguments.json)
    if arguments.section is not None:
        return show(arguments.section, status=arguments.status, as_json=arguments.json, width=text_width())
    works: list[dict[str, Any]] = catalog()
    if arguments.status:
        works = [work for work in works if any(item["status"] == arguments.status for item in work["provides"])]
    if arguments.json:
        print(json.dumps(works, indent=1))
        return 0
    width = text_width()
    for (chapter, section), group in groupby(works, key=lambda work: (work["chapter"], work["section"])):
        print(f"\n{chapter}: {section}")
        for work in group:
            print(textwrap.shorten(f"  {work['id']} {work['year']} {work['title']}", width - 2, placeholder=" …"))
            names = "  ".join(f"{item['name']} ({item['object'] or item['status']})" for item in work["provides"])
            print(textwrap.fill(names, width, initial_indent="       ", subsequent_indent="       "))
    items = [item for work in works for item in work["provides"]]
    done = sum(item["status"] == "done" for item in items)
    print(f"\n{len(works)} works ask for {len(items)} names: {done} done, {len(items) - done} planned.")
    return 0


def _print_norms(*, as_json: bool) -> int:
    """Print a line for each method of the table of normalizations."""
    # only this option needs torch
    zoo = importlib.import_module("normscope.norms.table").zoo
    methods = [_method(row) for row in zoo.values()]
    if as_json:
        print(json.dumps(methods, indent=1))
        return 0
    columns = list(methods[0])
    lines = [columns, *([_cell(method[column]) for column in columns] for method in methods)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(
        f"\n{len(methods)} methods; extra: parameters besides a weight and a bias for each channel, with 8 channels. "
        "normscope.norms.build(name, num_features) makes a layer; normscope catalog lists the sources."
    )
    return 0


def _method(row: Any) -> dict[str, Any]:
    """Describe one row of the table by an example layer."""
    layer = row.example()
    extra = sum(p.numel() for name, p in layer.named_parameters() if name not in {"weight", "bias"})
    words = {"name": row.name, **row.words()}
    return words | {"needs batch": layer.traits.crosses_batch, "extra": extra, "source": row.source}


def _cell(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
