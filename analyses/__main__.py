"""python -m analyses: list the figures, run some or all, write the gallery."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from analyses import CHAPTERS, SCRIPTS
from analyses.driver import produce, stale
from analyses.gallery import tally, write_gallery
from normscope.core.errors import NormscopeError, unknown_name

_REPORTS = Path("reports")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        0 when done, 1 where a figure failed or an id is unknown.
    """
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "list":
            return _list(arguments.out or _REPORTS)
        if arguments.command == "gallery":
            print(write_gallery(arguments.out or _REPORTS))
            return 0
        return _produce(arguments, _chosen(getattr(arguments, "ids", None)))
    except NormscopeError as error:
        print(f"analyses {arguments.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m analyses", description="Regenerate the survey's analysis figures.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="list the figures with their verdicts, and what is stale")
    some = commands.add_parser("run", help="run some figures")
    some.add_argument("ids", nargs="+", metavar="ID", help="as SI-1")
    every = commands.add_parser("all", help="run all figures")
    gallery = commands.add_parser("gallery", help="write the README of the reports anew from what lies there")
    for command in (some, every):
        command.add_argument("--fast", action="store_true", help="small settings, for tests; into reports/fast")
        command.add_argument("--jobs", type=_positive, default=os.cpu_count() or 1, metavar="N", help="processes")
        command.add_argument("--seeds", type=_positive, default=3, metavar="K", help="seeds 0 to K-1 (default: 3)")
    for command in (listing, some, every, gallery):
        command.add_argument("--out", type=Path, help="folder of the reports (default: reports)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _chosen(ids: Sequence[str] | None) -> list[ModuleType]:
    if ids is None:
        return list(SCRIPTS.values())
    for name in ids:
        if name.upper() not in SCRIPTS:
            raise unknown_name("id", name, SCRIPTS, "python -m analyses list shows them with their titles.")
    return [SCRIPTS[name.upper()] for name in dict.fromkeys(ids)]


def _list(out: Path) -> int:
    for chapter, scripts in CHAPTERS.items():
        if scripts:
            print(f"\n{chapter}")
        for script in scripts:
            old = ", stale: computed by other code or in another setting" if stale(script, out) else ""
            print(f"  {script.ID:<6} {script.TITLE}{tally(out, script.ID)}{old}")
    return 0


def _produce(arguments: argparse.Namespace, scripts: list[ModuleType]) -> int:
    out = arguments.out or (_REPORTS / "fast" if arguments.fast else _REPORTS)
    failures = produce(scripts, out, fast=arguments.fast, jobs=arguments.jobs, seeds=arguments.seeds)
    for script in scripts:
        print(f"{script.ID:<6} {script.TITLE}{tally(out, script.ID)}")
    print(f"\n{write_gallery(out)}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
