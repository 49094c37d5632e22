"""What the figures of this chapter compare: normalizations over the batch, without affine map or stored statistics."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normscope import norms, workbench

BN, NEWTON, ZCA, CHOLESKY, PCA = "BatchNorm", "Newton, $T$ = 5", "ZCA", "Cholesky", "PCA"
NAMES: Final = (BN, NEWTON, ZCA, CHOLESKY, PCA)
_METHODS = {ZCA: "zca", CHOLESKY: "cholesky", PCA: "pca", NEWTON: "newton"}


def layer(name: str, groups: int = 1, iterations: int = 5) -> norms.Norm:
    """Build a normalization over the batch.

    Args:
        name: one of `NAMES`.
        groups: groups of features that are whitened each by itself.
        iterations: T of Newton's iteration.

    Returns:
        The layer.
    """
    if name == BN:
        return norms.Norm(norms.Batch(), norms.Standardize())
    return norms.Norm(norms.Batch(groups=groups), norms.Whiten(_METHODS[name], iterations=iterations))


def predicted(name: str, features: int, batch: int, size: int | None = None) -> float:
    """Return what first-order perturbation predicts of the disturbance, for independent Gaussian features.

    The batch has Sigma = I + E, with var E_ij = 1 / B, 2 / B on the diagonal. BatchNorm divides by the root of the
    diagonal, ZCA by I + E / 2, Cholesky by I + the lower half of E.

    Args:
        name: BatchNorm, ZCA or Cholesky.
        features: d.
        batch: B.
        size: features that are whitened together, all by default.

    Returns:
        The disturbance.
    """
    together = features if size is None else size
    spread = {BN: 1.5, ZCA: 1 + (together + 1) / 4, CHOLESKY: 1 + together / 2}[name]
    return float((features * spread / batch) ** 0.5)


def gaussian(samples: int, features: int, seed: int) -> Tensor:
    """Draw independent standard Gaussian features, [samples, features]."""
    return torch.randn(samples, features, generator=torch.Generator().manual_seed(seed))


def digit_features(features: int, seed: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Project the 5000 digits of MNIST onto random directions: correlated real features, [5000, features]."""
    images, _ = workbench.mnist()
    directions = torch.randn(784, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (images.flatten(1).to(torch.float64) @ directions / 28).to(dtype)
