"""Recorded numbers of normscope.norms.families.whitening."""

from normscope.norms import Affine, Batch, BatchGroup, Norm, Running, Standardize, Whiten
from normscope.norms.families.deconvolution import Deconv2d, DeconvLinear
from normscope.norms.table import build
from tests.norms.keys.key import Key, Once

_MATRIX = {"running_wm": "running_matrix", "running_projection": "running_matrix"}


def _parts(group):
    """Name the statistics that they keep for each group apart."""
    return {
        "running_mean": lambda data, state: [data[f"{state}/{group}.{i}.running_mean"] for i in range(2)],
        "running_matrix": lambda data, state: [data[f"{state}/{group}.{i}.running_projection"] for i in range(2)],
    }


def _interleaved(population):
    operation = Whiten("zca", 1e-5, population=population)
    return Norm(BatchGroup(4, interleaved=True), operation, Affine(), Running(), num_features=8)


def _concept(layer, x, step, data):
    if step == "_eval":
        layer.rotation.copy_(data["post/running_rot_after_update"][0])
        return layer(x)
    return layer(x, int(step) - 1)


_CONCEPT = {
    "running_wm": "running_matrix",
    "running_rot": "rotation",
    "sum_G": "gradient",
}
_NO_AFFINE = {f"state0/{name}": "unused, as affine is off" for name in ("weight", "bias")}

KEYS = (
    Key("iternorm_T5", lambda: build("iterative", 8), _MATRIX),
    Key("iternorm_g2", lambda: build("iterative", 8, group_size=4), _MATRIX),
    Key("dbn_zca", lambda: build("decorrelated-batch", 8, group_size=4), stacked=_parts("DBN_Groups")),
    Key("dbn_old", lambda: _interleaved("matrix"), _MATRIX),
    Key("dbn2_old", lambda: _interleaved("sigma"), {"running_projection": "running_sigma"}),
    Key(
        "groupbn_old",
        lambda: Norm(BatchGroup(4, interleaved=True), Standardize(), Affine(), Running(), num_features=8),
    ),
    Key(
        "sbw_cd",
        lambda: build("batch-whitening-variants", 8, group_size=4),
        stacked=_parts("CDWhitening_Groups"),
    ),
    Key(
        "sbw_pca",
        lambda: build("batch-whitening-variants", 8, method="pca", group_size=4),
        different="the signs of rows are arbitrary; reproduced up to them in tests/norms/test_whitening.py",
    ),
    Key(
        "wc_cholesky",
        lambda: build("whitening-coloring", 8, affine=False),
        {"moving_mean": "running_mean", "moving_cov": "running_covariance"},
    ),
    Key(
        "wc_zca",
        lambda: build("whitening-coloring", 8, method="zca", affine=False, published=True),
        {"moving_mean": "running_mean", "moving_cov": "running_covariance"},
    ),
    Key("gw_itn", lambda: build("group-whitening", 16, groups=4)),
    Key(
        "chdeconv",
        lambda: build("network-deconvolution", 8, block=4, published=True),
        {"running_mean1": "running_mean", "running_deconv": "running_matrix"},
        skip={
            f"{state}/{name}": "of the channels that are left over, here none"
            for state in ("state0", "state3")
            for name in ("running_mean2", "running_var")
        },
    ),
    Key(
        "fastdeconv_k3",
        lambda: Deconv2d(8, 6, 3, padding=1, block=4, sampling_stride=2),
        {"running_deconv": "running_matrix"},
    ),
    Key("delinear", lambda: DeconvLinear(8, 6, 4), {"running_deconv": "running_matrix"}),
    Key(
        "dwt_whitening",
        lambda: Norm(
            Batch(2),
            Whiten("cholesky", 0.0, 1e-3, population="covariance"),
            population=Running(),
            num_features=8,
        ),
        {"running_variance": "running_covariance"},
    ),
    Key("cw_none", lambda: build("concept-whitening", 8, iterations=5), _CONCEPT, skip=_NO_AFFINE),
    Key(
        "cw_mean",
        lambda: build("concept-whitening", 8, iterations=5, activation="mean"),
        _CONCEPT,
        call=_concept,
        skip=_NO_AFFINE | {"state3/sum_G": "the mean of centered values: round-off, about 1e-17"},
    ),
    Key(
        "ce",
        lambda: build("channel-equilibrium", 16, group_size=8, published=True),
        {
            "x_weight": "gate",
            "AR.fc.0.weight": "fc.0.weight",
            "AR.fc.1.weight": "fc.1.weight",
            "AR.fc.1.bias": "fc.1.bias",
            "AR.fc.3.weight": "fc.3.weight",
            "AR.running_scale": "running_scale",
            "running_wm": "running_matrix",
        },
        skip={
            f"{state}/running_mean": "stored by their code, used by none of its outputs"
            for state in ("state0", "state3")
        },
    ),
)

ONCE = (
    Once(
        "dwt_whiten_g4",
        lambda: Norm(
            Batch(),
            Whiten("cholesky", 0.0, 1e-3, population="covariance"),
            population=Running(),
            num_features=4,
        ),
        {"running_variance": "running_covariance"},
    ),
    Once("wmse_whiten", lambda: Norm(Batch(), Whiten("cholesky", 0.0, unbiased=True))),
)
