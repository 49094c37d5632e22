"""Transfer: many small device tensors to the host in one copy a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


@torch.no_grad()
def to_host(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Copy tensors to the host, joined so that each device is synchronized with once.

    Args:
        tensors: tensors of any shape, dtype and device.

    Returns:
        float64 arrays of the same shapes.
    """
    arrays: list[np.ndarray] = [np.empty(0)] * len(tensors)
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        here = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        joined = (
            torch
            .cat([t if t.dim() == 1 else t.reshape(-1) for t in (tensors[i] for i in here)])
            .cpu()
            .to(torch.float64)
            .numpy()
        )
        start = 0
        for i in here:
            end = start + tensors[i].numel()
            arrays[i] = joined[start:end].reshape(tensors[i].shape)
            start = end
    return arrays
