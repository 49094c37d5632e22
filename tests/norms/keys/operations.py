"""Recorded numbers of normscope.norms.families.operations."""

from normscope.norms import Affine, Batch, Center, Norm, Running
from normscope.norms.table import build
from tests.norms.keys.key import Key

# they keep only a tenth of the old value
_SCALE = {"scale": "weight", "mean": "bias", "running_var": "running_scale"}

_COUNT = {"state3/num_batches_tracked": "their code does not count the batches"}

KEYS = (
    Key("rmsnorm", lambda: build("rms", 8, eps=1e-8, inside=False), {"scale": "weight"}),
    Key("torch_rmsnorm", lambda: build("rms", 8)),
    Key("timm_rmsnorm2d", lambda: build("rms", 8, position=True)),
    Key("l1bn", lambda: build("lp-batch", 8, momentum=0.9), _SCALE),
    Key("lpbn_p2", lambda: build("lp-batch", 8, p=2, momentum=0.9), _SCALE),
    Key("topkbn", lambda: build("lp-batch", 8, top=5, momentum=0.9), _SCALE),
    Key("linfbn", lambda: build("lp-batch", 8, p=float("inf"), momentum=0.9), _SCALE),
    Key("meanbn", lambda: build("mean-only-batch", 8, momentum=0.9)),
    Key("centernorm", lambda: Norm(Batch(), Center(), Affine(scale=False), Running(), num_features=8)),
    Key(
        "robustnorm_rnt",
        lambda: build("robust", 8, statistics="running"),
        {"running_var": "running_range"},
        skip=_COUNT,
    ),
)

ONCE = ()
