"""normscope: see what normalization does inside a network. The public names, resolved when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normscope import applications, gradients, norms, weights
    from normscope.core.errors import ArgumentError, NormscopeError, StoreError
    from normscope.core.finding import Finding, Verdict
    from normscope.core.reading import load
    from normscope.core.record import Record
    from normscope.core.table import Findings
    from normscope.diagnostics import diagnose
    from normscope.linalg.extremal import eigenpairs
    from normscope.linalg.layerwise import layerwise
    from normscope.linalg.problem import Problem
    from normscope.linalg.spectrum import spectrum
    from normscope.linalg.trace import diagonal, trace
    from normscope.probes.disturbance import snd
    from normscope.report import write_report
    from normscope.report.comparison import Comparison
    from normscope.scope.attach import Scope, attach
    from normscope.scope.compare import compare
    from normscope.scope.examine import examine
    from normscope.scope.gap import Gap, gap
    from normscope.scope.lint import lint

_PACKAGES = ("applications", "gradients", "norms", "weights")
_NAMES = {
    "ArgumentError": "normscope.core.errors",
    "Comparison": "normscope.report.comparison",
    "Finding": "normscope.core.finding",
    "Findings": "normscope.core.table",
    "Gap": "normscope.scope.gap",
    "NormscopeError": "normscope.core.errors",
    "Problem": "normscope.linalg.problem",
    "Record": "normscope.core.record",
    "Scope": "normscope.scope.attach",
    "StoreError": "normscope.core.errors",
    "Verdict": "normscope.core.finding",
    "attach": "normscope.scope.attach",
    "compare": "normscope.scope.compare",
    "diagnose": "normscope.diagnostics",
    "diagonal": "normscope.linalg.trace",
    "eigenpairs": "normscope.linalg.extremal",
    "examine": "normscope.scope.examine",
    "gap": "normscope.scope.gap",
    "layerwise": "normscope.linalg.layerwise",
    "lint": "normscope.scope.lint",
    "load": "normscope.core.reading",
    "spectrum": "normscope.linalg.spectrum",
    "trace": "normscope.linalg.trace",
    "snd": "normscope.probes.disturbance",
    "write_report": "normscope.report",
}

__all__ = [
    "ArgumentError",
    "Comparison",
    "Finding",
    "Findings",
    "Gap",
    "NormscopeError",
    "Problem",
    "Record",
    "Scope",
    "StoreError",
    "Verdict",
    "applications",
    "attach",
    "compare",
    "diagnose",
    "diagonal",
    "eigenpairs",
    "examine",
    "gap",
    "gradients",
    "layerwise",
    "lint",
    "load",
    "norms",
    "snd",
    "spectrum",
    "trace",
    "weights",
    "write_report",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that `--help` imports neither torch nor numpy."""
    if name == "__version__":
        return import_module("importlib.metadata").version("normscope")
    if name in _PACKAGES:
        return import_module(f"normscope.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'normscope' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_PACKAGES})
