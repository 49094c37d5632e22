"""Figures ST: the noise that batch statistics add."""

from __future__ import annotations

from types import ModuleType
from typing import Final

SCRIPTS: Final[tuple[ModuleType, ...]] = ()
