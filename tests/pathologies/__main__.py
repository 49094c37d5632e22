"""Score the committed records, or train cases and record them anew.

python -m tests.pathologies score [--json]
python -m tests.pathologies train [CASE ...] [--missing]
python -m tests.pathologies show CASE
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from tqdm import tqdm

import normscope as ns
from normscope.core.record import Record
from normscope.core.table import findings_table
from tests.pathologies import CASES, records
from tests.pathologies.case import Case
from tests.pathologies.score import Result, judge, summary

NORMALIZATION = "no finding"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.pathologies", description="Runs with known defects.")
    parser.add_argument("command", choices=("score", "train", "show"))
    parser.add_argument("cases", nargs="*", default=["*"], help="globs over names of cases")
    parser.add_argument("--json", action="store_true", help="print the score as JSON")
    parser.add_argument("--missing", action="store_true", help="train only cases without a record")
    arguments = parser.parse_args()
    chosen = [case for case in CASES if any(fnmatchcase(case.name, glob) for glob in arguments.cases)]
    if not chosen:
        print(f"no case matches {arguments.cases}; there are: {', '.join(c.name for c in CASES)}", file=sys.stderr)
        return 2
    if arguments.command == "train":
        for case in chosen:
            if not (arguments.missing and records.path_of(case.name).exists()):
                _record(case)
        return 0
    if arguments.command == "show":
        for case in chosen:
            print(f"\n== {case.name}: {', '.join(case.expect) or 'healthy'}")
            print(findings_table(ns.diagnose(records.load(records.path_of(case.name))), 160, False))
        return 0
    quiet = arguments.json or not sys.stderr.isatty()
    found = [_judged(case) for case in tqdm(chosen, disable=quiet, unit="case")]
    whole = summary(found)
    print(json.dumps(whole) if arguments.json else _text(found, whole))
    return 0 if all(result.ok for result in found) else 1


def fresh(case: Case) -> Record:
    """Run a case anew."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    setup = case.build()
    if case.change is not None:
        case.change(setup)
    return case.run(setup)


def _judged(case: Case) -> Result:
    return judge(case, ns.diagnose(records.load(records.path_of(case.name))))


def _record(case: Case) -> None:
    start = time.perf_counter()
    record = fresh(case)
    took = time.perf_counter() - start
    size = records.save(record, records.path_of(case.name))
    result = judge(case, ns.diagnose(records.load(records.path_of(case.name))))
    large = " TOO LARGE" if size > records.LARGEST else ""
    slow = " TOO SLOW" if took > 20 else ""
    print(
        f"{'ok  ' if result.ok else 'MISS'} {case.name:32} {took:5.1f} s {size / 1e3:6.0f} kB{large}{slow} "
        f"rank {result.rank} alarms {', '.join(dict.fromkeys(result.alarms)) or '-'}",
        flush=True,
    )


def _text(found: Sequence[Result], whole: dict[str, object]) -> str:
    broken, healthy = [r for r in found if r.expected], [r for r in found if not r.expected]
    lines = [
        f"recall        {whole['recall']:.1%} of {len(broken)} broken runs: right finding and site, at most 3 before",
        f"precision     {whole['precision']:.1%} of the warnings of broken runs name the defect or are grouped with it",
        f"false alarms  {whole['false_alarms']} in {len(healthy)} healthy runs",
        "",
        "per subject of the defect",
    ]
    subjects = dict.fromkeys(r.expected[0].partition(".")[0] for r in broken)
    for subject in subjects:
        mine = [r for r in broken if r.expected[0].startswith(f"{subject}.")]
        lines.append(f"  {subject:14}{sum(r.ok for r in mine)}/{len(mine)}")
    lines += ["", "confusion: the defect's finding, and what stands first in the report"]
    table = Counter((r.expected[0], r.found[0] if r.found else NORMALIZATION) for r in broken)
    lines += [f"  {expected:34} {first:34} {n}" for (expected, first), n in sorted(table.items())]
    stray = Counter(alarm for r in broken for alarm in r.stray)
    lines += ["", "warnings that belong to no defect:"] if stray else []
    lines += [
        f"  {alarm:34} {n}  {', '.join(r.case for r in broken if alarm in r.stray)}" for alarm, n in stray.items()
    ]
    missed = [r for r in found if not r.ok]
    lines += ["", "not ok:"] if missed else ["", "all as expected"]
    lines += [
        f"  {r.case:30} expected {', '.join(r.expected) or 'no warning'}; rank {r.rank}; found {', '.join(r.found)}"
        for r in missed
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
