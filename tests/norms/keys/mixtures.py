"""Recorded numbers of normscope.norms.families.mixtures."""

from normscope.norms.table import build
from tests.norms.keys.key import Key

_SPARSE = {
    "radius": "circle",
    "attr.mean_weight_": "mean_mix",
    "attr.var_weight_": "var_mix",
}
_LATER = {"state0/radius": "set after this was recorded"}
_ROUNDING = {f"gp1/{name}_weight": "zero on a corner: only round-off is recorded" for name in ("mean", "var")}

_WHITENING = {
    "sw_mean_weight": "mean_weight",
    "sw_var_weight": "var_weight",
    "running_cov": "running_covariance",
}

_CHANNEL = {f"pbn.{n}": f"batch.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}

_HALVES = {f"IN.{name}": f"parts.0.{name}" for name in ("weight", "bias")} | {
    f"BN.{name}": f"parts.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}

_EVO = {"gamma": "weight", "beta": "bias"}
_COUNT = {"state3/num_batches_tracked": "their code does not count the batches"}

KEYS = (
    Key("sn2d", lambda: build("switchable", 8)),
    Key("sn2d_nobn", lambda: build("switchable", 8, kinds=("instance", "layer"))),
    Key("ssn_rad0p0", lambda: build("sparse-switchable", 8), _SPARSE),
    Key("ssn_rad0p6", lambda: build("sparse-switchable", 8, radius=0.6), _SPARSE, skip=_LATER | _ROUNDING),
    Key("sw_type2", lambda: build("switchable-whitening", 8, groups=2), _WHITENING),
    Key("sw_type3", lambda: build("switchable-whitening", 8, groups=2, kinds=3), _WHITENING),
    Key("bin2d", lambda: build("batch-instance", 8), skip=_COUNT),
    Key("bcn", lambda: build("batch-channel", 8, groups=4), _CHANNEL),
    Key("ibn", lambda: build("instance-batch", 8), _HALVES),
    Key("evonorm_b0_lone", lambda: build("evonorm", 8, unbiased=True), _EVO),
    Key("evonorm_s0_lone", lambda: build("evonorm", 8, kind="s0", groups=4, unbiased=True), _EVO),
    Key("timm_evonorm_b0", lambda: build("evonorm", 8, eps=1e-3)),
    Key("timm_evonorm_s0", lambda: build("evonorm", 8, kind="s0", groups=4)),
)

ONCE = ()
