"""Transfer: many small device tensors to the host in one copy a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_LARGE = 1 << 16  # values from which on joining costs more than another copy


@torch.no_grad()
def to_host(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Copy tensors to the host, joined so that each device is synchronized with once, but for large ones.

    Args:
        tensors: tensors of any shape, dtype and device; a large one must be nobody else's, as it may not be copied.

    Returns:
        Arrays of the same shapes, float64; large ones in their own precision.
    """
    arrays: list[np.ndarray] = [np.empty(0)] * len(tensors)
    for i, tensor in enumerate(tensors):
        if tensor.numel() >= _LARGE:
            arrays[i] = tensor.cpu().numpy()
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        here = [i for i, tensor in enumerate(tensors) if tensor.device == device and tensor.numel() < _LARGE]
        flat = [tensors[i] if tensors[i].dim() == 1 else tensors[i].reshape(-1) for i in here]
        joined = torch.cat(flat).cpu().to(torch.float64).numpy() if flat else np.empty(0)
        start = 0
        for i in here:
            end = start + tensors[i].numel()
            arrays[i] = joined[start:end].reshape(tensors[i].shape)
            start = end
    return arrays
