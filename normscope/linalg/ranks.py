"""Ranks: sums over the processes of torch.distributed, where there are any."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def rank(distributed: bool = True) -> int:
    """Return the number of this process, 0 where it is alone.

    Args:
        distributed: whether the processes work together.

    Returns:
        The rank.
    """
    return dist.get_rank() if distributed and dist.is_available() and dist.is_initialized() else 0


def add(tensor: Tensor, distributed: bool) -> None:
    """Sum a tensor over the processes, in place.

    Args:
        tensor: of the same shape in each.
        distributed: whether the processes work together.
    """
    if distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
