"""Figures SC: the survey's schematic drawings."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from analyses.schematics import sc_01_whitening

SCRIPTS: Final[tuple[ModuleType, ...]] = (sc_01_whitening,)
