"""normscope catalog: the survey's works, what each asks for, and what of it is here."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from itertools import groupby
from typing import Any

from normscope.core.survey import catalog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--json", action="store_true", help="print JSON: [{id, chapter, section, title, year, provides}]"
    )
    parser.add_argument("--status", choices=("done", "planned"), help="only works with something of this status")


def run(arguments: argparse.Namespace) -> int:
    """Print the catalog."""
    works: list[dict[str, Any]] = catalog()
    if arguments.status:
        works = [work for work in works if any(item["status"] == arguments.status for item in work["provides"])]
    if arguments.json:
        print(json.dumps(works, indent=1))
        return 0
    width = min(shutil.get_terminal_size().columns, 120)
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
