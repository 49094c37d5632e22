"""Stream: whether the batches of training are random draws, seen on the model's input, which no weight moves.

It also hears of the gradient between the micro-batches of a step.

Each sample is reduced to a few features; if batches are independent draws, the mean of one lies as far from that of
the batches before as the spread of samples within batches predicts.
"""

from __future__ import annotations

import numpy as np
import torch

from normscope.core.site import Site
from normscope.probes import noise_scale
from normscope.probes.summary import Row, channel_row

SITE = str(Site("", 0, "input"))
FEATURES = 48  # of a sample: means of as many equal parts of it, or frequencies of integers modulo this number


@torch.no_grad()
def features(x: torch.Tensor) -> torch.Tensor | None:
    """Reduce a batch to features of its samples, in one pass.

    Args:
        x: [N, ...] a model's input: real values, or integers as tokens.

    Returns:
        [N, at most FEATURES]; None where the input is of another kind or a batch holds a single sample.
    """
    if x.is_nested or x.is_sparse or x.dim() < 1 or x.shape[0] < 2 or x.numel() == 0 or x.is_complex():
        return None
    flat = x.detach().reshape(len(x), -1)
    if x.is_floating_point():
        parts = min(FEATURES, flat.shape[1])
        width = flat.shape[1] // parts
        return flat[:, : parts * width].reshape(len(x), parts, width).mean(2, dtype=torch.float32)
    if x.dtype == torch.bool:
        return None
    counts = torch.zeros(len(x), FEATURES, device=x.device)
    kinds = flat.long().remainder(FEATURES)
    return counts.scatter_add_(1, kinds, torch.ones_like(kinds, dtype=counts.dtype)) / flat.shape[1]


class Stream:
    """Looks at the batches of sampled steps; of those before it keeps one mean, whatever the number of steps."""

    def __init__(self) -> None:
        """Start without a batch."""
        self._mean: np.ndarray | None = None
        self._batches = 0
        self._sizes: list[int] = []
        self._drawn: list[torch.Tensor] = []
        self._gradients: list[list[torch.Tensor]] = []

    def see_batch(self, x: torch.Tensor | None) -> None:
        """Hear that a forward pass begins; the first batch of a step is the one that is compared.

        Args:
            x: the model's first input.
        """
        self._sizes.append(x.shape[0] if x is not None and not x.is_nested and x.dim() else 0)
        if len(self._sizes) == 1 and x is not None:
            found = features(x)
            if found is not None:
                variance, mean = torch.var_mean(found, 0)
                m2 = variance * (len(found) - 1)
                self._drawn = [torch.stack((torch.full_like(mean, len(found)), mean, m2))]

    def see_gradient(self, squares: list[torch.Tensor]) -> None:
        """Hear of the gradient that the backward passes so far have added up to.

        Args:
            squares: its squared norm, a part a device.
        """
        self._gradients.append(squares)

    def states(self) -> list[torch.Tensor]:
        """Return what the step has left, on the devices: of the batch, then of the gradient after each backward pass.

        The gradient counts where each forward pass had a backward pass of its own and as many samples as the others. It
        is known after all but the last: the optimizer may be given it clipped or unscaled.
        """
        whole = len(self._gradients) == len(self._sizes) - 1 >= 2 and len(set(self._sizes)) == 1
        self._gradients = self._gradients if whole else []
        return [*self._drawn, *(part for squares in self._gradients for part in squares)]

    def rows(self, values: list[np.ndarray]) -> list[Row]:
        """Return the rows of the step.

        Args:
            values: what `states` returned, on the host.

        Returns:
            A row of the model's input with `ratio` and `samples`, where it could be compared (see `compared`), and one
            of its gradient (see `normscope.probes.noise_scale.micro`), where there are enough micro-batches.
        """
        host = iter(values)
        compared = [self.compared(next(host)) for _ in self._drawn]
        found = [channel_row(SITE, "value", {}, stats) for stats in compared if np.isfinite(stats["ratio"])]
        squares = [sum(float(next(host)) for _ in parts) for parts in self._gradients]
        return [*found, noise_scale.micro(squares, self._sizes[0])] if squares else found

    def discard(self) -> None:
        """Forget what the step has left."""
        self._sizes, self._drawn, self._gradients = [], [], []

    def compared(self, state: np.ndarray) -> dict[str, float]:
        """Compare a batch with the mean of those before, then add it to them.

        ratio = sum_k (b_k - B_k)^2 / sum_k (1 + 1/t) s_k^2 / n, with b the batch's mean, B that of t earlier batches
        and s^2 the variance between the samples of the batch; its expectation is 1 for independent draws.

        Args:
            state: [3, features] count, mean and M2 = sum (x - mean)^2 of the features over the samples of a batch.

        Returns:
            The ratio, NaN for the first batch and for constant input, and the samples.
        """
        (count, *_), mean, m2 = state
        variance = m2 / (count - 1)
        if self._mean is None or self._mean.shape != mean.shape:
            self._mean, self._batches = np.zeros_like(mean), 0
        t, ratio = self._batches, float("nan")
        if t and variance.sum() > 0:
            expected = (1 + 1 / t) * float(variance.sum()) / count
            ratio = float(((mean - self._mean) ** 2).sum()) / expected
        if np.isfinite(mean).all():
            self._mean = self._mean + (mean - self._mean) / (t + 1)
            self._batches = t + 1
        return {"ratio": ratio, "seen": float(count)}
