"""Methods that whiten, over batch, groups or instances."""

from __future__ import annotations

from normscope.norms.row import Row

ROWS: tuple[Row, ...] = ()
