"""The colors of every picture: told apart by color-blind readers, at least 3:1 on white and on near-black."""

from __future__ import annotations

CURVES: tuple[str, ...] = ("#2d6fd2", "#e0690c", "#1aa68e", "#a04090")
REFERENCE = "#808489"
RULE = "#c8463f"
