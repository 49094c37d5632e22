"""Figures CO: conditioning of the optimization problem, with and without normalization."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from analyses.conditioning import (
    co_16_rank,
    co_17_gradient_explosion,
    co_18_fixed_point,
    co_19_sensitivity,
    co_20_learning_rates,
    co_21_length_and_direction,
    co_22_minimum_norm,
)

SCRIPTS: Final[tuple[ModuleType, ...]] = (
    co_16_rank,
    co_17_gradient_explosion,
    co_18_fixed_point,
    co_19_sensitivity,
    co_20_learning_rates,
    co_21_length_and_direction,
    co_22_minimum_norm,
)
