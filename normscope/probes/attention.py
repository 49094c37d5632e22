"""Attention: logits and entropy of each head, read from what autograd keeps for the backward pass.

Queries and keys as the scores use them (behind position codes, norms and casts) are no module's output. The graph of a
training forward holds them: a fused kernel (`scaled_dot_product_attention`) saves query, key and mask; written out,
the product saves both factors and the softmax its result. They are looked at where they lie, so nothing is patched,
run again or unpacked, and a copy of the model, a second thread or a compiler notices nothing. What was packed by a
hook, as under activation checkpointing, is left alone until it is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from normscope.core.site import Site
from normscope.probes import hooks, layout
from normscope.probes.projections import Projections, heads_of
from normscope.probes.summary import Row, channel_row

SLOT = "attention"
OUTPUT = str(Site("", 0, "logits"))
MASKED = -5000.0  # below it an additive mask hides a key: masks are -1e4, -1e9 or -inf, linear biases stay above
QUERIES = 32  # queries of a sequence whose entropy is taken, at a fixed stride
SEQUENCES = 4  # sequences in which it is
_PRODUCTS = 1 << 31  # multiplications in a call at most; beyond, a part of the sequences is looked at, at least one
_CELLS = 1 << 17  # scores held at once on a CPU, in its cache
_MORE_CELLS = 1 << 24  # the same elsewhere
_NODES = 512  # nodes of a graph looked at
_LOGIT_ROWS = 256  # positions of the model's output at which log Z is taken
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


class State(NamedTuple):
    """What the calls of one module have shown, on its device.

    Attributes:
        logit: [H] largest scale q.k of a key that is seen.
        ceiling: [H] scale max|q| max|k|.
        entropy: [H] sum over queries of their entropy over its largest value.
        facts: [2] how many, and the largest |scale|.
        sequences: sequences looked at, and those there were.
    """

    logit: torch.Tensor
    ceiling: torch.Tensor
    entropy: torch.Tensor
    facts: torch.Tensor
    sequences: tuple[int, int]


class Attention:
    """Measures the attention of a step.

    Args:
        modules: the watched modules, by name.
        probes: "attention" among them where this runs; a set that shrinks when one fails.
        on_site: called with a site and its attributes when it is first seen.
        on_failure: called with (probe, site, error) when it fails.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        probes: Collection[str],
        on_site: Callable[[str, dict[str, object]], None],
        on_failure: Callable[[str, str, Exception], None],
    ) -> None:
        """Start with nothing measured; see the class."""
        self._probes, self._on_site, self._on_failure = probes, on_site, on_failure
        self._may = {name for name, module in modules.items() if _may_attend(module)}
        self._projections = Projections({name: modules[name] for name in self._may})
        self._known: set[str] = set()
        self._found: dict[str, State] = {}
        self._claimed: set[int] = set()  # numbers of graph nodes that a module inside has had
        self._output: torch.Tensor | None = None

    def forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object
    ) -> None:
        """Look for attention in the graph that a module's forward has added."""
        if not self._may or "attention" not in self._probes or not torch.is_grad_enabled():
            return
        try:
            self._projections.forward(name, output)
            if name in self._may:
                for scores, number in _attentions(output, _newest((args, kwargs)), heads_of(module)):
                    if number not in self._claimed:
                        self._claimed.add(number)
                        self._add(name, module, scores)
            if name == "" and self._known:
                self._see_output(output)
        except Exception as error:  # whatever a graph holds, the run goes on
            self._on_failure("attention", name, error)

    def states(self) -> list[torch.Tensor]:
        """Return what the step has left, on its devices."""
        measured = [t for state in self._found.values() for t in state[:4]]
        bounds = self._projections.states(self._found)
        return [*measured, *bounds, *([self._output] if self._output is not None else [])]

    def rows(self, values: Sequence[np.ndarray]) -> list[Row]:
        """Return the rows of the step.

        Args:
            values: `states` on the host.

        Returns:
            A row a module that attends: of each head `logit`, `ceiling` and `entropy`, with the number of `queries`
            whose entropy was taken, the share of the `sequences` looked at and the `scale` of the product; of a module
            whose scores could not be seen, `ceiling` alone.
            A row of the model's output with the mean `log_z` and the largest |log Z|.
        """
        host, rows = iter(values), []
        for name, state in self._found.items():
            logit, ceiling, entropy, (queries, scale) = (next(host) for _ in range(4))
            stats = {"logit": logit, "ceiling": ceiling, "entropy": entropy / queries}
            taken, there = state.sequences
            facts = {"queries": float(queries), "sequences": taken / there, "scale": float(scale)}
            rows.append(channel_row(str(Site(name, 0, SLOT)), "value", stats, facts))
        for name in self._projections.unseen(self._found):
            ceiling = self._projections.ceiling(name, next(host), next(host))
            self._learn(name, self._projections.modules[name], len(ceiling), seen=False)
            rows.append(channel_row(str(Site(name, 0, SLOT)), "value", {"ceiling": ceiling}, {}))
        if self._output is not None:
            log_z = next(host)
            facts = {"log_z": float(log_z.mean()), "log_z_size": float(np.abs(log_z).max())}
            rows.append(channel_row(OUTPUT, "value", {}, facts))
        return rows

    def discard(self) -> None:
        """Forget what the step has left."""
        self._found, self._claimed, self._output = {}, set(), None
        self._projections.discard()

    def _add(self, name: str, module: nn.Module, scores: Scores) -> None:
        state, known = observe(scores), self._found.get(name)
        if known is None:
            self._found[name] = state
            self._learn(name, module, len(state.logit), seen=True)
        elif len(known.logit) == len(state.logit):
            self._found[name] = merge(known, state)

    def _learn(self, name: str, module: nn.Module, heads: int, *, seen: bool) -> None:
        if name not in self._known:
            self._known.add(name)
            facts: dict[str, object] = {"class": type(module).__name__, "channels": heads, "seen": seen}
            self._on_site(str(Site(name, 0, SLOT)), {"module": name, "call": 0, "slot": SLOT, **facts})

    def _see_output(self, output: object) -> None:
        """Take log Z of the model's output where a linear layer gave it."""
        for _, tensor in layout.tensors(output):
            if tensor.dim() > 1 and tensor.shape[-1] > 1 and _is_linear(tensor) and not layout.why_unmeasured(tensor):
                rows = tensor.detach().reshape(-1, tensor.shape[-1])
                rows = rows[:: -(-len(rows) // _LOGIT_ROWS)]
                self._output = torch.logsumexp(_wide(rows), 1)
                if OUTPUT not in self._known:
                    self._known.add(OUTPUT)
                    facts: dict[str, object] = {"class": "model", "dtype": str(tensor.dtype).removeprefix("torch.")}
                    self._on_site(
                        OUTPUT, {"module": "", "call": 0, "slot": "logits", "channels": rows.shape[1], **facts}
                    )
                return


@torch.no_grad()
def observe(scores: Scores) -> State:
    """Measure one call of attention.

    The largest logit is that of all pairs of a query and a key it sees, in blocks of scores; the entropy of a query's
    weights is divided by the logarithm of the keys that it sees, and taken at every n-th query.

    Args:
        scores: queries, keys and what is done to them.

    Returns:
        The state, in float32 or float64.
    """
    batch, heads, length, width = scores.q.shape
    work = heads * length * scores.k.shape[2] * width
    taken = min(batch, max(1, _PRODUCTS // max(work, 1)))
    stride = -(-batch // taken)
    part = _cut(scores, slice(0, None, stride))
    longest_k = _longest(part.k).repeat_interleave(heads // part.k.shape[1])
    scale = torch.as_tensor(part.scale, dtype=longest_k.dtype, device=longest_k.device).reshape(-1).abs()
    entropy, queries = _entropy(_cut(part, slice(0, None, -(-len(part.q) // SEQUENCES))))
    facts = torch.stack((queries, scale.max()))
    return State(_largest(part), _longest(part.q) * longest_k * scale, entropy, facts, (len(part.q), batch))


def merge(a: State, b: State) -> State:
    """Return the state of two sets of calls together."""
    return State(
        torch.maximum(a.logit, b.logit),
        torch.maximum(a.ceiling, b.ceiling),
        a.entropy + b.entropy,
        torch.stack((a.facts[0] + b.facts[0], torch.maximum(a.facts[1], b.facts[1]))),
        (a.sequences[0] + b.sequences[0], a.sequences[1] + b.sequences[1]),
    )


def _largest(scores: Scores) -> torch.Tensor:
    """Return the largest logit of each head, a block of sequences and queries at a time."""
    batch, heads, length, _ = scores.q.shape
    cells = _CELLS if scores.q.device.type == "cpu" else _MORE_CELLS
    rows = min(length, max(1, cells // (heads * scores.k.shape[2])))
    some = max(1, cells // (heads * scores.k.shape[2] * rows))
    blocks = []
    for first in range(0, batch, some):
        part = _cut(scores, slice(first, first + some))
        for start in range(0, length, rows):
            which = slice(start, min(start + rows, length))
            logits = _logits(part, which)
            seen = _seen(part, which, logits)
            blocks.append((logits if seen is None else logits + _barred(seen, logits.dtype)).amax((0, 2, 3)))
    return torch.stack(blocks).amax(0)


def _entropy(scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum over queries of their relative entropy, by head, and the number of queries."""
    length = scores.q.shape[2]
    stride = -(-length // QUERIES)
    which = slice(stride - 1, None, stride)
    if scores.weights is None:
        logits = _logits(scores, which)
        seen = _seen(scores, which, logits)
        if scores.mask is not None:
            logits = logits + _rows_of(scores.mask, which)
        logits = logits if seen is None else logits + _barred(seen, logits.dtype)
        weights = torch.softmax(logits, 3)
        keys = torch.full_like(logits[..., 0], logits.shape[3]) if seen is None else seen.expand_as(logits).sum(3)
    else:
        weights = _wide(scores.weights[:, :, which])
        # a weight may be 0 because its score is small, but hardly in each head; one key alone has the first query only
        keys = (weights > 0).any(1, keepdim=True).sum(3)
        keys = torch.cat((keys[..., :1], keys[..., 1:].clamp(min=2)), 2) if stride == 1 else keys.clamp(min=2)
    share = torch.special.entr(weights).sum(3) / keys.clamp(min=2).to(weights.dtype).log()
    counted = keys > 1
    return share.where(counted, 0.0).sum((0, 2)), counted[:, 0].sum().to(share.dtype)


def _logits(scores: Scores, which: slice) -> torch.Tensor:
    """Return scale q.k of some queries, [B, H, queries, S]."""
    q, k = _wide(scores.q[:, :, which]), _wide(scores.k)
    batch, heads, length, width = q.shape
    logits = (q.reshape(batch, k.shape[1], -1, width) @ k.transpose(2, 3)).reshape(batch, heads, length, -1)
    factor = scores.scale
    return logits * (factor.reshape(-1, 1, 1).to(logits.dtype) if isinstance(factor, torch.Tensor) else factor)


def _seen(scores: Scores, which: slice, logits: torch.Tensor) -> torch.Tensor | None:
    """Return which keys these queries see, broadcastable to [B, H, queries, S], or None for all."""
    if scores.weights is not None:
        return scores.weights[:, :, which, : logits.shape[3]] > 0
    seen = None
    if scores.causal:
        device, (length, keys) = logits.device, (scores.q.shape[2], logits.shape[3])
        at = torch.arange(length, device=device)[which]
        seen = torch.arange(keys, device=device) <= at[:, None]
    if scores.mask is not None:
        unmasked = _rows_of(scores.mask, which) > MASKED
        seen = unmasked if seen is None else seen & unmasked
    return seen


def _rows_of(mask: torch.Tensor, which: slice) -> torch.Tensor:
    """Return the part of a mask, broadcastable to [B, H, L, S], that is for some queries."""
    return mask[..., which, :] if mask.dim() > 1 and mask.shape[-2] > 1 else mask


def _barred(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to scores: 0 where a key is seen, else minus infinity."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -math.inf)


def _cut(scores: Scores, which: slice) -> Scores:
    """Return some of the sequences."""
    mask = scores.mask if scores.mask is None or scores.mask.dim() < 4 or len(scores.mask) == 1 else scores.mask[which]
    weights = None if scores.weights is None else scores.weights[which]
    return scores._replace(q=scores.q[which], k=scores.k[which], mask=mask, weights=weights)


def _longest(x: torch.Tensor) -> torch.Tensor:
    """Return the largest norm of a vector of each head, [H], of [B, H, L, D]."""
    lengths: torch.Tensor = torch.linalg.vector_norm(_wide(x), dim=3)
    return lengths.amax((0, 2))


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


# ---- the graph -----------------------------------------------------------------------------------------------------


def _may_attend(module: nn.Module) -> bool:
    """Tell whether a module has matrices of its own or right inside, which the projections of attention are."""
    if isinstance(module, nn.Sequential):
        return False
    inside = module.children() if any(True for _ in module.children()) else ()
    owners = (module, *inside) if type(module).__module__.partition(".")[0] != "torch" or inside else ()
    return any(p.dim() > 1 for owner in owners for p in owner.parameters(recurse=False))


def _newest(values: object) -> int:
    """Return the number of the newest node that the arguments of a call come from: those of the call are larger."""
    found = (tensor.grad_fn for _, tensor in layout.tensors(values) if not tensor.is_nested)
    return max((node._sequence_nr() for node in found if node is not None), default=-1)


def _attentions(output: object, since: int, heads: int) -> Iterator[tuple[Scores, int]]:
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


def _is_linear(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is the output of a linear layer."""
    node: Any = tensor.grad_fn
    while node is not None and node.name() in _LAID_OUT:
        node = node.next_functions[0][0]
    return node is not None and node.name() in _LINEAR
