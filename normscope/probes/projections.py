"""Projections: how long queries and keys are, from the outputs of the layers that give them, where no score is seen."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from normscope.probes import layout

# what the last layer before the scores is called, the norms first: queries, keys
_PAIRS = (
    ("q_norm", "k_norm"),
    ("query_norm", "key_norm"),
    ("norm_q", "norm_k"),
    ("q_layernorm", "k_layernorm"),
    ("q_proj", "k_proj"),
    ("query", "key"),
    ("to_q", "to_k"),
    ("q_lin", "k_lin"),
    ("wq", "wk"),
    ("q_linear", "k_linear"),
    ("linear_q", "linear_k"),
)
_TRIPLES = ("c_attn", "qkv", "in_proj", "Wqkv", "to_qkv", "qkv_proj")  # queries, keys and values side by side
_WIDTHS = ("head_dim", "attention_head_size", "d_head", "dim_head", "d_k")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_SCALES = ("scaling", "scale", "softmax_scale")
_CHANGED = re.compile(r"qk_?norm|l2_?norm|temperature|logit_scale")  # what else may act on queries and keys


class _Sides(NamedTuple):
    """Where the queries and keys of a module come from: the children's names, both alike for a joint layer."""

    q: str
    k: str
    width: int
    scale: float


class Projections:
    """Measures the longest query and key of each head.

    Args:
        modules: modules that may attend, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """Find the projections; see the class."""
        found = {name: sides for name, module in modules.items() if (sides := _sides(module)) is not None}
        self.modules = {name: modules[name] for name in found}
        self._sides = found
        self._owner = {_path(name, part): name for name, s in found.items() for part in (s.q, s.k)}
        self._longest: dict[tuple[str, bool], torch.Tensor] = {}
        self._seen: set[str] = set()  # whose scores were seen in a step before

    @torch.no_grad()
    def forward(self, name: str, output: object) -> None:
        """Take the length of queries or keys from a projection's output."""
        owner = self._owner.get(name)
        if owner is None or owner in self._seen or not isinstance(output, torch.Tensor):
            return
        if layout.why_unmeasured(output):
            return
        sides, part = self._sides[owner], name.rpartition(".")[2]
        if sides.q == sides.k:
            q, k, _ = output.chunk(3, -1)
            self._keep(owner, False, q, sides.width)
            self._keep(owner, True, k, sides.width)
        else:
            self._keep(owner, part == sides.k, output, sides.width)

    def unseen(self, measured: Collection[str]) -> list[str]:
        """Return the modules of which lengths are known and scores are not."""
        both = [name for name in self.modules if {(name, False), (name, True)} <= self._longest.keys()]
        return [name for name in both if name not in measured]

    def states(self, measured: Collection[str]) -> list[torch.Tensor]:
        """Return the lengths of queries and keys of each module of `unseen`, on their devices."""
        self._seen |= set(measured)
        return [self._longest[name, side] for name in self.unseen(measured) for side in (False, True)]

    def ceiling(self, name: str, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Return scale max|q| max|k| of each head.

        Args:
            name: the module.
            q: [H] longest query of each head.
            k: [H'] longest key; where H' does not divide H the longest of all serves each head.

        Returns:
            [H], or [1] where heads cannot be told apart.
        """
        whole = len(q) % len(k) == 0
        keys = np.repeat(k, len(q) // len(k)) if whole else np.full(len(q), k.max())
        found: np.ndarray = self._sides[name].scale * q * keys
        return found

    def discard(self) -> None:
        """Forget what the step has left."""
        self._longest = {}

    def _keep(self, owner: str, side: bool, x: torch.Tensor, width: int) -> None:
        heads = x.shape[-1] // width
        lengths = torch.linalg.vector_norm(
            x.detach().reshape(-1, heads, width), dim=2, dtype=None if x.dtype == torch.float64 else torch.float32
        ).amax(0)
        known = self._longest.get((owner, side))
        joined = known is not None and known.shape == lengths.shape
        self._longest[owner, side] = torch.maximum(known, lengths) if joined and known is not None else lengths


def heads_of(module: nn.Module) -> int:
    """Return the number of heads that a module or its configuration states, 1 where neither does."""
    return int(_number(module, _HEADS) or 1)


def _sides(module: nn.Module) -> _Sides | None:
    """Return where a module's queries and keys come from, None where that, or the size of a head, is not known."""
    children = dict(module.named_children())
    held = {**children, **module._parameters, **module._buffers, **vars(module)}
    changed = any(_CHANGED.search(name) and value is not None and value is not False for name, value in held.items())
    for q, k in _PAIRS:
        if q in children and k in children and ("norm" in q or not changed):
            return _sized(module, q, k, _features(children[q]))
    for name in _TRIPLES:
        if name in children and _features(children[name]) % 3 == 0 and not changed:
            return _sized(module, name, name, _features(children[name]) // 3)
    return None


def _sized(module: nn.Module, q: str, k: str, features: int) -> _Sides | None:
    width = _number(module, _WIDTHS)
    if width is None and (heads := _number(module, _HEADS)) is not None and "norm" not in q:
        width = features / heads
    if width is None or width < 1 or not float(width).is_integer() or features % int(width):
        return None
    scale = _number(module, _SCALES)
    return _Sides(q, k, int(width), width**-0.5 if scale is None else scale)


def _features(module: nn.Module) -> int:
    """Return how many numbers a layer gives for a token."""
    for name in ("out_features", "nf"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    vectors = [p.numel() for p in module.parameters(recurse=False) if p.dim() == 1]
    return max(vectors, default=0)


def _number(module: nn.Module, names: tuple[str, ...]) -> float | None:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value: Any = vars(holder).get(name) if holder is not None and hasattr(holder, "__dict__") else None
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                return float(value)
    return None


def _path(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
