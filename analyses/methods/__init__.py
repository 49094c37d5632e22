"""Figures RB and AS: representative batch normalization and associate normalization."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from analyses.methods import (
    as_01_parameters,
    as_02_batch_size,
    rb_01_centering,
    rb_02_scaling,
    rb_03_equal_features,
    rb_04_calibrations,
)

SCRIPTS: Final[tuple[ModuleType, ...]] = (
    rb_01_centering,
    rb_02_scaling,
    rb_03_equal_features,
    rb_04_calibrations,
    as_01_parameters,
    as_02_batch_size,
)
