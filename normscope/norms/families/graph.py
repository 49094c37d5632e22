"""Methods for nodes of graphs, sets of points and manifolds."""

from __future__ import annotations

import torch
from torch import Tensor

from normscope.norms.area import Instance
from normscope.norms.families.graph_manifold import SPDBatchNorm
from normscope.norms.families.graph_nodes import (
    AttentiveContextNorm,
    DifferentiableGroupNorm,
    GraphCombinationNorm,
    GraphLayerNorm,
    GraphNorm,
    MeanSubtraction,
    PairNorm,
)
from normscope.norms.layer import Norm
from normscope.norms.operation import Standardize
from normscope.norms.recovery import Affine
from normscope.norms.row import Row


def _groups(
    num_features: int,
    *,
    groups: int = 10,
    skip: float = 0.005,
    eps: float = 1e-5,
    momentum: float | None = 0.3,
    affine: bool = True,
) -> DifferentiableGroupNorm:
    return DifferentiableGroupNorm(num_features, groups, skip, eps, momentum, affine)


def _graph(num_features: int, *, eps: float = 1e-6, affine: bool = True) -> GraphNorm:
    return GraphNorm(num_features, eps, affine)


def _graph_instance(num_features: int, *, eps: float = 1e-5, affine: bool = True) -> GraphNorm:
    return GraphNorm(num_features, eps, affine, learned=False)


def _graph_layer(num_features: int, *, eps: float = 1e-5, affine: bool = True) -> GraphLayerNorm:
    return GraphLayerNorm(num_features, eps, affine)


def _mean_subtraction(num_features: int) -> MeanSubtraction:
    return MeanSubtraction(num_features)


def _pair(num_features: int, *, mode: str = "whole", scale: float = 1.0, eps: float = 1e-6) -> PairNorm:
    return PairNorm(num_features, mode, scale, eps)


def _combination(
    num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True
) -> GraphCombinationNorm:
    return GraphCombinationNorm(num_features, eps, momentum, affine)


def _context(num_features: int, *, eps: float = 1e-3, affine: bool = False) -> Norm:
    return Norm(Instance(), Standardize(eps), Affine() if affine else None, num_features=num_features)


def _attentive_context(num_features: int, *, eps: float = 1e-3, affine: bool = False) -> AttentiveContextNorm:
    return AttentiveContextNorm(num_features, eps, affine)


def _spd(num_features: int, *, momentum: float = 0.1, steps: int = 1) -> SPDBatchNorm:
    return SPDBatchNorm(num_features, momentum, steps)


def _nodes(num_features: int, generator: torch.Generator) -> tuple[Tensor]:
    steps = torch.linspace(0.5, 2, num_features, dtype=torch.float64)
    return (torch.randn(12, num_features, generator=generator, dtype=torch.float64) * steps + steps - 1,)


def _graphs(num_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return *_nodes(num_features, generator), torch.tensor([0] * 3 + [1] * 5 + [2] * 4)


def _definite(num_features: int, generator: torch.Generator) -> tuple[Tensor]:
    root = torch.randn(6, num_features, 2 * num_features, generator=generator, dtype=torch.float64)
    return (root @ root.mT / num_features,)


ROWS: tuple[Row, ...] = (
    Row(
        "graph",
        "S233",
        _graph,
        ("layer:graph",),
        ("graphnorm",),
        ("graph", "standardize, part of the mean", "affine", "current"),
        ("graphnorm", "pyg_graphnorm"),
        inputs=_graphs,
    ),
    Row(
        "graph-instance",
        "S233",
        _graph_instance,
        (),
        (),
        ("graph", "standardize", "affine", "current"),
        ("pyg_instancenorm",),
        inputs=_graphs,
    ),
    Row(
        "graph-layer",
        "S233",
        _graph_layer,
        (),
        (),
        ("graph, all channels", "standardize", "affine", "current"),
        ("pyg_layernorm_graph",),
        inputs=_graphs,
    ),
    Row(
        "mean-subtraction",
        "S232",
        _mean_subtraction,
        (),
        (),
        ("graph", "center", "bare", "current"),
        ("pyg_meansub",),
        inputs=_graphs,
    ),
    Row(
        "pair",
        "zhao2020",
        _pair,
        (),
        ("pairnorm",),
        ("graph", "center, then scale", "bare", "current"),
        ("pairnorm_pn", "pairnorm_pn_si", "pairnorm_pn_scs", "pyg_pairnorm"),
        inputs=_graphs,
    ),
    Row(
        "differentiable-group",
        "S232",
        _groups,
        ("layer:differentiable-group",),
        ("dgn",),
        ("soft cluster of nodes", "standardize", "affine, added to the input", "running"),
        ("dgn_group",),
        inputs=_nodes,
        options=(("groups", 3),),
    ),
    Row(
        "graph-combination",
        "S234",
        _combination,
        ("layer:graph-combination",),
        (),
        ("node, neighborhood, graph, batch", "standardize", "affine", "running"),
        inputs=_graphs,
    ),
    Row("context", "S235", _context, ("layer:context",), ("cn",)),
    Row(
        "attentive-context",
        "S236",
        _attentive_context,
        ("layer:attentive-context",),
        ("acn",),
        ("weighted points", "standardize", "bare", "current"),
    ),
    Row(
        "spd-batch",
        "S238",
        _spd,
        ("layer:spd-batch",),
        (),
        ("batch of matrices", "move the Riemannian mean", "matrix", "geodesic"),
        inputs=_definite,
    ),
)
