"""The command line: one file per command, imported when it is called; `--help` imports neither torch nor numpy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper

from normscope.core.errors import NormscopeError
from normscope.core.table import printable

COMMANDS = (
    ("demo", "train a small network with normscope attached and write its report"),
    ("examine", "look at a model of yours as it is, nothing trained, and write its report"),
    ("gap", "find which norm of a model costs how much at inference, and which statistics give it back"),
    ("lint", "judge a model of yours and its optimizer as they stand, nothing trained"),
    ("compare", "train normalizations, of the table or your own, alike on small work and lay them side by side"),
    ("findings", "tell what a finding means, why it happens and what to do; without an id list all"),
    ("report", "judge a run and write its page, or print its findings as JSON"),
    ("explain", "tell what made the loss of a run jump: which tensors moved first, why, and what to do"),
    ("watch", "show a run in the terminal while it grows"),
    ("figures", "list the survey's analysis figures and what became of the literature's claims, or show one"),
    ("catalog", "list the works of the survey and what of each is here"),
)
_EPILOG = """\
start here:
  normscope demo                 about a minute; prints findings and the path of a page to open
  normscope report runs/a        the same page for a run of your own
  normscope COMMAND --help       the options of a command

exit status: 0 done, 1 it failed (the reason is on stderr), 2 wrong usage
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        0 when done, 1 on failure, 2 on wrong usage.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no "…" gets "?"
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="normscope",
        description="See what normalization does inside a network: attach, record, judge, explain.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"normscope {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, text in COMMANDS:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:
            module = import_module(f"normscope.cli.{name}")
            module.add_arguments(command)
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    if parsed.command is None:
        parser.print_help()
        return 2
    return _run(import_module(f"normscope.cli.{parsed.command}").run, parsed)


def _run(command: object, parsed: argparse.Namespace) -> int:
    try:
        return int(command(parsed))  # type: ignore[operator]  # each command module has run(arguments) -> int
    except NormscopeError as error:
        print(f"normscope {parsed.command}: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"normscope {parsed.command}: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        print(f"normscope {parsed.command}: {printable(str(error))}", file=sys.stderr)
        return 1


def _version() -> str:
    try:
        return version("normscope")
    except PackageNotFoundError:
        return "(not installed)"
