"""Figures ST: the noise that batch statistics add."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from analyses.stochasticity import (
    st_01_cloud,
    st_02_batch_size,
    st_03_dimension,
    st_04_group_size,
    st_05_iterations,
    st_06_statistics,
    st_07_discrepancy,
    st_08_population,
    st_09_uncertainty,
    st_10_prediction_time,
    st_11_enhancement,
)

SCRIPTS: Final[tuple[ModuleType, ...]] = (
    st_01_cloud,
    st_02_batch_size,
    st_03_dimension,
    st_04_group_size,
    st_05_iterations,
    st_06_statistics,
    st_07_discrepancy,
    st_08_population,
    st_09_uncertainty,
    st_10_prediction_time,
    st_11_enhancement,
)
