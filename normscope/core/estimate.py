"""Estimate: a number that says how it was obtained and whether to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    """Whether an estimate can be used; the value explains it."""

    EXACT = "computed from all the data, no sampling"
    SAMPLED = "computed from a sample; the standard error says how well"
    FEW_SAMPLES = "too few samples for a statement"
    NOT_RECORDED = "the record does not hold what this needs"
    NON_FINITE = "the data contain NaN or infinity"
    RANK_DEFICIENT = "the smallest eigenvalue asked for is zero up to rounding: fewer directions carry anything"
    NOT_ESTIMATED = "not estimated: the layer is too wide for all its eigenvalues to be taken"


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error, unit, sample count, status and source.

    Attributes:
        value: the estimate; NaN where the status says that there is none.
        standard_error: standard error of the value, 0 for an exact one, NaN where unknown.
        unit: unit of the value; "1" for a ratio.
        n: number of samples behind it.
        status: whether, and why not, it can be used.
        source: key into the bibliography.
    """

    value: float
    standard_error: float = math.nan
    unit: str = "1"
    n: int = 0
    status: Status = Status.SAMPLED
    source: str = ""

    @property
    def usable(self) -> bool:
        """Whether the value may be compared with a threshold."""
        return self.status in (Status.EXACT, Status.SAMPLED) and math.isfinite(self.value)

    @staticmethod
    def missing(status: Status, source: str = "") -> Estimate:
        """Return an estimate without a value, for the reason given."""
        return Estimate(math.nan, status=status, source=source)

    def __str__(self) -> str:
        """Write value, standard error and unit, or the reason why there is none."""
        if not self.usable:
            return self.status.value
        error = f" ± {self.standard_error:.2g}" if self.standard_error > 0 else ""
        return f"{self.value:.4g}{error}{'' if self.unit == '1' else ' ' + self.unit}"
