"""Ranks: the processes of torch.distributed that train one model together, and sums over them.

What is measured is exchanged on the host, in float64, over a gloo group of its own: it cannot be mistaken for a
collective of the training, waits a bounded time, and a rank that leaves it is noticed by the others at once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from normscope.linalg.ranks import rank

PATIENCE = 60.0  # seconds for which an exchange waits for the others
MOST = 1 << 23  # values that are exchanged at once, 64 MB
_NUMBERS = itertools.count()  # of this process' attachments
_TOGETHER = "together"
_TOLD = itertools.count()  # of what was told to this process' attachments
_OPEN: set[int] = set()  # places of those that have not ended: ranks find each other by place


class LostError(Exception):
    """The other ranks cannot be reached any more; what this one has measured is its own."""


def world() -> int:
    """Return the number of processes that torch.distributed has, 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_writer() -> bool:
    """Tell whether this process writes what all have measured: rank 0 does."""
    return rank() == 0


def is_sharded(x: torch.Tensor) -> bool:
    """Tell whether a tensor is a DTensor, of which this process holds a shard or a replica."""
    return hasattr(x, "device_mesh") and hasattr(x, "placements")


def local(x: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds, detached: all of it unless it is a DTensor."""
    held: Any = x.detach()
    return held.to_local() if is_sharded(held) else held  # type: ignore[no-any-return]


def whole(x: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor of which this process holds everything, detached; None where the ranks would have to talk."""
    sharded: Any = x
    held = not is_sharded(x) or all(placement.is_replicate() for placement in sharded.placements)
    return local(x) if held else None


def share(x: torch.Tensor) -> float:
    """Return one over the number of ranks that hold the same, so that a sum over all of them counts an element once."""
    sharded: Any = x
    if not is_sharded(x):
        return 1 / world()
    sizes = zip(sharded.device_mesh.shape, sharded.placements, strict=True)  # the mesh is of all ranks
    replicas: int = math.prod(size for size, placement in sizes if placement.is_replicate())
    return 1 / replicas


@torch.no_grad()
def spread(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return values of the entries or rows of `local(x)` at their places in all of x, times `share(x)`: to be summed.

    Args:
        x: a DTensor.
        values: of the shape of `local(x)`, or of its first dimensions.

    Returns:
        Of the shape of x, or of its first dimensions; zero where other ranks have values.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # takes a second to import

    sharded: Any = x
    _, offset = compute_local_shape_and_global_offset(x.shape, sharded.device_mesh, sharded.placements)
    found = values.new_zeros(x.shape[: values.dim()])
    found[tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=False))] = values
    return found.mul_(share(x))


class Ranks:
    """The ranks that have attached to one model; alone until `join` has found them, and after one was lost.

    Args:
        size: number of ranks, 1 where this process measures by itself.
        settings: what must be the same on all, as text.

    Attributes:
        patience: seconds for which an exchange waits for the others.
    """

    def __init__(self, size: int = 1, settings: str = "") -> None:
        """Announce this rank, without waiting for the others."""
        self.size, self.rank = size, rank() if size > 1 else 0
        self.patience = PATIENCE
        self._group: Any = None
        self._store: Any = None
        self._joined, self._why = size == 1, ""
        if size > 1:
            self._place = next(place for place in itertools.count() if place not in _OPEN)
            _OPEN.add(self._place)
            try:
                store = dist.distributed_c10d._get_default_store()
                self._store = dist.PrefixStore(f"normscope/{self._place}", store)  # type: ignore[attr-defined]
                self._store.set(f"attached/{self.rank}", f"{next(_NUMBERS)} {settings}")
            except Exception as error:  # a backend without a store
                self._why = _brief(error)

    @property
    def together(self) -> bool:
        """Whether the others can be reached."""
        return self._group is not None

    def join(self) -> None:
        """Find the others, at the first call, which comes after the training has made all ranks wait for each other.

        Whoever comes first decides for all: together if every rank has announced the same settings, else alone.

        Raises:
            LostError: if they have not attached, or otherwise, or cannot be reached.
        """
        if self._joined:
            return
        self._joined = True
        if self._why:
            raise LostError(self._why)
        try:
            decided, store = self._decided()
            if decided == _TOGETHER:
                self._group = dist.ProcessGroupGloo(store, self.rank, self.size, timedelta(seconds=self.patience))
        except Exception as error:  # of the store or of the network, in any class
            raise LostError(_brief(error)) from error
        if self._group is None:
            raise LostError(decided)

    def _decided(self) -> tuple[str, Any]:
        """Return why the ranks are not together, or that they are, and a store for this attachment alone."""
        keys = [f"attached/{number}" for number in range(self.size)]
        said = [self._store.get(key).decode() if self._store.check([key]) else "" for key in keys]
        numbers, settings = zip(*(text.partition(" ")[::2] for text in said), strict=True)
        missing = [str(rank) for rank, number in enumerate(numbers) if not number]
        why = "the ranks attach differently" if len(set(settings)) > 1 else _TOGETHER
        why = f"rank {', '.join(missing)} has not attached" if missing else why
        store = dist.PrefixStore("/".join(numbers), self._store)  # type: ignore[attr-defined]
        return store.compare_set("decided", "", why).decode(), store

    def told(self, value: str) -> str:
        """Return what the writing rank says, for which the others wait; every rank asks as often as the others.

        Args:
            value: what this rank would say.

        Returns:
            The value of the writing rank.

        Raises:
            LostError: if it says nothing for too long.
        """
        name = f"told/{next(_TOLD)}"
        try:
            if self.rank == 0:
                self._store.set(name, value)
            else:
                self._store.wait([name], timedelta(seconds=self.patience))
                value = self._store.get(name).decode()
        except Exception as error:
            raise LostError(_brief(error)) from error
        return value

    def leave(self) -> None:
        """Be alone from now on; the others notice when they next exchange something."""
        self._group, self._joined = None, True

    def end(self) -> None:
        """Leave and take the announcement back."""
        self.leave()
        store, self._store = self._store, None
        if store is not None:
            _OPEN.discard(self._place)
            with suppress(Exception):  # the process that holds the store may have gone
                store.set(f"attached/{self.rank}", "")

    def summed(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Sum arrays over the ranks, in float64, in one collective for each `MOST` values.

        Args:
            arrays: floating-point arrays, of the same shapes on every rank.

        Returns:
            Arrays of the same shapes and types; those given where this rank is alone. If a rank was lost it is a
            LostError.
        """
        return self._reduced(arrays, "SUM")

    def maximum(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the largest values among the ranks, as `summed` does."""
        return self._reduced(arrays, "MAX")

    def common(self, keys: Collection[str]) -> list[str]:
        """Return what all ranks have, sorted; a collective.

        Args:
            keys: what this one has.

        Returns:
            Those keys that every rank gave.
        """
        mine = sorted(keys)
        text = "\n".join(mine).encode()
        digest = float(int.from_bytes(hashlib.sha256(text).digest()[:6]))  # 48 bits are exact in float64
        largest, smallest, longest = self.maximum([np.array([digest, -digest, len(text)])])[0]
        if largest == -smallest:
            return mine
        letters = np.zeros((self.size, int(longest)))
        letters[self.rank, : len(text)] = np.frombuffer(text, np.uint8)
        theirs = [bytes(row[row > 0].astype(np.uint8)) for row in self.summed([letters])[0]]
        return sorted(set.intersection(*(set(row.decode().split("\n")) for row in theirs)) - {""})

    def _reduced(self, arrays: Sequence[np.ndarray], kind: str) -> list[np.ndarray]:
        if self._group is None:
            return list(arrays)
        found, start = [], 0
        while start < len(arrays):
            sizes = np.cumsum([a.size for a in arrays[start:]])
            some = arrays[start : start + max(1, int(np.searchsorted(sizes, MOST, side="right")))]
            start += len(some)
            flat = np.concatenate([np.asarray(a, np.float64).ravel() for a in some])
            self._reduce(flat, kind)
            parts = zip(np.split(flat, np.cumsum([a.size for a in some])[:-1]), some, strict=True)
            found += [part.reshape(a.shape).astype(a.dtype, copy=False) for part, a in parts]
        return found

    def _reduce(self, flat: np.ndarray, kind: str) -> None:
        """Replace values by those of all ranks, in one collective; none where there are no values."""
        options = dist.AllreduceOptions()
        options.reduceOp = getattr(dist.ReduceOp, kind)
        try:
            if flat.size:
                self._group.allreduce([torch.from_numpy(flat)], options).wait(timedelta(seconds=self.patience))
        except Exception as error:  # a rank that died, or one that did not come
            self.leave()
            raise LostError(_brief(error)) from error


def _brief(error: Exception) -> str:
    """Return what an error of the network says, without where in the source, and without advice for another case."""
    return re.sub(r"^\[[^\]]*\] ", "", str(error)).partition(". This is")[0]
