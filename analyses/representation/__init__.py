"""Figures RE: what normalization leaves of the representation."""

from __future__ import annotations

from types import ModuleType
from typing import Final

SCRIPTS: Final[tuple[ModuleType, ...]] = ()
