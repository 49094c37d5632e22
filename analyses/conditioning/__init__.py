"""Figures CO: conditioning of the optimization problem, with and without normalization."""

from __future__ import annotations

from types import ModuleType
from typing import Final

SCRIPTS: Final[tuple[ModuleType, ...]] = ()
