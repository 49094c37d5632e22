"""Recorded numbers of normscope.norms.families.areas."""

from normscope.norms.table import build
from tests.norms.keys.key import Key

_MOVING = {"gamma": "weight", "beta": "bias", "moving_x": "running_mean", "moving_x2": "running_square"}


def _group_means(value, data):
    # recorded per channel, averaged over the channels of a group when used
    return value.reshape(4, 2).mean(1)


_PER_CHANNEL = {
    "state3/moving_x": "we store a mean for each group, they one for each channel of it, of the same average",
    "state3/moving_x2": "the same",
}
_NO_STATE = {
    f"{step}/{name}": "stored by their code, used by none of its outputs"
    for step in ("state0", "state3")
    for name in ("moving_x", "moving_x2")
}

_GAMMA = {"gamma": "weight", "beta": "bias"}

_IMPORTANCE = {
    "sa.conv1.weight": "importance.weight",
    "sa.gamma_conv.weight": "gain_map.weight",
    "sa.gamma_conv.bias": "gain_map.bias",
    "sa.beta_conv.weight": "bias_map.weight",
    "sa.beta_conv.bias": "bias_map.bias",
}

KEYS = (
    Key("torch_bn1d", lambda: build("batch", 8)),
    Key("torch_bn2d", lambda: build("batch", 8)),
    Key("torch_ln", lambda: build("layer", (8, 4, 4))),
    Key("torch_ln_last", lambda: build("layer", 8)),
    Key("timm_groupnorm1", lambda: build("layer", 8)),
    Key("torch_in2d", lambda: build("instance", 8)),
    Key("torch_gn", lambda: build("group", 8, groups=4)),
    Key("pono", lambda: build("positional", 8)),
    Key("timm_layernorm2d", lambda: build("positional", 8, eps=1e-6, affine=True, unbiased=False)),
    Key("fourthings_ghostbn", lambda: build("ghost-batch", 8, examples=4), _MOVING),
    Key(
        "fourthings_batchgroup",
        lambda: build("batch-group", 8, groups=4, examples=2),
        _MOVING,
        put={"running_mean": _group_means, "running_square": _group_means},
        skip=_PER_CHANNEL,
    ),
    Key("fourthings_gn", lambda: build("group", 8, groups=4), _MOVING, skip=_NO_STATE),
    Key("lcn_local", lambda: build("local-context", 8, window=3, published=True)),
    Key("lcn_global", lambda: build("local-context", 8)),
    Key("torch_lrn", lambda: build("local-response", 8, size=5, alpha=0.01, beta=0.75, k=1.0)),
    Key("divnorm1d", lambda: build("divisive", 8, sum_window=3, sup_window=5), _GAMMA),
    Key("divnorm2d", lambda: build("divisive", 8), _GAMMA),
    Key("rn_l", lambda: build("region", 8, learned=True, threshold=0.5), _IMPORTANCE),
)

ONCE = ()
