"""Recorded numbers of normscope.norms.families.modern."""

from normscope.norms.table import build
from tests.norms.keys.key import Key

KEYS = (
    Key(
        "frn_gupta",
        lambda: build("frn", 8, learn_eps=True),
        {"eps": "offset", "gamma": "weight", "beta": "bias"},
    ),
    Key("timm_frn_tlu", lambda: build("frn", 8, eps=1e-5)),
    Key("timm_frn_act", lambda: build("frn", 8, eps=1e-5, threshold=False)),
)

ONCE = ()
