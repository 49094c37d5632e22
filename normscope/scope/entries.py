"""Entries: the normalization layers of the user's own in the models that are compared, checked before training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from normscope.linalg.protect import random_states
from normscope.norms.inspection import Inspection, inspect
from normscope.norms.recognize import NormParts, find_norms
from normscope.scope.trial import accepted

_KNOWN = ("torch", "normscope")

Checks = tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...]


def checked_layers(makers: Mapping[str, Callable[..., nn.Module]]) -> Checks:
    """Inspect the norms of each entry that are neither torch's nor normscope's, one of each class.

    A norm is what is recognized as one, and what stands where another entry has one.

    Args:
        makers: from names to what makes a model.

    Returns:
        (entry, class, rows of the inspection); an entry that cannot be made is left to its runs to report.
    """
    models = {entry: model for entry, make in makers.items() if (model := _made(make)) is not None}
    norms = {entry: find_norms(model) for entry, model in models.items()}
    paths = list(dict.fromkeys(path for found in norms.values() for path in found))
    seen = []
    with random_states(nn.Module()):
        for entry, model in models.items():
            modules = dict(model.named_modules())
            own: dict[type[nn.Module], tuple[nn.Module, NormParts | None]] = {}
            for path in paths:
                module = modules.get(path)
                if module is not None and type(module).__module__.partition(".")[0] not in _KNOWN:
                    own.setdefault(type(module), (module, norms[entry].get(path)))
            seen += [(entry, *told(_inspected(module, parts))) for module, parts in own.values()]
    return tuple(seen)


def _made(make: Callable[..., nn.Module]) -> nn.Module | None:
    with random_states(nn.Module()):
        torch.manual_seed(0)
        try:
            model = make(**({"seed": 0} if accepted(make, ("seed",)) else {}))
        except Exception:  # its runs will say why
            return None
    return model if isinstance(model, nn.Module) else None


def told(inspection: Inspection) -> tuple[str, tuple[tuple[str, str, str], ...]]:
    """Return the class of an inspected layer and its rows as plain tuples."""
    return inspection.layer, tuple((row.law, row.verdict, row.seen) for row in inspection.rows)


def _inspected(module: nn.Module, parts: NormParts | None) -> Inspection:
    """Inspect copies of a layer; its size is that of its gain, else of its first vector."""
    named = getattr(module, parts.gain, None) if parts is not None and parts.gain else None
    vectors = [named, *module.parameters(recurse=False), *module.buffers(recurse=False)]
    sizes = [t.numel() for t in vectors if isinstance(t, torch.Tensor) and t.numel() > 1]
    return inspect(lambda _: copy.deepcopy(module), sizes[0] if sizes else 8)
