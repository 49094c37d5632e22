"""Methods for graphs, point sets and matrices."""

from __future__ import annotations

from normscope.norms.row import Row

ROWS: tuple[Row, ...] = ()
