"""Normalizing weights: parametrizations of a layer's weight, penalties on it, and the layers that go with them."""

from __future__ import annotations

from normscope.weights.cells import GatedOrthogonalCell, OrthogonalCell, ShiftedReLU, complex_modrelu, modrelu
from normscope.weights.cosine import CosineConv2d, CosineLinear
from normscope.weights.features import instance_covariance, selective_mask
from normscope.weights.initialization import initialize
from normscope.weights.layers import apply, in_manifold, parametrized, remove, retract
from normscope.weights.parametrization import INVARIANCES, Layout, Parametrization
from normscope.weights.regularizers import Penalty, Regularizer, regularizer, regularizers
from normscope.weights.table import Row, zoo

__all__ = [
    "INVARIANCES",
    "CosineConv2d",
    "CosineLinear",
    "GatedOrthogonalCell",
    "Layout",
    "OrthogonalCell",
    "Parametrization",
    "Penalty",
    "Regularizer",
    "Row",
    "ShiftedReLU",
    "apply",
    "complex_modrelu",
    "in_manifold",
    "initialize",
    "instance_covariance",
    "modrelu",
    "parametrized",
    "regularizer",
    "regularizers",
    "remove",
    "retract",
    "selective_mask",
    "zoo",
]
