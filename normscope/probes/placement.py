"""Placement: what a layer or RMS norm takes, a sum or a layer's output, and which norms were added into that sum.

Read once from the graph of a training forward: whether a norm stands before a branch, behind one, or behind the sum
cannot be told from names or from the order of execution.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from normscope.core.site import Site
from normscope.norms.recognize import NormParts
from normscope.probes import layout

SLOT = "placement"
_NODES = 64
_SUMS = ("AddBackward0", "SubBackward0")
# what scales, drops or lays out a branch's output on its way into a sum
_PASSED = frozenset((
    *_SUMS,
    "MulBackward0",
    "DivBackward0",
    "NativeDropoutBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "ToCopyBackward0",
    "CloneBackward0",
    "TransposeBackward0",
    "PermuteBackward0",
))
_EMBEDDED = "EmbeddingBackward0"


class Placement:
    """Looks at the first sampled step.

    Args:
        norms: normalization layers of the model, by name.
        probes: "normalization" among them where this runs.
        on_site: called with a site and its attributes.
        on_failure: called with (probe, site, error) when it fails.
    """

    def __init__(
        self,
        norms: Mapping[str, NormParts],
        probes: Collection[str],
        on_site: Callable[[str, dict[str, object]], None],
        on_failure: Callable[[str, str, Exception], None],
    ) -> None:
        """Start with nothing seen; see the class."""
        self._left = {name for name, parts in norms.items() if parts.kind in ("layer", "rms")}
        self._probes, self._on_site, self._on_failure = probes, on_site, on_failure
        self._outputs: dict[int, str] = {}  # norms by the number of the node that made their output
        self._inputs: set[int] = set()  # numbers of nodes that made the input of a norm: the walk ends there

    def forward(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
        """Say of a norm what it takes, at its first call."""
        if name not in self._left or "normalization" not in self._probes:
            return
        x = layout.first_tensor(args, kwargs)
        if x is None or x.grad_fn is None or not isinstance(output, torch.Tensor) or output.grad_fn is None:
            return
        try:
            self._look(name, x, output)
        except Exception as error:  # whatever a graph holds, the run goes on
            self._on_failure("normalization", name, error)

    def _look(self, name: str, x: torch.Tensor, output: torch.Tensor) -> None:
        self._left.discard(name)
        takes, added = self._walk(x.grad_fn)
        self._inputs.add(_number(x.grad_fn))
        self._outputs[_number(output.grad_fn)] = name
        facts = {"module": name, "call": 0, "slot": SLOT, "takes": takes, "added": added}
        self._on_site(str(Site(name, 0, SLOT)), facts)

    def discard(self) -> None:
        """End the look once it has found something."""
        if self._outputs:
            self._left, self._outputs, self._inputs = set(), {}, set()

    def _walk(self, first: Any) -> tuple[str, list[str]]:
        """Return "sum", "layer" or "norm", and the norms whose outputs are taken or were added."""
        if _number(first) in self._outputs:
            return "norm", [self._outputs[_number(first)]]
        waiting, found, summed = [first], [], False
        seen: set[int] = set()
        while waiting and len(seen) < _NODES:
            node = waiting.pop()
            number, kind = _number(node), node.name()
            if number in seen:
                continue
            seen.add(number)
            if number in self._outputs:
                found.append(self._outputs[number])
            elif number in self._inputs and node is not first:
                summed = True
            elif kind in _PASSED:
                inside = [before for before, _ in node.next_functions if before is not None]
                summed = summed or (kind in _SUMS and not any(_is_bias(before) for before in inside))
                waiting += inside
            summed = summed or kind == _EMBEDDED
        return "sum" if summed else "layer", sorted(set(found))


def _number(node: Any) -> int:
    return int(node._sequence_nr())


def _is_bias(node: Any) -> bool:
    held = getattr(node, "variable", None)
    return isinstance(held, torch.Tensor) and held.dim() < 2
