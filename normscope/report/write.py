"""Writing: the page and its twins, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from normscope.core.errors import StoreError
from normscope.core.finding import Finding, worst_first
from normscope.core.illustration import illustrations
from normscope.core.record import Record
from normscope.report.markdown import markdown
from normscope.report.page import page


def write_report(record: Record, findings: Sequence[Finding], path: str | Path) -> Path:
    """Write the page that explains a record, and beside it the same as Markdown and the findings as JSON.

    Args:
        record: what was measured.
        findings: what is concluded from it.
        path: the page, as "report.html", or a folder for it, which may be new in one that exists. The Markdown has
            the same name with the ending .md; the JSON is findings.json beside report.html, else the page's name with
            the ending .json.

    Returns:
        The path of the page. Where it cannot be written, or its folder lies in none, that is a StoreError.
    """
    target = Path(path)
    target = target / "report.html" if target.is_dir() or not target.suffix else target
    ordered = worst_first(findings)
    texts = {
        json_beside(target): findings_json(ordered),
        target.with_suffix(".md"): markdown(record, ordered),
        target: page(record, ordered, markdown_name=target.with_suffix(".md").name, json_name=json_beside(target).name),
    }
    write_texts(texts)
    return target


def json_beside(page: Path) -> Path:
    """Return the file of the findings beside a page: several pages in one folder have their own."""
    return page.with_name("findings.json") if page.stem == "report" else page.with_suffix(".json")


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write files of one folder, which is created where only it is missing.

    Args:
        texts: the text of each file.

    Raises:
        StoreError: if the folder that the folder lies in does not exist, or if a file cannot be written.
    """
    folder = next(iter(texts)).parent
    if not folder.parent.exists():
        raise StoreError(f"path={str(folder)!r} lies in no folder: {folder.parent} does not exist; create that first.")
    for file, text in texts.items():
        try:
            folder.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise StoreError(
                f"path={str(file)!r} cannot be written ({error}); choose a folder you may write."
            ) from error


def findings_json(findings: Sequence[Finding]) -> str:
    """Return the public JSON form of findings, in the order given; strict JSON, whatever the numbers.

    Besides `Finding.as_dict`, `figures` has the ids of the survey's figures that show the effect.
    """
    rows = [finding.as_dict() | {"figures": [f.id for f in illustrations(finding.id)]} for finding in findings]
    return json.dumps(rows, indent=1, allow_nan=False, default=int) + "\n"
