"""Recorded numbers of normscope.norms.families.graph."""

import torch

from normscope.norms.table import build
from tests.norms.keys.key import Key, Once

_SIZES = torch.tensor([0] * 3 + [1] * 5 + [2] * 4)


def _by_size(layer, x, step, data):
    return layer(x, _SIZES)


def _by_index(layer, x, step, data):
    return layer(x, data["extra/batch"])


_GROUPS = {
    f"bn.{n}": f"batch.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
} | {f"group_func.{n}": f"assign.{n}" for n in ("weight", "bias")}

KEYS = (
    Key("graphnorm", lambda: build("graph", 8), call=_by_size),
    Key("pyg_graphnorm", lambda: build("graph", 8, eps=1e-5), call=_by_index),
    Key("pyg_instancenorm", lambda: build("graph-instance", 8), call=_by_index),
    Key("pyg_layernorm_graph", lambda: build("graph-layer", 8), call=_by_index),
    Key("pyg_meansub", lambda: build("mean-subtraction", 8), call=_by_index),
    Key("pairnorm_pn", lambda: build("pair", 8, scale=1.5)),
    Key("pairnorm_pn_si", lambda: build("pair", 8, mode="individual", scale=1.5)),
    Key("pairnorm_pn_scs", lambda: build("pair", 8, mode="center-last", scale=1.5)),
    Key("pyg_pairnorm", lambda: build("pair", 8, scale=2.0, eps=1e-5), call=_by_index),
)

ONCE = (Once("dgn_group", lambda: build("differentiable-group", 4, groups=3), _GROUPS),)
