"""normscope report: judge a recorded run, write its page, or print its findings as JSON."""

from __future__ import annotations

import argparse
import shutil
import webbrowser
from pathlib import Path

from normscope.cli.folder import listed, one_run
from normscope.core.reading import load
from normscope.core.table import findings_table
from normscope.diagnostics import diagnose
from normscope.report.write import findings_json, json_beside, write_report, write_texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "path", metavar="RUN", type=Path, help="folder of the run, or its record.sqlite; it may still be running"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page (default: report.html in the run's folder)")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--json", action="store_true", help="print the findings as JSON, or write them to --out; no page")
    one.add_argument("--open", action="store_true", help="open the page in the browser")


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print the findings and the paths; with --json the findings alone."""
    record = load(one_run(arguments.path))
    findings = diagnose(record)
    if arguments.json:
        return _json(findings_json(findings), arguments.out)
    folder = arguments.path if arguments.path.is_dir() else arguments.path.parent
    page = write_report(record, findings, arguments.out or folder / "report.html")
    print(findings_table(findings, shutil.get_terminal_size().columns))
    print(f"\n{listed(report=page, markdown=page.with_suffix('.md'), json=json_beside(page))}")
    if arguments.open:
        webbrowser.open(page.resolve().as_uri())
    return 0


def _json(text: str, out: Path | None) -> int:
    if out is None:
        print(text, end="")
    else:
        write_texts({out: text})
        print(listed(json=out))
    return 0
