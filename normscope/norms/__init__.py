"""Normalizing activations: which modules of a model normalize, and what their parts are. Knows torch, no training."""

from __future__ import annotations

from normscope.norms import checks
from normscope.norms.area import Batch, BatchGroup, Group, Instance, InstanceGroup, Layer, Position
from normscope.norms.conversion import convert
from normscope.norms.folding import fold
from normscope.norms.inspection import Inspection, inspect
from normscope.norms.layer import Norm, Normalization
from normscope.norms.operation import L1, RMS, Center, Identity, Lp, Scale, Standardize, TopK
from normscope.norms.part import Traits
from normscope.norms.population import Current, Running
from normscope.norms.recalibration import recalibrate
from normscope.norms.recognize import CERTAINTIES, KINDS, NormParts, declare_norm, find_norms, recognize
from normscope.norms.recovery import Affine, Bare, Coloring, Conditional
from normscope.norms.row import Row
from normscope.norms.split import Split
from normscope.norms.table import build, zoo
from normscope.norms.whiten import Whiten

__all__ = [
    "CERTAINTIES",
    "KINDS",
    "L1",
    "RMS",
    "Affine",
    "Bare",
    "Batch",
    "BatchGroup",
    "Center",
    "Coloring",
    "Conditional",
    "Current",
    "Group",
    "Identity",
    "Inspection",
    "Instance",
    "InstanceGroup",
    "Layer",
    "Lp",
    "Norm",
    "NormParts",
    "Normalization",
    "Position",
    "Row",
    "Running",
    "Scale",
    "Split",
    "Standardize",
    "TopK",
    "Traits",
    "Whiten",
    "build",
    "checks",
    "convert",
    "declare_norm",
    "find_norms",
    "fold",
    "inspect",
    "recalibrate",
    "recognize",
    "zoo",
]
