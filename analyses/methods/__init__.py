"""Figures RB and AS: representative batch normalization and associate normalization."""

from __future__ import annotations

from types import ModuleType
from typing import Final

SCRIPTS: Final[tuple[ModuleType, ...]] = ()
