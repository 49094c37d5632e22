"""Methods that differ in the recovery: conditional, adaptive, spatial, predicted from the input."""

from __future__ import annotations

from normscope.norms.row import Row

ROWS: tuple[Row, ...] = ()
