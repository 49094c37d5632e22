"""Recorded numbers of normscope.norms.families.robust."""

import torch

from normscope.norms.table import build
from tests.norms.keys.key import Key

_ONLINE = {"m": "running_mean", "var": "running_var", "u": "control_mean", "v": "control_var"}
_MOVING = {"iters": "num_batches_tracked", "buffer_x2": "buffer_square", "buffer_gz": "buffer_product"}
_POWER = {"iters": "num_batches_tracked", "ema_gz": "control"}


class _Convolved(torch.nn.Module):
    """A convolution and its cross-iteration normalization."""

    def __init__(self, **options):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.cbn = build("cross-iteration-batch", 8, **options)

    def forward(self, x):
        return self.cbn(self.conv(x), self.conv.weight)


def _moved(layer, x, step, data):
    with torch.no_grad():
        layer.conv.weight.copy_(data[f"extra/conv_weight{'3' if step == '_eval' else step}"])
    return layer(x)


def _selected(layer, x, step, data):
    return layer(x) if step == "_eval" else layer(x, data[f"extra/s{step}"])


KEYS = (
    Key("batchrenorm_mid", lambda: build("batch-renorm", 8)),
    Key("onlinenorm_none", lambda: build("online", 8, guard="none"), _ONLINE),
    Key("mabn_warmup", lambda: build("moving-average-batch", 8, batches=2), _MOVING),
    Key("mabn_ma", lambda: build("moving-average-batch", 8, batches=2, warmup=0), _MOVING),
    Key("powernorm_warm", lambda: build("power", 8, groups=2, warmup=4), _POWER),
    Key("powernorm_post", lambda: build("power", 8, groups=2, warmup=0), _POWER),
    Key("cbn", lambda: _Convolved(memory=2), call=_moved),
    Key("stochnorm_truegrad", lambda: build("stochastic", 8), call=_selected),
)

ONCE = ()
