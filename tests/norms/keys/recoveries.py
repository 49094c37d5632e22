"""Recorded numbers of normscope.norms.families.recoveries."""

from normscope.norms.table import build
from tests.norms.keys.key import Key, Once


def _with_map(layer, x, step, data):
    return layer(x, data["extra/segmap"])


def _with_map_once(layer, x, data, *, training):
    return layer(x, data["segmap"])


_SPADE = {
    f"{old}.{kind}": f"{new}.{kind}"
    for old, new in (("mlp_shared.0", "map_hidden"), ("mlp_gamma", "map_gain"), ("mlp_beta", "map_shift"))
    for kind in ("weight", "bias")
}
_BATCH = {f"param_free_norm.{name}": name for name in ("running_mean", "running_var", "num_batches_tracked")}

_ENHANCED = {"weight_readjust": "gate_weight", "bias_readjust": "gate_bias"}

_META = {
    "weight_bias": "weight",
    "bias_bias": "bias",
    "fc_embed.0.weight": "embed.weight",
    "fc_weight.1.weight": "to_scale.weight",
    "fc_bias.1.weight": "to_shift.weight",
}

_MIXED = {"weight_": "weight", "bias_": "bias"} | {
    f"attention_weights.attention.{name}": f"attention.{name}"
    for name in (
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    )
}

_NO_COUNT = {
    name: "their code does not count the batches" for name in ("state3/num_batches_tracked", "buf1_num_batches_tracked")
}

_UNUSED = {f"state0/{name}": "their layer has it and uses it nowhere" for name in ("weight", "bias")}

KEYS = (
    Key("iln", lambda: build("iln", 8), {"rho": "mix", "gamma": "weight", "beta": "bias"}),
    Key("ilm_gn", lambda: build("ilm", 32, groups=16, keys=8), _META),
    Key(
        "spade_instance",
        lambda: build("spade", 4, labels=3, norm="instance"),
        _SPADE,
        call=_with_map,
    ),
    Key("iebn", lambda: build("iebn", 8), _ENHANCED, skip=_NO_COUNT),
    Key("an_bn_mode0", lambda: build("attentive", 8, mixtures=3, attention="sigmoid"), _MIXED),
    Key("an_bn_mode2", lambda: build("attentive", 8, mixtures=3), _MIXED),
    Key("an_bn_mode4", lambda: build("attentive", 8, mixtures=3, attention="hsigmoid"), _MIXED),
    Key("adanorm", lambda: build("adanorm", 8, scale=2.0), skip=_UNUSED),
    Key("ln_simple_nowb", lambda: build("simple-layer", 8), skip=_UNUSED),
    Key("ln_detach", lambda: build("detached-layer", 8), skip=_UNUSED),
    Key("ln_topk", lambda: build("clipped-layer", 8, tail=0.25)),
    Key("rbn", lambda: build("rbn", 8)),
)

ONCE = (
    Once("spade_batch", lambda: build("spade", 3, labels=5, hidden=6), _SPADE | _BATCH, call=_with_map_once),
    Once(
        "spade_instance",
        lambda: build("spade", 3, labels=5, hidden=6, norm="instance"),
        _SPADE,
        call=_with_map_once,
    ),
    Once("iebn", lambda: build("iebn", 3), _ENHANCED, skip=_NO_COUNT),
)
