"""Figures AP: uses of normalization beyond training."""

from __future__ import annotations

from types import ModuleType
from typing import Final

SCRIPTS: Final[tuple[ModuleType, ...]] = ()
