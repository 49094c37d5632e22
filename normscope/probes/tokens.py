"""Tokens: the largest values at the input of a normalization layer, with their token and channel.

Statistics of channels cannot show that one token carries a value a thousand times the others', and the residual stream,
where such values live, is no layer's output: the input of a norm is where it can be seen.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from normscope.norms.recognize import NormParts
from normscope.probes.summary import Row, channel_row

TOP = 3
_SAMPLE = 4096  # values whose median is taken


def has_tokens(x: torch.Tensor, parts: NormParts) -> bool:
    """Tell whether a norm's input is [B, T, C] or [T, C] with statistics over C."""
    return parts.kind in ("layer", "rms") and parts.axis == -1 and x.dim() in (2, 3) and parts.normalized_ndim == 1


@torch.no_grad()
def observe(x: torch.Tensor) -> torch.Tensor:
    """Return the three values of largest magnitude, exactly, and the median magnitude of a sample.

    They lie in the three rows of largest maximum, so a search of these finds them.

    Args:
        x: [..., T, C] input of a norm.

    Returns:
        [4, 3]: values with sign, largest first, their token (position in the sequence), their channel, and the median
        three times. With fewer than three values 0 stands for the others.
    """
    length, width = x.shape[-2:]
    rows = x.detach().reshape(-1, width)
    low, high = torch.aminmax(rows, dim=1)
    top = torch.topk(torch.maximum(high, -low), min(TOP, len(rows))).indices
    some = rows[top].to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    at = torch.topk(some.abs().reshape(-1), min(TOP, some.numel())).indices
    stride = -(-rows.numel() // _SAMPLE) | 1  # odd: not always the same channels
    middle = rows.reshape(-1)[::stride].abs().to(some.dtype).median()
    found = torch.stack((some.reshape(-1)[at], top[at // width] % length, at % width, middle.expand(len(at))))
    return torch.nn.functional.pad(found, (0, TOP - len(at)))


def merge(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the three largest of two, with the median of the first."""
    both = torch.cat((a, b), 1)
    kept = both[:, torch.topk(both[0].abs(), TOP).indices]
    kept[3] = a[3, 0]
    return kept


def rows(found: Iterable[tuple[str, np.ndarray]]) -> list[Row]:
    """Return a row a norm's input: `peak1` to `peak3`, each with `.token` and `.channel`, and the median `middle`.

    Args:
        found: (site, state on the host).

    Returns:
        The rows.
    """
    made = []
    for site, (values, tokens, channels, middle) in found:
        scalars = {"middle": float(middle[0])}
        for i, (value, token, channel) in enumerate(zip(values, tokens, channels, strict=True), 1):
            scalars |= {f"peak{i}": float(value), f"peak{i}.token": float(token), f"peak{i}.channel": float(channel)}
        made.append(channel_row(site, "value", {}, scalars))
    return made
