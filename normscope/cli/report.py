"""normscope report: judge a recorded run, write its page, or print its findings as JSON."""

from __future__ import annotations

import argparse
import shutil
import webbrowser
from pathlib import Path

from normscope.core.reading import load
from normscope.diagnostics import diagnose
from normscope.report.table import findings_table
from normscope.report.write import findings_json, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "path", metavar="RUN", type=Path, help="folder of the run, or its record.sqlite; it may still be running"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page (default: report.html in the run's folder)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON and write nothing")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print the findings and the paths; with --json print the findings alone."""
    record = load(arguments.path)
    findings = diagnose(record)
    if arguments.json:
        print(findings_json(findings), end="")
        return 0
    folder = arguments.path if arguments.path.is_dir() else arguments.path.parent
    page = write_report(record, findings, arguments.out or folder / "report.html")
    print(findings_table(findings, shutil.get_terminal_size().columns))
    print(f"\nreport    {page}\nmarkdown  {page.with_suffix('.md')}\njson      {page.with_name('findings.json')}")
    if arguments.open:
        webbrowser.open(page.resolve().as_uri())
    return 0
