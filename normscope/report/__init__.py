"""Report: one page that explains a run, with its Markdown and JSON twins."""

from __future__ import annotations

from normscope.report.write import write_report

__all__ = ["write_report"]
