"""Site: where a tensor lives; Key: which number of it is meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, order=True)
class Site:
    """Where a tensor lives: module path, call index within one forward pass, slot.

    Attributes:
        module: dotted path in the model; "" is the model itself.
        call: 0 for the first call of the module in a pass, 1 for the second (a shared module runs more than once).
        slot: "input", "output", "output.0", "output.logits", or the name of a parameter or buffer.

    >>> str(Site("layer1.conv", 0, "output")), str(Site("shared", 1, "weight"))
    ('layer1.conv/output', 'shared#1/weight')
    """

    module: str
    call: int = 0
    slot: str = "output"

    def __str__(self) -> str:
        """Write the site as `module[#call]/slot`."""
        return f"{self.module}{f'#{self.call}' if self.call else ''}/{self.slot}"


class Key(NamedTuple):
    """One series of a record: a site, seen in a phase, in a role, by a statistic.

    Attributes:
        site: the site as a string.
        phase: "train" for the training steps themselves, "batch" and "population" for a held batch run with batch or
            with running statistics, "noise" for held samples run in many batches, "flight" for the steps of which the
            flight recorder holds every one.
        role: "value" (activation, weight, buffer), "gradient" or "update".
        stat: name of the statistic; "rms" is over the whole layer, "rms.min", "rms.q50", "rms.max" over its channels.
    """

    site: str
    phase: str
    role: str
    stat: str
