"""Figures SI: scale invariance, the norms of weights and the effective learning rate."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from analyses.scale import (
    si_01_identities,
    si_02_norm_growth,
    si_03_momentum_growth,
    si_04_angular_update,
    si_05_equilibrium_norm,
    si_06_adamw,
    si_07_exponential_rate,
    si_08_reparametrization,
    si_09_auto_rate_tuning,
    si_10_decay_placement,
    si_11_learning_rate_correction,
    si_12_invariance_table,
    si_13_optimizers,
    si_14_exponential_weight_norm,
    si_15_path_invariance,
    si_16_adaptive_filter,
    si_17_spherical_adam,
    si_18_spheres,
)

SCRIPTS: Final[tuple[ModuleType, ...]] = (
    si_01_identities,
    si_02_norm_growth,
    si_03_momentum_growth,
    si_04_angular_update,
    si_05_equilibrium_norm,
    si_06_adamw,
    si_07_exponential_rate,
    si_08_reparametrization,
    si_09_auto_rate_tuning,
    si_10_decay_placement,
    si_11_learning_rate_correction,
    si_12_invariance_table,
    si_13_optimizers,
    si_14_exponential_weight_norm,
    si_15_path_invariance,
    si_16_adaptive_filter,
    si_17_spherical_adam,
    si_18_spheres,
)
