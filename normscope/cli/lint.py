"""normscope lint: judge a model of the user's and its optimizer as they stand, nothing trained, nothing written."""

from __future__ import annotations

import argparse
import shutil

from normscope.cli.factory import called, reference
from normscope.core.table import findings_table
from normscope.report.write import findings_json
from normscope.scope.lint import lint

RETURNS = ("model", "optimizer", "example")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "factory",
        metavar="MODULE:NAME",
        type=reference,
        help="a function without arguments that returns model, (model, optimizer) or (model, optimizer, example): the "
        "optimizer may be a list or None, the example a batch; the current folder is importable",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Judge, and print the findings."""
    with called(arguments.factory, RETURNS[:1], RETURNS[1:]) as returned:
        findings = lint(*returned)
    if arguments.json:
        print(findings_json(findings), end="")
    else:
        print(findings_table(findings, shutil.get_terminal_size().columns))
        print("\nnormscope findings ID tells what a finding means and what to do.")
    return 0
