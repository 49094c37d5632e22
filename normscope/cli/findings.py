"""normscope findings: what a finding means, why it happens, how to mend it, where its threshold comes from."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from itertools import groupby

from normscope.diagnostics.explanation import SUBJECTS, Explanation, explain, explanations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "id", metavar="ID", nargs="?", help="id of a finding, as propagation.dead-units; all by default"
    )


def run(arguments: argparse.Namespace) -> int:
    """Explain one finding, or list all."""
    width = max(40, min(shutil.get_terminal_size().columns, 120))
    print(_listed(width) if arguments.id is None else _told(explain(arguments.id), width))
    return 0


def _listed(width: int) -> str:
    """Write a line for each finding, by subject."""
    lines: list[str] = []
    known = explanations().values()
    longest = max(len(item.id) for item in known)
    for subject, group in groupby(known, key=lambda item: item.id.partition(".")[0]):
        lines += ["", f"{subject}: {SUBJECTS[subject]}"]
        for item in group:
            begin = f"  {item.id.ljust(longest)}  "
            lines.append(begin + textwrap.shorten(_sentence(item.what), max(width - len(begin), 20), placeholder=" …"))
    return "\n".join([*lines[1:], "", f"{len(known)} findings; normscope findings ID explains one."])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _told(item: Explanation, width: int) -> str:
    number = "" if item.threshold is None else f"{item.threshold:.4g}: "
    parts = (
        ("tells", _sentence(item.what)),
        ("why", item.cause),
        ("mend", item.remedy),
        ("threshold", f"{number}{item.compared}"),
        ("from", item.origin),
        ("read", str(item.source)),
    )
    indent = " " * 11
    lines = [
        textwrap.fill(text, width, initial_indent=name.ljust(11), subsequent_indent=indent, break_long_words=False)
        for name, text in parts
    ]
    return "\n".join([item.id, "", *lines])
