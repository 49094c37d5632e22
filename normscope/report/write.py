"""Writing: the page and its twins, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from normscope.core.errors import StoreError
from normscope.core.finding import Finding, worst_first
from normscope.core.record import Record
from normscope.report.markdown import markdown
from normscope.report.page import page


def write_report(record: Record, findings: Sequence[Finding], path: str | Path) -> Path:
    """Write the page that explains a record, and beside it the same as Markdown and the findings as JSON.

    Args:
        record: what was measured.
        findings: what is concluded from it.
        path: the page, as "report.html", or a folder for it. The Markdown has the same name with the ending .md; the
            JSON is findings.json.

    Returns:
        The path of the page.

    Raises:
        StoreError: if the files cannot be written.
    """
    target = Path(path)
    target = target / "report.html" if target.is_dir() or not target.suffix else target
    ordered = worst_first(findings)
    texts = {
        target.with_name("findings.json"): findings_json(ordered),
        target.with_suffix(".md"): markdown(record, ordered),
        target: page(record, ordered, markdown_name=target.with_suffix(".md").name),
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"path={str(path)!r} cannot be written ({error}); choose a folder you may write.") from error
    return target


def findings_json(findings: Sequence[Finding]) -> str:
    """Return the public JSON form of findings, in the order given; strict JSON, whatever the numbers."""
    return json.dumps([finding.as_dict() for finding in findings], indent=1, allow_nan=False, default=int) + "\n"
