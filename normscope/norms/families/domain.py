"""Methods for several domains, tasks, widths or roles: statistics of each, or shared in part."""

from __future__ import annotations

from normscope.norms.row import Row

ROWS: tuple[Row, ...] = ()
