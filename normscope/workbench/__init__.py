"""Small reference models, bundled data and a plain trainer: what the demo, comparisons and analyses run on."""

from __future__ import annotations

from normscope.workbench.breaks import BREAKS
from normscope.workbench.classifier import classifier
from normscope.workbench.corruptions import CORRUPTIONS, corrupt
from normscope.workbench.data import batches, digits, mnist, split, text, windows
from normscope.workbench.models import mlp, residual_cnn, transformer
from normscope.workbench.train import accuracy, cross_entropy, evaluate, fit

__all__ = [
    "BREAKS",
    "CORRUPTIONS",
    "accuracy",
    "batches",
    "classifier",
    "corrupt",
    "cross_entropy",
    "digits",
    "evaluate",
    "fit",
    "mlp",
    "mnist",
    "residual_cnn",
    "split",
    "text",
    "transformer",
    "windows",
]
