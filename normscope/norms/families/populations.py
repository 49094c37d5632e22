"""Methods that normalize by population statistics, and estimators of statistics for inference."""

from __future__ import annotations

from normscope.norms.row import Row

ROWS: tuple[Row, ...] = ()
