"""Methods that mix: several modes, or several normalizations with learned weights."""

from __future__ import annotations

from normscope.norms.row import Row

ROWS: tuple[Row, ...] = ()
