"""Figures RE: what normalization leaves of the representation."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from analyses.representation import re_01_constraints, re_02_groups, re_03_separability, re_04_bn_only, re_05_gamma

SCRIPTS: Final[tuple[ModuleType, ...]] = (
    re_01_constraints,
    re_02_groups,
    re_03_separability,
    re_04_bn_only,
    re_05_gamma,
)
