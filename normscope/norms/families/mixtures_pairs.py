"""Two normalizations in one layer: mixed by a gate, pooled, or one after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope.norms.area import Batch, Group
from normscope.norms.average import LOCAL
from normscope.norms.families.mixtures_base import ChannelNorm, RunningNorm, enough, instances, kept, unbiased
from normscope.norms.layer import Norm, Normalization, in_float
from normscope.norms.operation import Standardize
from normscope.norms.part import Traits, positive, require
from normscope.norms.population import Running, keep, track
from normscope.norms.recovery import Affine
from normscope.norms.whiten import Whiten


class BatchInstanceNorm(RunningNorm):
    """Batch-instance normalization: y = weight (gate BN(x) + (1 - gate) IN(x)) + bias, a gate for each channel.

    The gate starts at 1. Keep it within [0, 1]: call `clip` after each step of the optimizer.

    Args:
        num_features: number of channels.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    gate: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register weight, bias, gate and the stored batch statistics."""
        super().__init__(num_features, eps, momentum, affine)
        self.gate = nn.Parameter(torch.ones(num_features))

    @torch.no_grad()
    def clip(self) -> None:
        """Bring the gate back to [0, 1]."""
        self.gate.clamp_(0, 1)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        mean, var = LOCAL.moments(instances(x, self.num_features))
        batch, batch_var = self.batch(x, (mean, var))
        batch_part = self.gate * (batch_var + self.eps).rsqrt()
        part = (1 - self.gate) * (var + self.eps).rsqrt()
        return self.mapped(x, batch_part + part, -(batch * batch_part + mean * part))


class TaskNorm(ChannelNorm):
    """TaskNorm: moments of the context set, pooled with those of each instance or of each example.

    mean = a mean_context + (1 - a) mean_own, var = a (var_context + (mean_context - mean)^2) + (1 - a) (var_own +
    (mean_own - mean)^2), unbiased variances, a = sigmoid(scale n + offset) for a context of n examples. Training takes
    the input for the context and stores its moments; evaluation takes the input for the target and uses the stored
    ones.

    Args:
        num_features: number of channels.
        own: "instance" or "layer".
        eps: added to the variance.
        affine: weight and bias for each channel.
    """

    running_count: Tensor
    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, num_features: int, own: str = "instance", eps: float = 1e-5, affine: bool = True) -> None:
        """Register weight, bias, scale a and offset b, and the moments of the context."""
        super().__init__(num_features, eps, affine)
        require(own, "own", ("instance", "layer"))
        self.own = own
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        keep(self, mean=torch.zeros(num_features), var=torch.ones(num_features), count=torch.ones(1))

    @property
    def traits(self) -> Traits:
        """Those of batch normalization."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize a context set in training, a target set in evaluation, `(N, C, *)`."""
        z = instances(x, self.num_features)
        whole = z if self.own == "instance" else z.unsqueeze(1)
        enough(whole.shape[2:].numel(), x)
        own, biased = LOCAL.moments(whole)
        own_var = unbiased(biased, whole.shape[2:].numel())
        context, var, count = self._context(z, x)
        share = torch.sigmoid(self.a * count + self.b)
        mean = share * context + (1 - share) * own
        blended = share * (var + (context - mean).square()) + (1 - share) * (own_var + (own - mean).square())
        return self.normalized(x, mean, blended)

    def _context(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return kept(self.running_mean, z), kept(self.running_var, z), kept(self.running_count, z)
        b, mean, var = self.moments(x)
        var = self.bessel(var, b)
        count = torch.as_tensor(self.average.count(b)).to(z).reshape(1) / z.shape[2]
        track(self, 1.0, mean=mean, var=var, count=count)
        return mean, var, count


class BatchChannelNorm(Normalization):
    """Batch-channel normalization: batch normalization, then group normalization with an affine map for each group.

    Args:
        num_features: number of channels.
        groups: number of groups of channels.
        eps: added to the variances.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel, then for each group.
    """

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Make the two layers, batch and group; weight and bias are those of the groups."""
        super().__init__()
        self.num_features, self.groups, self.eps, self.momentum, self.affine = (
            num_features,
            groups,
            eps,
            momentum,
            affine,
        )
        recovery = Affine() if affine else None
        self.batch = Norm(Batch(), Standardize(eps), recovery, Running(momentum), num_features=num_features)
        self.group = Norm(Group(groups), Standardize(eps), num_features=num_features)
        Affine(affine, affine).install(self, groups)

    @property
    def traits(self) -> Traits:
        """Those of batch normalization."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        y = self.group(self.batch(x))
        grouped = y.reshape(y.shape[0], self.groups, -1)
        return Affine(self.affine, self.affine).apply(self, grouped, x, 1, None).reshape(x.shape)


class InvariantNorm(Normalization):
    """Invariance-exploiting transform: local scale is divided out, then the batch is whitened, which ignores the basis.

    Each position is divided by the root mean square of all channels in a window around it; the result is centered and
    whitened over the batch within groups of channels.

    Args:
        num_features: number of channels.
        groups: number of groups of channels that are whitened.
        window: size of the window, odd.
        eps: added to mean squares and to the diagonal of the covariance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        groups: int = 1,
        window: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Make the whitening layer."""
        super().__init__()
        positive(eps, "eps")
        require(window % 2, "window % 2", (1,))
        self.num_features, self.groups, self.window, self.eps = num_features, groups, window, eps
        self.momentum, self.affine = momentum, affine
        self.whitening = Norm(
            Batch(groups),
            Whiten("newton", eps),
            Affine() if affine else None,
            Running(momentum),
            num_features=num_features,
        )

    @property
    def traits(self) -> Traits:
        """Those of batch whitening; the local mean is not removed, so that a shift is seen."""
        return Traits(crosses_batch=True, stateful=True, scale_invariant=True)

    @in_float
    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        square = x.square().mean(1, keepdim=True)
        if x.ndim > 2:
            pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3]
            window = [min(self.window, size - (size + 1) % 2) for size in x.shape[2:]]
            square = pool(square, window, 1, [w // 2 for w in window], count_include_pad=False)
        output: Tensor = self.whitening(x * (square + self.eps).rsqrt())
        return output
