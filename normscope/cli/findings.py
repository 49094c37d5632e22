"""normscope findings: what a finding means, why it happens, how to mend it, where its threshold comes from."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from itertools import groupby

from normscope.core.illustration import illustrations
from normscope.diagnostics.explanation import SUBJECTS, Explanation, explain, explanations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "id", metavar="ID", nargs="?", help="id of a finding, as propagation.dead-units; all by default"
    )
    parser.add_argument("--markdown", action="store_true", help="print all explanations as a page of Markdown")


def run(arguments: argparse.Namespace) -> int:
    """Explain one finding, or list all."""
    if arguments.markdown:
        print(page(), end="")
        return 0
    width = max(40, min(shutil.get_terminal_size().columns, 120))
    print(_listed(width) if arguments.id is None else _told(explain(arguments.id), width))
    return 0


def page() -> str:
    """Write the explanations of all findings as Markdown, by subject."""
    known = explanations().values()
    lines = [
        "# Findings",
        "",
        f"What each of the {len(known)} findings means, why it happens, how to mend it, and where it is in the "
        "literature. `normscope findings ID` prints one of these; `normscope findings --markdown "
        "> reports/guide/findings.md` writes this page anew.",
    ]
    for subject, group in groupby(known, key=lambda item: item.id.partition(".")[0]):
        lines += ["", f"## {subject}: {SUBJECTS[subject]}"]
        for item in group:
            number = "" if item.threshold is None else f"{item.threshold:.4g}: "
            title = f"[{item.source.title}]({item.source.url})" if item.source.url else item.source.title
            lines += ["", f"### {item.id}", "", f"{_sentence(item.what)}", ""]
            lines += [f"- **Why.** {_plain(item.cause)}", f"- **Mend.** {_plain(item.remedy)}"]
            lines += [f"- **Threshold.** {number}{_plain(item.compared)}. From: {_plain(item.origin)}"]
            lines += [f"- **Read.** {title} ({item.source.year})"]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Escape what Markdown would take for its own: names with underscores, products, angles."""
    return re.sub(r"([*_<>\[\]|])", r"\\\1", text)


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
        *(("see", f"figure {f.id}: {f.title}; {f.shows} ({f.command})") for f in illustrations(item.id)),
    )
    indent = " " * 11
    lines = [
        textwrap.fill(text, width, initial_indent=name.ljust(11), subsequent_indent=indent, break_long_words=False)
        for name, text in parts
    ]
    return "\n".join([item.id, "", *lines])
