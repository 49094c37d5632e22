"""Methods that estimate batch statistics more robustly: over time, over layers, or from stored ones."""

from __future__ import annotations

from normscope.norms.row import Row

ROWS: tuple[Row, ...] = ()
