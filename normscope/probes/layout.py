"""Layout: which tensors a module returns, which of their axes is the channel, and the view [N, C, S]."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

_MAX_DEPTH = 6  # nesting of tuples, dicts and dataclasses that is followed

_CHANNEL_AXIS: tuple[tuple[tuple[type[nn.Module], ...], int], ...] = (
    ((nn.Conv1d, nn.ConvTranspose1d), -2),
    ((nn.Conv2d, nn.ConvTranspose2d), -3),
    ((nn.Conv3d, nn.ConvTranspose3d), -4),
    ((nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention), -1),
)


class Channeled(NamedTuple):
    """A tensor seen as [N, C, S] (positions before the channel axis, channels, positions after it), or [rows, C].

    Attributes:
        x: [N, C, S], or [rows, C] where nothing follows the channel axis or channels are innermost in memory.
        rows: whether x is [rows, C].
        count: elements per channel.
    """

    x: torch.Tensor
    rows: bool
    count: int  # type: ignore[assignment]  # in place of a tuple's own method


def tensors(output: object, slot: str = "output", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Walk tuples, lists, dicts and dataclasses of tensors; yield (slot, tensor).

    Args:
        output: what a module returned.
        slot: name of the whole.
        depth: nesting so far.

    Yields:
        The slot, as "output", "output.0" or "output.logits", and the tensor.
    """
    if isinstance(output, torch.Tensor):
        yield slot, output
        return
    if depth >= _MAX_DEPTH:
        return
    items: Iterator[tuple[object, object]]
    if isinstance(output, Mapping):
        items = iter(output.items())
    elif isinstance(output, (tuple, list)):
        items = iter(enumerate(output))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        items = ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))
    else:
        return
    for name, value in items:
        yield from tensors(value, f"{slot}.{name}", depth + 1)


def first_tensor(args: tuple[object, ...], kwargs: Mapping[str, object]) -> torch.Tensor | None:
    """Return the first tensor among the arguments of a call, positional ones first."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0]
    return next((tensor for _, tensor in tensors((*args, *kwargs.values()))), None)


def batch_size(args: tuple[object, ...], kwargs: Mapping[str, object]) -> int:
    """Return the first dimension of the first tensor among the arguments of a call, 0 where there is none."""
    first = first_tensor(args, kwargs)
    return 0 if first is None or first.is_nested or not first.dim() else int(first.shape[0])


def cut(batch: Any, size: int, start: int, length: int) -> Any | None:
    """Return some samples of a batch; numbers and tensors of length 1 are for all samples.

    Args:
        batch: any nesting of tensors; one that holds k rows a sample, as a flattened target does, has k times the size.
        size: its samples.
        start: the first to return.
        length: how many.

    Returns:
        The same nesting; None where a tensor's rows cannot be told by sample.
    """
    leaves, tree = pytree.tree_flatten(batch)
    parts = []
    for leaf in leaves:
        rows = _rows(leaf, size)
        if rows is None:
            return None
        parts.append(leaf[start * rows : (start + length) * rows] if rows else leaf)
    return pytree.tree_unflatten(parts, tree)


def _rows(value: Any, size: int) -> int | None:
    """Return how many rows of a leaf are one sample's, 0 where it is for all samples, None where that is unknown."""
    if not isinstance(value, torch.Tensor):
        return None if any(tensors(value)) else 0
    if value.is_nested or value.layout is not torch.strided:
        return None
    if value.dim() == 0 or len(value) == 1:
        return 0
    return len(value) // size if len(value) % size == 0 else None


def own_axis(module: nn.Module) -> int | None:
    """Return the channel axis that the class of a module fixes, counted from the end, or None."""
    return next((axis for classes, axis in _CHANNEL_AXIS if isinstance(module, classes)), None)


def guessed_axis(shape: tuple[int, ...], before: tuple[tuple[int, ...], int] | None) -> int:
    """Guess the channel axis of an elementwise or unknown module's output.

    Args:
        shape: shape of the output.
        before: shape and axis of the output that came before, None at the start.

    Returns:
        The axis of the output before, if rank and channels agree; else 1 from four dimensions on, the last below.
    """
    if before is not None:
        other, axis = before
        if len(other) == len(shape) and other[axis] == shape[axis]:
            return axis
    return 1 if len(shape) >= 4 else -1


def why_unmeasured(tensor: torch.Tensor) -> str:
    """Return why no statistics are taken of a tensor, "" where they are."""
    if tensor.is_nested:
        return "nested values are not measured"
    if not tensor.dtype.is_floating_point:
        return f"{str(tensor.dtype).removeprefix('torch.')} values are not measured"
    if tensor.is_sparse or tensor.layout is not torch.strided:
        return "sparse values are not measured"
    if tensor.numel() == 0:
        return f"empty: shape {tuple(tensor.shape)}"
    return ""


def channeled(x: torch.Tensor, axis: int) -> Channeled:
    """View a tensor as [N, C, S] or [rows, C], without a copy where its memory allows: rows come in memory's order.

    Args:
        x: any strided tensor that is not empty.
        axis: its channel axis.

    Returns:
        The view; a tensor of rank 0 or 1 has a single channel.
    """
    if x.dim() < 2:
        return Channeled(x.reshape(-1, 1), True, x.numel())
    axis %= x.dim()
    channels = x.shape[axis]
    if axis == x.dim() - 1:
        if not x.is_contiguous():  # as what attention returns, whose batch and time have changed places
            x = x.permute(*sorted(range(axis), key=x.stride, reverse=True), axis)
        return Channeled(x.reshape(-1, channels), True, x.numel() // channels)
    if x.stride(axis) == 1 and not x.is_contiguous():
        return Channeled(x.movedim(axis, -1).reshape(-1, channels), True, x.numel() // channels)
    before = x.shape[:axis].numel()
    return Channeled(x.reshape(before, channels, -1), False, x.numel() // channels)
