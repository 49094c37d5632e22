"""Figures CO: conditioning of the optimization problem, with and without normalization."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from analyses.conditioning import (
    co_01_condition_by_layer,
    co_02_largest_eigenvalue,
    co_03_weight_domination,
    co_04_last_layer,
    co_05_input_covariance,
    co_06_hessian_density,
    co_07_outliers_and_gradient,
    co_08_loss_along_gradient,
    co_09_gradient_predictiveness,
    co_10_effective_smoothness,
    co_11_noisy_batch_norm,
    co_12_covariate_shift,
    co_13_largest_learning_rate,
    co_14_channels_by_depth,
    co_15_fisher_and_width,
    co_16_rank,
    co_17_gradient_explosion,
    co_18_fixed_point,
    co_19_sensitivity,
    co_20_learning_rates,
    co_21_length_and_direction,
    co_22_minimum_norm,
    co_23_fisher_and_gamma,
    co_25_weight_norm_kernel,
    co_26_signal_propagation,
)

SCRIPTS: Final[tuple[ModuleType, ...]] = (
    co_01_condition_by_layer,
    co_02_largest_eigenvalue,
    co_03_weight_domination,
    co_04_last_layer,
    co_05_input_covariance,
    co_06_hessian_density,
    co_07_outliers_and_gradient,
    co_08_loss_along_gradient,
    co_09_gradient_predictiveness,
    co_10_effective_smoothness,
    co_11_noisy_batch_norm,
    co_12_covariate_shift,
    co_13_largest_learning_rate,
    co_14_channels_by_depth,
    co_15_fisher_and_width,
    co_16_rank,
    co_17_gradient_explosion,
    co_18_fixed_point,
    co_19_sensitivity,
    co_20_learning_rates,
    co_21_length_and_direction,
    co_22_minimum_norm,
    co_23_fisher_and_gamma,
    co_25_weight_norm_kernel,
    co_26_signal_propagation,
)
