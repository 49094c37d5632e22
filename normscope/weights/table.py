"""The table of methods: a row for each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import nn
from torch.nn.modules.conv import _ConvNd

from normscope.core.named import Named
from normscope.weights import rotations
from normscope.weights.orthogonal import (
    BoundedSingularValues,
    Isometric,
    LieOrthogonal,
    NewtonOrthogonal,
    OrthogonalGroups,
    Parseval,
)
from normscope.weights.parametrization import Parametrization
from normscope.weights.recurrent import LieUnitary, ScaledCayley, SoftOrthogonal, Unitary
from normscope.weights.scaling import (
    Centered,
    CenteredOnly,
    Projected,
    ScaledStandardized,
    Standardized,
    Unit,
    WeightNorm,
)
from normscope.weights.spectral import spectral

LAYERS: Final = (nn.Linear, _ConvNd, nn.RNNCellBase)
CONVOLUTIONS: Final = (_ConvNd,)
CELLS: Final = (nn.RNNCellBase,)


@dataclass(frozen=True)
class Row:
    """One published method.

    Attributes:
        name: the catalog's name after the colon, or a name of ours.
        source: key of the bibliography.
        make: `make(layout, weight, **options)` makes the parametrization.
        invariance: "row", "tensor" or "none": what a positive factor on the raw weight may be of.
        aliases: other names.
        keys: recorded numbers that it reproduces, files of tests/reference.
        fixed: options that the row sets, as (("kind", "cayley"),).
        layers: classes of modules that it is meant for where none are named.
        step: whether `retract` belongs after each optimizer's step.
    """

    name: str
    source: str
    make: Callable[..., Parametrization]
    invariance: str
    aliases: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    fixed: tuple[tuple[str, Any], ...] = ()
    layers: tuple[type[nn.Module], ...] = LAYERS
    step: bool = False

    def settings(self) -> dict[str, inspect.Parameter]:
        """Return the options."""
        given = {"self", "layout", "weight", *dict(self.fixed)}
        return {k: p for k, p in inspect.signature(self.make).parameters.items() if k not in given}

    def __repr__(self) -> str:
        """Write the call that applies it, with the method's defaults."""
        shown = "".join(f", {name}={p.default!r}" for name, p in self.settings().items())
        return f"apply(model, {self.name!r}{shown})  # {self.source}"


# name, source, factory, what the raw weight's scale may be changed of
ROWS: Final[tuple[Row, ...]] = (
    Row(
        "weight-norm",
        "S080",
        WeightNorm,
        "row",
        ("wn", "weight"),
        ("wn_torch_linear", "wn_torch_conv_dim0", "wn_torch_linear_dimnone", "wn_openai_conv2d"),
    ),
    Row("centered", "S081", Centered, "row", ("cwn",), ("cwn_conv", "oni_wn_conv")),
    Row("orthogonal", "S082", OrthogonalGroups, "tensor", ("own",), ("own_conv_g1",)),
    Row(
        "spectral",
        "S083",
        spectral,
        "tensor",
        ("sn", "spectral-norm"),
        ("sn_torch_linear_n1", "sn_torch_linear_n3", "sn_torch_conv_n1", "sn_gan"),
    ),
    Row("cosine", "S084", Unit, "row", ("unit",), ("cosine_norm",)),
    Row("standardized", "S085", Standardized, "row", ("ws", "weight-standardization"), ("ws_conv", "ws_timm_std")),
    Row("centered-moving-average", "S086", CenteredOnly, "none", ("mabn",), ("mabn_cenconv",)),
    Row(
        "scaled-standardized",
        "S087",
        ScaledStandardized,
        "row",
        ("sws", "scaled-weight-standardization"),
        ("sws_nfnet_official", "sws_nfnets_pt", "sws_timm_scaled"),
    ),
    Row("unitary", "S088", Unitary, "none", ("urnn",), ("urnn_factors",), layers=CELLS),
    Row(
        "full-capacity-unitary",
        "S089",
        LieUnitary,
        "none",
        ("full-capacity",),
        fixed=(("kind", "cayley"),),
        layers=CELLS,
        step=True,
    ),
    Row("givens", "S090", rotations.givens, "none", ("dizzy",), layers=CELLS),
    Row("soft-orthogonal-svd", "S091", SoftOrthogonal, "none", ("spectre",), step=True),
    Row("unitary-lie-algebra", "S092", LieUnitary, "none", fixed=(("kind", "matrix_exp"),), layers=CELLS),
    Row("gated-orthogonal-recurrent", "S093", rotations.gated, "none", ("goru",), ("goru_rotation",), layers=CELLS),
    Row("scaled-cayley", "S095", ScaledCayley, "none", ("scornn",), layers=CELLS),
    Row("singular-value-bounding", "S097", BoundedSingularValues, "none", ("svb",), step=True),
    Row("isometric", "S099", Isometric, "none", ("isonet",), ("isonet",), layers=CONVOLUTIONS),
    Row(
        "oni",
        "S100",
        NewtonOrthogonal,
        "tensor",
        ("newton",),
        ("oni_conv_T5", "oni_conv_rowfix", "oni_linear_row_T4"),
    ),
    Row("parseval", "S102", Parseval, "none", (), ("parseval_retraction",), step=True),
    Row("projection", "S126", Projected, "none", ("oblique",), step=True),
    Row(
        "exponential",
        "lezcano2019",
        LieOrthogonal,
        "none",
        ("exprnn", "matrix-exp"),
        ("orthogonal_torch", "orthogonal_geotorch"),
        (("kind", "matrix_exp"), ("trivialize", True)),
    ),
    Row(
        "cayley",
        "lezcano2019",
        LieOrthogonal,
        "none",
        (),
        ("orthogonal_torch", "orthogonal_geotorch"),
        (("kind", "cayley"), ("trivialize", True)),
    ),
    Row("householder", "mhammedi2017", LieOrthogonal, "none", (), ("orthogonal_torch",), (("kind", "householder"),)),
)


zoo: Final = Named(
    ROWS,
    "normalizations of weights: name, what a positive factor on the raw weight may be of, source",
    lambda row: f"{row.invariance:<8}{row.source}",
)
