"""Attention: logits and entropy of each head, and the level of the output's logits, on sampled steps.

Every score is looked at, in blocks; the entropy is that of every n-th query. See `normscope.probes.scores` for where
queries and keys are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from normscope.core.site import Site
from normscope.probes import layout
from normscope.probes.projections import Projections, heads_of
from normscope.probes.scores import MASKED, Scores, attentions, is_linear, newest
from normscope.probes.summary import Row, channel_row

SLOT = "attention"
OUTPUT = str(Site("", 0, "logits"))
QUERIES = 32  # queries of a sequence whose entropy is taken, at a fixed stride
SEQUENCES = 4  # sequences in which it is
_PRODUCTS = 1 << 31  # multiplications in a call at most; beyond, a part of the sequences is looked at, at least one
_CELLS = 1 << 17  # scores held at once on a CPU, in its cache
_MORE_CELLS = 1 << 24  # the same elsewhere
_LOGIT_ROWS = 256  # positions of the model's output at which log Z is taken


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
                for scores, number in attentions(output, newest((args, kwargs)), heads_of(module)):
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
            if tensor.dim() > 1 and tensor.shape[-1] > 1 and is_linear(tensor) and not layout.why_unmeasured(tensor):
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


def _may_attend(module: nn.Module) -> bool:
    """Tell whether a module has matrices of its own or right inside, which the projections of attention are."""
    if isinstance(module, nn.Sequential):
        return False
    inside = module.children() if any(True for _ in module.children()) else ()
    owners = (module, *inside) if type(module).__module__.partition(".")[0] != "torch" or inside else ()
    return any(p.dim() > 1 for owner in owners for p in owner.parameters(recurse=False))
