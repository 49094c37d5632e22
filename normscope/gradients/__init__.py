"""Normalizing gradients: optimizers and transforms of gradients, by name in `zoo`. Knows torch, no training loop."""

from __future__ import annotations

from normscope.gradients.grassmann import GrassmannAdam, GrassmannSGD
from normscope.gradients.layerwise import CLARS, LAMB, LANS, LARS, sample_gradients
from normscope.gradients.path import PathSGD
from normscope.gradients.projected import SGDP, AdamP
from normscope.gradients.projection import FineGrainedSGD, ProjectionSGD
from normscope.gradients.row import STEPS, Row
from normscope.gradients.spherical import PSISGD, SGDMRT, AdamS, AdamSRT
from normscope.gradients.stiefel import CayleyAdam, CayleySGD
from normscope.gradients.table import build, zoo
from normscope.gradients.transform import AdaptiveClipped, BlockNormalized, Centralized, Transform

__all__ = [
    "CLARS",
    "LAMB",
    "LANS",
    "LARS",
    "PSISGD",
    "SGDMRT",
    "SGDP",
    "STEPS",
    "AdamP",
    "AdamS",
    "AdamSRT",
    "AdaptiveClipped",
    "BlockNormalized",
    "CayleyAdam",
    "CayleySGD",
    "Centralized",
    "FineGrainedSGD",
    "GrassmannAdam",
    "GrassmannSGD",
    "PathSGD",
    "ProjectionSGD",
    "Row",
    "Transform",
    "build",
    "sample_gradients",
    "zoo",
]
