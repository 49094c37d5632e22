"""normscope figures: the survey's analysis figures, and what became of the literature's claims."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import normscope
from normscope.core.errors import unknown_name
from normscope.core.gallery import VERDICTS, Claim, Reproduction, reproduction, reproductions, tally
from normscope.core.illustration import ILLUSTRATED
from normscope.core.source import cite

# as typed in a shell
_WORDS = dict(zip(("reproduced", "partly", "not-reproduced", "not-testable"), VERDICTS, strict=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("id", metavar="ID", nargs="?", help="id of a figure, as SI-4; all by default")
    parser.add_argument(
        "--chapter", help='only a chapter: letters of its ids, as SI, or words of its title, as "scale"'
    )
    parser.add_argument(
        "--verdict", choices=_WORDS, help="only claims with this verdict, and the figures that have some"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: [{id, chapter, title, ..., claims, command}]")


def run(arguments: argparse.Namespace) -> int:
    """List the figures, or show one."""
    width = text_width()
    if arguments.id is not None:
        item = reproduction(arguments.id)
        print(json.dumps(item.as_dict(), indent=1, ensure_ascii=False) if arguments.json else _told(item, width))
        return 0
    shown = _chosen(arguments.chapter, arguments.verdict)
    if arguments.json:
        print(json.dumps([item.as_dict() for item in shown], indent=1, ensure_ascii=False))
    else:
        print(_listed(shown, width))
    return 0


def text_width() -> int:
    """Return how wide text for this terminal is to be."""
    return max(40, min(shutil.get_terminal_size().columns, 120))


def _chosen(chapter: str | None, verdict: str | None) -> list[Reproduction]:
    shown = [item for item in reproductions() if chapter is None or _in_chapter(item, chapter)]
    if not shown:
        options = sorted({item.id.partition("-")[0] for item in reproductions()})
        titles = list(dict.fromkeys(item.chapter for item in reproductions()))
        raise unknown_name("chapter", chapter, [*options, *titles])
    if verdict is None:
        return shown
    kept = [replace(item, claims=tuple(c for c in item.claims if c.verdict == _WORDS[verdict])) for item in shown]
    return [item for item in kept if item.claims]


def _in_chapter(item: Reproduction, chapter: str) -> bool:
    return chapter.upper() == item.id.partition("-")[0] or (
        len(chapter) > 2 and chapter.lower() in item.chapter.lower()
    )


def _listed(shown: Sequence[Reproduction], width: int) -> str:
    lines: list[str] = []
    for chapter, group in groupby(shown, key=lambda item: item.chapter):
        lines += ["", chapter]
        for item in group:
            lines += figure_lines(item, width)
    claims = [claim for item in shown for claim in item.claims]
    counts = f"{len(shown)} figure{'' if len(shown) == 1 else 's'}, {len(claims)} claims"
    return "\n".join([*lines[1:], "", f"{counts}: {tally(claims) or 'none'}.", "normscope figures ID shows one."])


def figure_lines(item: Reproduction, width: int) -> list[str]:
    """Return the lines of a list: id and title, then a line for each claim.

    Args:
        item: the figure.
        width: columns of the terminal.

    Returns:
        The lines.
    """
    rows = [(f"  {item.id:<6} ", item.title)]
    rows += [(f"         {c.verdict.removesuffix(' at this scale'):<15} ", c.statement) for c in item.claims]
    return [begin + textwrap.shorten(text, max(width - len(begin), 20), placeholder=" …") for begin, text in rows]


def _told(item: Reproduction, width: int) -> str:
    explains = [finding for finding, figures in ILLUSTRATED.items() if item.id in [id for id, _ in figures]]
    parts = [
        ("shows", item.caption),
        *(("from", str(cite(key))) for key in item.sources),
        ("picture", _picture(item)),
        ("command", f"{item.command}   (in the repository; --fast for a small version)"),
        *([("explains", "the findings " + ", ".join(explains))] if explains else []),
    ]
    lines = [f"{item.id}  {item.title}", f"{item.chapter}: {tally(item.claims)}", ""]
    lines += [line for name, text in parts for line in _wrapped(text, width, name)]
    for number, claim in enumerate(item.claims, 1):
        lines += ["", *_claim(claim, width, f"claim {number}")]
    return "\n".join(lines)


def _claim(claim: Claim, width: int, name: str) -> list[str]:
    key, _, place = claim.source.partition(",")
    work = cite(key)
    parts = [
        (name, claim.statement),
        ("verdict", f"{claim.verdict}: {claim.reason}" if claim.reason else claim.verdict),
        ("source", f"{work.title} ({work.year}){', ' + place.strip() if place else ''}"),
        ("statistic", claim.statistic),
        ("expected", _expected(claim)),
        ("measured", f"{claim.measured:.4g} ± {claim.spread:.2g} (median and range of {claim.seeds} seeds)"),
    ]
    return [line for head, text in parts for line in _wrapped(text, width, head)]


def _expected(claim: Claim) -> str:
    if isinstance(claim.expected, str):
        return claim.expected
    return f"{claim.expected:.4g}" + (f" ± {claim.tolerance:.2g}" if claim.tolerance else "")


def _picture(item: Reproduction) -> str:
    """Return the path of the picture, whole where the package lies in its repository."""
    path = Path(normscope.__file__).parent.parent / item.picture
    return str(path) if path.exists() else f"{item.picture}   (in the repository)"


def _wrapped(text: str, width: int, name: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split(" ")),
        width,
        initial_indent=name.ljust(11),
        subsequent_indent=" " * 11,
        break_long_words=False,
        break_on_hyphens=False,
    )
