"""Recorded numbers of normscope.norms.families.domain."""

from normscope.norms.table import build
from tests.norms.keys.key import Once

_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _names(theirs):
    return {f"{theirs}.{i}.{name}": f"branches.{i}.{name}" for i in (0, 1) for name in _STATE}


def _second(layer, x, data, *, training):
    return layer(x, 1)


KEYS = ()

ONCE = (
    Once("dsbn", lambda: build("domain-specific", 3), _names("bns"), _second),
    Once("aux_bn", lambda: build("dual-batch", 3), _names("bn_list"), _second),
)
