"""normscope examine: look at a model of the user's as it is, nothing trained, and write the page."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from normscope.cli.factory import called, reference
from normscope.cli.folder import free, listed
from normscope.core.table import findings_table
from normscope.diagnostics import diagnose
from normscope.report.write import findings_json, write_report
from normscope.scope.examine import MAX_BATCHES, examine
from normscope.scope.session import SUBJECTS

RETURNS = ("model", "loss", "batches")
ALWAYS = ("run", "training", "structure", "optimizer")  # told whatever subjects are asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "factory",
        metavar="MODULE:NAME",
        type=reference,
        help="a function without arguments that returns (model, loss, batches): loss(output, target), batches of "
        "(input, target); the current folder is importable",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the run, new (default: runs/examine-NAME, then -2, -3, ...)"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, without the paths")
    parser.add_argument(
        "--subjects",
        nargs="+",
        choices=tuple(SUBJECTS),
        default=tuple(SUBJECTS),
        metavar="SUBJECT",
        help=f"measure and judge these alone: {', '.join(SUBJECTS)} (default: all)",
    )
    parser.add_argument(
        "--batches",
        metavar="N",
        type=int,
        choices=range(1, MAX_BATCHES + 1),
        default=MAX_BATCHES,
        help=f"run N batches at most, 1 to {MAX_BATCHES} (default: {MAX_BATCHES})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Examine, judge, write the run and its page; print the findings and where these are."""
    out = arguments.out or free(Path("runs") / f"examine-{arguments.factory.partition(':')[2]}")
    with called(arguments.factory, RETURNS) as (model, loss, batches):
        probes = dict.fromkeys(probe for subject in arguments.subjects for probe in SUBJECTS[subject])
        record = examine(model, loss, _first(batches, arguments.batches), run=out, probes=probes)
    findings = [finding for finding in diagnose(record) if finding.subject in (*ALWAYS, *arguments.subjects)]
    page = write_report(record, findings, out / "report.html")
    if arguments.json:
        print(findings_json(findings), end="")
    else:
        print(findings_table(findings, shutil.get_terminal_size().columns))
        print(f"\n{listed(run=out, report=page)}")
    return 0


def _first(batches: Any, count: int) -> Any:
    """Return the first batches; what cannot be batches is left to `examine` to refuse."""
    if isinstance(batches, list | tuple):
        return batches[:count]
    usable = isinstance(batches, Iterable) and not isinstance(batches, torch.Tensor)
    return islice(batches, count) if usable else batches
