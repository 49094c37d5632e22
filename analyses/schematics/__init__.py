"""Figures SC: the survey's schematic drawings."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from analyses.schematics import sc_01_whitening, sc_02_areas, sc_03_parts

SCRIPTS: Final[tuple[ModuleType, ...]] = (sc_01_whitening, sc_02_areas, sc_03_parts)
