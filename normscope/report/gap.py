"""The page of a gap, its text for a terminal and its JSON twin."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from normscope.core.finding import Finding, Verdict, worst_first
from normscope.core.table import SYMBOLS, count, counted, printable
from normscope.figures.palette import CURVES, REFERENCE, RULE
from normscope.metrics.gap import BATCH, GIVEN, RUNNING, TARGET, TRAINING, Measurements, ranking, table
from normscope.report.page import environment, template
from normscope.report.summary import passed
from normscope.report.text import number
from normscope.report.write import json_beside, write_texts

WORDS = {
    GIVEN: "as handed over",
    RUNNING: "running, as stored",
    BATCH: "of each batch",
    TRAINING: "recalibrated on training data",
    TARGET: "recalibrated on target data",
}
SHOWN = 20  # norms that the page draws and the text lists at most
_LISTED = 6
_WIDTH = 100


@dataclass(frozen=True)
class Bar:
    """One norm in the picture: its name, its place and extent from 0 to 100, and its numbers as text.

    Attributes:
        name: path of the norm.
        at: place of the recovered metric.
        low: where the bar of two standard errors begins.
        high: where it ends.
        text: recovered metric with its standard error.
        beyond: whether it is more than chance explains.
    """

    name: str
    at: float
    low: float
    high: float
    text: str
    beyond: bool


def write(measured: Measurements, findings: Sequence[Finding], path: str | Path) -> Path:
    """Write the page, and beside it tables and findings as JSON.

    Args:
        measured: the measurements.
        findings: what follows from them.
        path: the page, or a folder for report.html, which may be new in one that exists.

    Returns:
        The path of the page. If it cannot be written this is a StoreError.
    """
    target = Path(path)
    target = target / "report.html" if target.is_dir() or not target.suffix else target
    write_texts({json_beside(target): as_json(measured, findings), target: document(measured, findings)})
    return target


def as_json(measured: Measurements, findings: Sequence[Finding]) -> str:
    """Return `{table, norms, findings}` as strict JSON; what is not finite is null."""
    frames = {"table": table(measured), "norms": ranking(measured)}
    plain: dict[str, object] = {name: _records(frame) for name, frame in frames.items()}
    plain["findings"] = [finding.as_dict() for finding in worst_first(findings)]
    return json.dumps(plain, indent=1, allow_nan=False, default=int) + "\n"


def _records(frame: pd.DataFrame) -> list[dict[str, object]]:
    rows = frame.astype(object).to_dict("records")
    return [
        {str(k): None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows
    ]


def document(measured: Measurements, findings: Sequence[Finding], *, whole: bool = True) -> str:
    """Write the page, or its body for a notebook.

    Args:
        measured: the measurements.
        findings: what follows from them.
        whole: False for the two tables and the findings alone.

    Returns:
        HTML without script and without a request to anywhere.
    """
    rows, norms = table(measured), ranking(measured)
    bars, zero, ticks = picture(norms)
    return (
        environment()
        .get_template("gap.html" if whole else "gap_cell.html")
        .render(
            model=measured.model,
            facts=facts(measured),
            metric=measured.metric,
            rows=[_row(row) for row in rows.to_dict("records")],
            norms=[_norm(row) for row in norms.to_dict("records")],
            ranked=len(measured.alone),
            bars=bars,
            zero=zero,
            ticks=ticks,
            findings=[finding for finding in worst_first(findings) if finding.verdict is not Verdict.OK],
            passed=passed(findings),
            counts=counted(findings),
            style=template("style.css"),
            curves=CURVES,
            reference=REFERENCE,
            rule=RULE,
        )
    )


def facts(measured: Measurements) -> list[str]:
    """Say in a few phrases what was measured."""
    better = "higher" if measured.sign > 0 else "lower"
    return [
        f"{measured.metric} ({better} is better)",
        f"{number(measured.samples)} samples of {measured.data} data in {_batches(measured.batches)}",
        f"{len(measured.norms)} norm{'' if len(measured.norms) == 1 else 's'} with running statistics",
        f"standard errors over {measured.over}",
    ]


def _batches(n: int) -> str:
    return f"{n} batch" if n == 1 else f"{n} batches"


def picture(norms: pd.DataFrame) -> tuple[list[Bar], float, list[tuple[float, str]]]:
    """Place the norms that were switched on an axis from 0 to 100.

    Args:
        norms: the ranking.

    Returns:
        The bars, the place of no change, and ticks with their texts; no bars where nothing can be drawn.
    """
    drawn = norms[norms["recovered"].notna()].head(SHOWN)
    if not len(drawn):
        return [], 0.0, []
    error = 2 * drawn["standard_error"].fillna(0.0)
    low, high = min(0.0, float((drawn["recovered"] - error).min())), float((drawn["recovered"] + error).max())
    high = high if high > max(low, 0.0) else low + 1.0 if low == 0 else 0.0
    scale = 100 / (high - low)
    bars = [
        Bar(
            name=str(row["norm"]) or "(the model)",
            at=(row["recovered"] - low) * scale,
            low=(row["recovered"] - extent - low) * scale,
            high=(row["recovered"] + extent - low) * scale,
            text=_signed(row["recovered"], row["standard_error"]),
            beyond=bool(row["recovered"] > row["chance"]),
        )
        for row, extent in zip(drawn.to_dict("records"), error, strict=True)
    ]
    step = _step(high - low)
    ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return bars, -low * scale, [((tick - low) * scale, f"{tick:+.3g}" if tick else "0") for tick in ticks]


def _step(extent: float) -> float:
    """Return a round distance of three to six ticks."""
    power = 10.0 ** math.floor(math.log10(extent / 6))
    return next((k * power for k in (1, 2, 5) if k * power >= extent / 6), 10 * power)


def _signed(value: float, error: float) -> str:
    if not math.isfinite(value):
        return "–"
    spread = f" ± {error:.2g}" if math.isfinite(error) else ""
    return f"{value:+.3g}{spread}" if value else f"0{spread if error else ''}"


def _row(row: Mapping[Hashable, Any]) -> dict[str, str]:
    value, error = float(row["metric"]), float(row["standard_error"])
    spread = f" ± {error:.2g}" if math.isfinite(error) else ""
    recovered = "" if row["statistics"] == RUNNING else _signed(float(row["recovered"]), float(row["recovered_error"]))
    metric = f"{value:.4g}{spread}" if math.isfinite(value) else "–"
    words = WORDS[str(row["statistics"])]
    return {"statistics": words, "metric": metric, "recovered": recovered, "caveat": str(row["caveat"])}


def _known(value: Any) -> str:
    """Write a number of a norm, and a dash where there is none."""
    return "–" if math.isnan(value) else number(float(f"{value:.3g}"))


def _norm(row: Mapping[Hashable, Any]) -> dict[str, str]:
    return {
        "norm": str(row["norm"]) or "(the model)",
        "class": str(row["class"]),
        "channels": number(row["channels"]),
        "recovered": _signed(float(row["recovered"]), float(row["standard_error"])),
        "kl": _known(row["kl"]),
        "kl_max": _known(row["kl_max"]),
        "kl_train": _known(row["kl_train"]),
        "kl_expected": _known(row["kl_expected"]),
        "beyond": "–" if math.isnan(float(row["beyond"])) else f"{float(row['beyond']):.0%}",
        "momentum": _known(row["momentum"]),
        "updates": _known(row["updates"]),
    }


def plain(measured: Measurements, findings: Sequence[Finding]) -> str:
    """Write both tables and the findings for a terminal.

    Args:
        measured: the measurements.
        findings: what follows from them.

    Returns:
        Several lines.
    """
    rows = [_row(row) for row in table(measured).to_dict("records")]
    norms = [_norm(row) for row in ranking(measured).to_dict("records")]
    marks = {text: "†‡§"[i] for i, text in enumerate(dict.fromkeys(row["caveat"] for row in rows if row["caveat"]))}
    first = [(f"{row['statistics']} {marks.get(row['caveat'], '')}", row["metric"], row["recovered"]) for row in rows]
    second = [
        (printable(row["norm"]), row["recovered"], row["kl"], row["kl_expected"], row["beyond"])
        for row in norms[:_LISTED]
    ]
    lines = [f"Gap of {printable(measured.model)}: {', '.join(facts(measured))}", ""]
    lines += _columns(("statistics", printable(measured.metric), "recovered"), first)
    for text, mark in marks.items():
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent=f"  {mark} ", subsequent_indent="    ", break_on_hyphens=False
        )
    head = ("one norm switched", "recovered", "KL in nats", "expected", "channels beyond")
    lines += ["", *_columns(head, second)]
    lines += [f"  and {len(norms) - _LISTED} more in .norms"] if len(norms) > _LISTED else []
    for finding in worst_first(findings):
        lines += ["", *_told(finding)] if finding.verdict is not Verdict.OK else []
    totals = ", ".join(count(verdict, n) for verdict, n in counted(findings))
    return "\n".join([*lines, "", totals])


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [header, *rows]
    sizes = [max(len(row[i]) for row in cells) + 3 for i in range(len(header))]
    return [f"  {''.join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True))}".rstrip() for row in cells]


def _told(finding: Finding) -> list[str]:
    begin = f"{SYMBOLS[finding.verdict]} {finding.verdict.value}  {finding.id}"
    told = [("", finding.message), ("Cause: ", finding.cause), ("Remedy: ", finding.remedy)]
    wrapped = [textwrap.wrap(word + printable(text), _WIDTH - 4, break_on_hyphens=False) for word, text in told if text]
    return [begin, *(f"    {line}" for lines in wrapped for line in lines)]
