"""Figures SI: scale invariance, the norms of weights and the effective learning rate."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from analyses.scale import si_01_identities, si_11_learning_rate_correction

SCRIPTS: Final[tuple[ModuleType, ...]] = (si_01_identities, si_11_learning_rate_correction)
