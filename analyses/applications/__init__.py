"""Figures AP: uses of normalization beyond training."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from analyses.applications import ap_01_domains, ap_02_style, ap_03_tent, ap_04_slimming, ap_05_adversarial

SCRIPTS: Final[tuple[ModuleType, ...]] = (
    ap_01_domains,
    ap_02_style,
    ap_03_tent,
    ap_04_slimming,
    ap_05_adversarial,
)
