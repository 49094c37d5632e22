"""Applications: what normalization is used for beyond training, each a few functions on the norms of any model."""

from __future__ import annotations

from normscope.applications.adaptation import Tent, adabn, domain_statistics, entropy, prediction_time
from normscope.applications.compression import add_sparsity, eagle_eye, gains, mask, prune, shrink, threshold
from normscope.applications.style import adain, content_loss, gram, gram_error, style_loss, wct

__all__ = [
    "Tent",
    "adabn",
    "adain",
    "add_sparsity",
    "content_loss",
    "domain_statistics",
    "eagle_eye",
    "entropy",
    "gains",
    "gram",
    "gram_error",
    "mask",
    "prediction_time",
    "prune",
    "shrink",
    "style_loss",
    "threshold",
    "wct",
]
