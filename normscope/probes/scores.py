"""Scores: queries and keys of each call of attention, read from what autograd keeps for the backward pass.

Queries and keys as the scores use them (behind position codes, norms and casts) are no module's output. The graph of a
training forward holds them: a fused kernel (`scaled_dot_product_attention`) saves query, key and mask; written out,
the product saves both factors and the softmax its result. They are looked at where they lie, so nothing is patched,
run again or unpacked, and a copy of the model, a second thread or a compiler notices nothing. What was packed by a
hook, as under activation checkpointing, is left alone until it is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from normscope.probes import hooks, layout

MASKED = -5000.0  # below it an additive mask hides a key: masks are -1e4, -1e9 or -inf, linear biases stay above
_NODES = 512  # nodes of a graph looked at
_FUSED = "ScaledDotProduct"
_SOFTMAX = ("SoftmaxBackward0", "SafeSoftmaxBackward0")
_PRODUCT = {"BmmBackward0": ("self", "mat2"), "BaddbmmBackward0": ("batch1", "batch2")}
_MASKS = ("attn_mask", "attn_bias")
_FACTORS = ("MulBackward0", "DivBackward0")
# operations between the product and the softmax that keep each score in its place
_PASSED = frozenset((
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "UnsqueezeBackward0",
    "SqueezeBackward1",
    "ToCopyBackward0",
    "CloneBackward0",
    "AddBackward0",
    "SubBackward0",
    "MaskedFillBackward0",
    "MaskedFillBackward1",
    "WhereBackward0",
    "CatBackward0",
    "TanhBackward0",
    *_FACTORS,
))
_LAID_OUT = ("ViewBackward0", "UnsafeViewBackward0", "ToCopyBackward0", "SliceBackward0", "SelectBackward0")
_LINEAR = ("MmBackward0", "AddmmBackward0")


class Scores(NamedTuple):
    """One call of attention.

    Attributes:
        q: [B, H, L, D] queries.
        k: [B, H', S, D] keys; H' divides H, each serves H / H' heads in a row.
        scale: factor of the product, a number, or a tensor of one value or [H].
        causal: whether query i sees keys 0 to i alone.
        mask: added to the scores, broadcastable to [B, H, L, S], or None.
        weights: [B, H, L, S] softmax of the scores, where it was kept; it then says which keys are seen.
    """

    q: torch.Tensor
    k: torch.Tensor
    scale: float | torch.Tensor
    causal: bool
    mask: torch.Tensor | None
    weights: torch.Tensor | None


def newest(values: object) -> int:
    """Return the number of the newest node that the arguments of a call come from: those of the call are larger."""
    found = (tensor.grad_fn for _, tensor in layout.tensors(values) if not tensor.is_nested)
    return max((node._sequence_nr() for node in found if node is not None), default=-1)


def attentions(output: object, since: int, heads: int) -> Iterator[tuple[Scores, int]]:
    """Yield the calls of attention in the graph between a module's arguments and its output."""
    waiting = [tensor.grad_fn for _, tensor in layout.tensors(output) if tensor.grad_fn is not None]
    seen: dict[int, Any] = {}  # nodes are held, so that no other gets the id of one
    while waiting and len(seen) < _NODES:
        node: Any = waiting.pop()
        if id(node) in seen or not since < node._sequence_nr() < 1 << 63:  # leaves have the largest number
            continue
        seen[id(node)] = node
        kind = node.name()
        scores = _fused(node) if kind.startswith(_FUSED) else _written(node, heads) if kind in _SOFTMAX else None
        if scores is not None:
            yield scores, node._sequence_nr()
        else:
            waiting += [after for after, _ in node.next_functions if after is not None]


def _fused(node: Any) -> Scores | None:
    """Read a call of `scaled_dot_product_attention` that a fused kernel answers."""
    q, k = _saved(node, "query"), _saved(node, "key")
    if q is None or k is None or q.dim() != 4 or q.shape[1] % max(k.shape[1], 1) or not q.numel() or not k.numel():
        return None
    name = next((name for name in _MASKS if hasattr(node, f"_raw_saved_{name}")), "")
    mask = _saved(node, name) if name else None
    scale = getattr(node, "_saved_scale", None)
    return Scores(q, k, q.shape[3] ** -0.5 if scale is None else scale, bool(node._saved_is_causal), mask, None)


def _written(softmax: Any, heads: int) -> Scores | None:
    """Read attention that is written out: a softmax of one product of queries and keys, scaled and masked."""
    weights, products = _saved(softmax, "result"), list(_products(softmax, ()))
    if weights is None or weights.dim() < 3 or len(products) != 1:
        return None
    if _signed((softmax._saved_dim,))[0] not in (-1, weights.dim() - 1):  # over queries, as in slot attention
        return None
    product, factors = products[0]
    left, right = (_saved(product, name) for name in _PRODUCT[product.name()])
    if left is None or right is None or not weights.numel():
        return None
    if weights.dim() == 3:  # sequences and heads in one
        heads = heads if len(weights) % heads == 0 else 1
        weights = weights.reshape(-1, heads, *weights.shape[1:])
    weights = weights.flatten(1, -3)
    batch, heads, length, keys = weights.shape
    if left.shape[:2] != (batch * heads, length) or right.shape[2] > keys:
        return None
    scale: float | torch.Tensor = float(getattr(product, "_saved_alpha", 1.0))
    for divides, factor in factors:
        if factor.numel() not in (1, heads) or (factor.numel() > 1 and factor.shape[-3:] != (heads, 1, 1)):
            return None
        scale = scale / factor if divides else scale * factor
    q = left.reshape(batch, heads, length, -1)
    k = right.transpose(1, 2).reshape(batch, heads, right.shape[2], -1)
    return Scores(q, k, scale, False, None, weights)


def _products(node: Any, factors: tuple[tuple[bool, torch.Tensor], ...]) -> Iterator[tuple[Any, Any]]:
    """Yield the products that a softmax's argument is a sum of, with the factors on the way: (divides, factor)."""
    for place, (before, _) in enumerate(node.next_functions):
        if before is None:
            continue
        kind, mine = before.name(), factors
        if node.name() in _FACTORS:
            factor = _saved(node, "self" if place else "other")
            if factor is None or (place and node.name() == "DivBackward0"):
                continue
            mine = (*factors, (node.name() == "DivBackward0", factor))
        if kind in _PRODUCT:
            yield before, mine
        elif kind in _PASSED or _keeps_order(before):
            yield from _products(before, mine)  # through a soft cap c tanh(s / c) too: its slope at 0 is 1


def _keeps_order(node: Any) -> bool:
    """Tell whether a permutation moves axes of length 1 alone, as those of einsum do."""
    dims, known = getattr(node, "_saved_dims", None), getattr(node, "_input_metadata", None)
    if dims is None or not known:
        return False
    order = [dim % len(dims) for dim, n in zip(_signed(dims), known[0].shape, strict=True) if n != 1]
    return order == sorted(order)


def _signed(dims: Sequence[int]) -> list[int]:
    return [dim - (1 << 64) if dim >= 1 << 63 else dim for dim in dims]


def _saved(node: Any, name: str) -> torch.Tensor | None:
    """Return what a node keeps, without unpacking it; None where a hook has packed it away."""
    raw = getattr(node, f"_raw_saved_{name}", None)
    held = getattr(raw, "data", None)
    if not isinstance(held, torch.Tensor) or held.is_nested:
        return None
    packed = getattr(raw, "unpack_hook", raw) is not None
    return None if packed and not hooks.in_backward() else held.detach()


def is_linear(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is the output of a linear layer."""
    node: Any = tensor.grad_fn
    while node is not None and node.name() in _LAID_OUT:
        node = node.next_functions[0][0]
    return node is not None and node.name() in _LINEAR
