"""Shifts of the distribution of images: what a model in service may meet that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from normscope.core.errors import ArgumentError, unknown_name


def _contrast(images: Tensor, strength: float, _: torch.Generator) -> Tensor:
    return images * (1 - strength)


def _brightness(images: Tensor, strength: float, _: torch.Generator) -> Tensor:
    return images + strength


def _blur(images: Tensor, strength: float, _: torch.Generator) -> Tensor:
    width = 2 * round(strength) + 1
    return F.avg_pool2d(F.pad(images, (width // 2,) * 4, mode="replicate"), width, stride=1)


def _noise(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return images + strength * torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)


def _invert(images: Tensor, strength: float, _: torch.Generator) -> Tensor:
    inverted = images.min() + images.max() - images
    return images + strength * (inverted - images)


_Kind: TypeAlias = tuple[Callable[[Tensor, float, torch.Generator], Tensor], float]
# the function, and the strength that it has by default
_KINDS: Final[dict[str, _Kind]] = {
    "contrast": (_contrast, 0.7),
    "brightness": (_brightness, 1.3),
    "blur": (_blur, 2.0),
    "noise": (_noise, 1.3),
    "invert": (_invert, 1.0),
}
CORRUPTIONS: Final = tuple(_KINDS)


def corrupt(images: Tensor, kind: str, strength: float | None = None, *, seed: int = 0) -> Tensor:
    """Shift the distribution of standardized images.

    "contrast" scales by 1 - strength, "brightness" adds strength, "blur" averages over 2 strength + 1 pixels each way,
    "noise" adds Gaussian noise of that standard deviation, "invert" exchanges dark and light by that share.

    Args:
        images: [N, C, H, W], standardized as `mnist` gives them.
        kind: one of `CORRUPTIONS`.
        strength: how much; None for one that costs a small network of digits much of its accuracy.
        seed: what decides the noise.

    Returns:
        Images of the same shape.

    Raises:
        ArgumentError: the kind is unknown or the strength negative.

    >>> corrupt(torch.ones(1, 1, 2, 2), "contrast", 0.5).flatten()
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    function, default = _kind(kind)
    chosen = default if strength is None else strength
    if not chosen >= 0:
        raise ArgumentError(f"strength={strength!r} must be at least 0; that of {kind!r} is {default} by default.")
    return function(images, chosen, torch.Generator().manual_seed(seed))


def _kind(name: str) -> _Kind:
    if name not in _KINDS:
        raise unknown_name("kind", name, _KINDS)
    return _KINDS[name]
