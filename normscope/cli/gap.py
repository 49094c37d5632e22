"""normscope gap: measure a model of the user's with running, batch and recalibrated statistics, and write the page."""

from __future__ import annotations

import argparse
from pathlib import Path

from normscope.cli.factory import called, reference
from normscope.cli.folder import listed
from normscope.report.gap import as_json
from normscope.scope.gap import MAX_BATCHES, gap

RETURNS = ("model", "train_batches")
OPTIONAL = ("target_batches", "metric")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "factory",
        metavar="MODULE:NAME",
        type=reference,
        help="a function without arguments that returns (model, train_batches[, target_batches[, metric]]): batches of "
        "(input, target), None for those you do not have; metric(model, batches), a number or one a sample, accuracy "
        "by default; the current folder is importable",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the page (default: runs/gap-NAME); what it holds is replaced"
    )
    parser.add_argument("--json", action="store_true", help="print tables and findings as JSON, without the path")
    parser.add_argument("--lower-is-better", action="store_true", help="the metric is a loss or an error")
    parser.add_argument(
        "--batches",
        metavar="N",
        type=_count,
        default=MAX_BATCHES,
        help=f"batches of each data (default: {MAX_BATCHES})",
    )
    parser.add_argument("--norms", metavar="N", type=_count, help="norms switched by themselves (default: all)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and judge, write the page; print tables, findings and where it is."""
    out = arguments.out or Path("runs") / f"gap-{arguments.factory.partition(':')[2]}"
    with called(arguments.factory, RETURNS, OPTIONAL) as (model, train, target, metric):
        found = gap(
            model,
            train,
            target,
            metric=metric,
            higher_is_better=not arguments.lower_is_better,
            max_batches=arguments.batches,
            max_norms=arguments.norms,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    page = found.report(out / "report.html")
    if arguments.json:
        print(as_json(found.measured, found.findings), end="")
    else:
        print(f"{found}\n\n{listed(report=page)}")
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, at least 1")
    return int(text)
