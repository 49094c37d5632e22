"""Statistics from elsewhere: another batch, an adversary, the targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.affine import scale_shift
from normscope.norms.area import Batch
from normscope.norms.families.mixtures_base import RunningNorm, kept
from normscope.norms.layer import Normalization, in_float
from normscope.norms.operation import safe_sqrt
from normscope.norms.part import Traits, positive
from normscope.norms.population import keep, track, valid_momentum
from normscope.norms.recovery import Affine


class BorrowingNorm(RunningNorm):
    """Batch normalization by statistics of two batches: the input, with weight `share`, and another one.

    mean = share mean_x + (1 - share) mean_other, and the variance of the mixture of both. With share 0.5 and the next
    state-action pairs this is CrossNorm of reinforcement learning, with share 0 and unlabeled examples UBN.

    Args:
        num_features: number of channels.
        share: weight of the input's own statistics.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        share: float = 0.5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight, bias and the stored statistics.

        Raises:
            ArgumentError: share is not in [0, 1].
        """
        super().__init__(num_features, eps, momentum, affine)
        if not 0 <= share <= 1:
            raise ArgumentError(f"share={share!r} must be between 0 and 1: the weight of the input; try 0.5.")
        self.share = share

    @property
    def traits(self) -> Traits:
        """Those of batch normalization; the other batch does not follow the input."""
        return Traits(crosses_batch=True, stateful=True, condition="domain")

    @in_float
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Normalize `(N, C, *)` with the help of another batch `(M, C, *)`; by itself without."""
        if not self.training or other is None:
            return self.normalized(x, *self.batch(x))
        return self.normalized(x, *self._mixed(x, other.to(x.dtype), self.share))

    def _mixed(self, x: Tensor, other: Tensor, share: float) -> tuple[Tensor, Tensor]:
        weights, batches = (share, 1 - share), (x, other)
        found = [(w, *self.moments(b)) for w, b in zip(weights, batches, strict=True) if w > 0]
        mean = torch.stack([w * m for w, _, m, _ in found]).sum(0)
        var = torch.stack([w * (v + (m - mean).square()) for w, _, m, v in found]).sum(0)
        unbiased = torch.stack([w * (self.bessel(v, z) + (m - mean).square()) for w, z, m, v in found]).sum(0)
        track(self, self.momentum, mean=mean, var=unbiased)
        return mean, var


class AdversarialStatisticsNorm(Normalization):
    """Adversarial batch normalization: feature statistics moved, within bounds, to where the loss is largest.

    y = scale (x - mean) + shift mean, mean over the batch, scale and shift for each channel within [1 - bound, 1 +
    bound]; at 1 the layer does nothing. Ascend the loss with `attack()` after a backward pass, start anew with
    `reset()`.

    Args:
        num_features: number of channels.
        bound: largest relative change.
    """

    scale: nn.Parameter
    shift: nn.Parameter

    def __init__(self, num_features: int, bound: float = 1.1) -> None:
        """Register scale and shift."""
        super().__init__()
        positive(bound, "bound", "no statistics could be moved")
        self.num_features, self.bound = num_features, bound
        self.scale, self.shift = (nn.Parameter(torch.ones(num_features)) for _ in range(2))

    @property
    def traits(self) -> Traits:
        """The mean is that of the batch."""
        return Traits(crosses_batch=True)

    @torch.no_grad()
    def attack(self, step: float = 0.2) -> None:
        """Move scale and shift along the sign of their gradients, and clip them to the bound."""
        for delta in (self.scale, self.shift):
            if delta.grad is not None:
                delta.add_(step * delta.grad.sign()).clamp_(1 - self.bound, 1 + self.bound)
                delta.grad = None

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to scale and shift 1, which leave the input as it is."""
        self.scale.fill_(1)
        self.shift.fill_(1)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Move the statistics of `(N, C, *)`."""
        Batch().axis(x, self.num_features)
        z = Batch().split(x)
        mean = self.average.mean(z)
        return scale_shift(x, self.scale.unsqueeze(0), (self.shift - self.scale) * mean)


class PopArt(Normalization):
    """Pop-Art: outputs on the scale of their targets, whose statistics change without changing the outputs.

    y = sigma (weight x + bias) + mean. `update(targets)` averages mean and mean square of the targets, sigma =
    sqrt(square - mean^2), and rescales weight and bias so that y stays what it was; compare `normalize(targets)` with
    (y - mean) / sigma in the loss.

    Args:
        num_features: number of outputs.
        momentum: weight of the newest targets.
        smallest: bound of sigma from below.
        largest: bound of sigma from above.
    """

    running_square: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 3e-4,
        smallest: float = 1e-4,
        largest: float = 1e6,
    ) -> None:
        """Register weight, bias and the moments of the targets."""
        super().__init__()
        positive(smallest, "smallest", "equal targets would be divided by zero")
        valid_momentum(momentum)
        self.num_features, self.momentum, self.smallest, self.largest = num_features, momentum, smallest, largest
        Affine().install(self, num_features)
        keep(self, mean=torch.zeros(num_features), square=torch.ones(num_features))

    @property
    def traits(self) -> Traits:
        """Forward is an affine map; only `update` stores."""
        return Traits()

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the targets `(C,)`."""
        return safe_sqrt(self.running_square - self.running_mean.square()).clamp(self.smallest, self.largest)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Bring `(N, C, *)` to the scale of the targets."""
        Batch().axis(x, self.num_features)
        wide = (-1, *(1,) * (x.ndim - 2))
        sigma, mean = kept(self.sigma, x).reshape(wide), kept(self.running_mean, x).reshape(wide)
        return sigma * Affine().apply(self, x, x, 1, None) + mean

    def normalize(self, targets: Tensor) -> Tensor:
        """Return (targets - mean) / sigma for targets `(N, C)`."""
        return (targets - self.running_mean) / self.sigma

    @torch.no_grad()
    def update(self, targets: Tensor) -> None:
        """Average the moments of targets `(N, C)`, not a number where there is none; outputs stay as they are.

        Args:
            targets: the targets.

        Raises:
            ArgumentError: they have another number of outputs.
        """
        if targets.ndim != 2 or targets.shape[1] != self.num_features:
            raise ArgumentError(f"targets has shape {tuple(targets.shape)}; expected (N, {self.num_features}).")
        old_mean, old = self.running_mean.clone(), self.sigma
        mean, square = targets.nanmean(0), targets.square().nanmean(0)
        missing = mean.isnan()
        track(
            self,
            self.momentum,
            mean=torch.where(missing, old_mean, mean),
            square=torch.where(missing, self.running_square, square),
        )
        weight, bias, new = self.weight, self.bias, self.sigma
        if weight is not None and bias is not None:
            weight.mul_(old / new)
            bias.mul_(old).add_(old_mean - self.running_mean).div_(new)
