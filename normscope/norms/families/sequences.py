"""Batch normalization of sequences: a recurrence over steps, and inputs with padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope.core.errors import ArgumentError
from normscope.norms.affine import scale_shift
from normscope.norms.area import Batch
from normscope.norms.layer import Normalization, in_float
from normscope.norms.part import Traits, positive, require
from normscope.norms.population import keep, track, valid_momentum
from normscope.norms.recovery import Affine


class RecurrentBatchNorm(Normalization):
    """Recurrent batch normalization: batch normalization whose population statistics belong to a step of a sequence.

    y_t = weight (x_t - mean_t) / sqrt(var_t + eps) + bias; weight and bias are shared by all steps, the stored
    statistics are not. Steps past the last use those of the last.

    Args:
        num_features: number of channels.
        steps: number of steps with statistics of their own.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
        init: initial weight; 0.1 keeps the gradient through a recurrence from vanishing.
    """

    def __init__(
        self,
        num_features: int,
        steps: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        init: float = 0.1,
    ) -> None:
        """Register parameters, and buffers `(steps, C)`."""
        super().__init__()
        positive(eps, "eps")
        valid_momentum(momentum)
        self.num_features, self.steps, self.eps, self.momentum = num_features, steps, eps, momentum
        self.affine, self.init = affine, init
        Affine(affine, affine, init).install(self, num_features)
        keep(self, mean=torch.zeros(steps, num_features), var=torch.ones(steps, num_features))
        self.num_batches_tracked = torch.zeros(steps, dtype=torch.long)

    @property
    def traits(self) -> Traits:
        """Those of batch normalization."""
        return Traits(crosses_batch=True, stateful=True, shift_invariant=True, scale_invariant=True)

    @in_float
    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        """Normalize `(N, C, *)` at a step, counted from 0."""
        place = min(step, self.steps - 1)
        z = Batch().split(x)
        if self.training:
            enough(z.shape[2:].numel(), x)
            mean, var = self.average.moments(z)
            self._track(place, z, mean, var)
        else:
            mean, var = self.running_mean[place].unsqueeze(0), self.running_var[place].unsqueeze(0)
        scale = (var + self.eps).rsqrt()
        return Affine(self.affine, self.affine).apply(self, scale_shift(x, scale, -mean * scale), x, 1, None)

    @torch.no_grad()
    def _track(self, place: int, z: Tensor, mean: Tensor, var: Tensor) -> None:
        count = self.average.count(z)
        self.num_batches_tracked[place] += 1
        weight = 1 / float(self.num_batches_tracked[place]) if self.momentum is None else self.momentum
        self.running_mean[place].lerp_(mean[0].to(self.running_mean.dtype), weight)
        self.running_var[place].lerp_((var[0] * (count / (count - 1))).to(self.running_var.dtype), weight)


def enough(samples: int, x: Tensor) -> None:
    """Refuse a batch without variance.

    Args:
        samples: number of samples of each statistic.
        x: the input, for the message.

    Raises:
        ArgumentError: there are fewer than two.
    """
    if samples < 2:
        raise ArgumentError(
            f"x of shape {tuple(x.shape)} gives {samples} sample to each statistic; use two, or evaluation mode."
        )


class BatchNormLSTMCell(nn.Module):
    """An LSTM cell with recurrent batch normalization of both products and of the cell's output.

    (f, i, o, g) = BN(W_h h) + BN(W_x x) + b; c = sigmoid(f) c + sigmoid(i) tanh(g); h = sigmoid(o) tanh(BN(c)).

    Args:
        input_size: number of inputs.
        hidden_size: number of units.
        steps: number of steps with statistics of their own.
    """

    def __init__(self, input_size: int, hidden_size: int, steps: int = 1) -> None:
        """Make the two linear maps and the three normalizations; the first two share one bias."""
        super().__init__()
        self.input_size, self.hidden_size, self.steps = input_size, hidden_size, steps
        self.input = nn.Linear(input_size, 4 * hidden_size, bias=False)
        self.hidden = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        nn.init.orthogonal_(self.hidden.weight)
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))
        self.input_norm, self.hidden_norm = (RecurrentBatchNorm(4 * hidden_size, steps) for _ in range(2))
        for norm in (self.input_norm, self.hidden_norm):
            norm.bias = None
        self.cell_norm = RecurrentBatchNorm(hidden_size, steps)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, Tensor]:
        """Advance `(N, input_size)` and the state (h, c), each `(N, hidden_size)`, by one step."""
        h, c = state
        gates = self.hidden_norm(self.hidden(h), step) + self.input_norm(self.input(x), step) + self.bias
        forget, enter, leave, new = gates.chunk(4, 1)
        c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(leave) * torch.tanh(self.cell_norm(c, step)), c


class SequenceBatchNorm(Normalization):
    """Batch normalization of the input of a recurrence, `(N, T, C)`, without the padding.

    Args:
        num_features: number of channels.
        per: "sequence" for statistics over batch and time, "frame" over the batch at each step.
        eps: added to the variance.
        momentum: weight of the newest batch, None for a plain average.
        affine: weight and bias for each channel.
    """

    def __init__(
        self,
        num_features: int,
        per: str = "sequence",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        """Register parameters and buffers."""
        super().__init__()
        positive(eps, "eps")
        valid_momentum(momentum)
        require(per, "per", ("sequence", "frame"))
        self.num_features, self.per, self.eps, self.momentum, self.affine = num_features, per, eps, momentum, affine
        Affine(affine, affine).install(self, num_features)
        keep(self, mean=torch.zeros(num_features), var=torch.ones(num_features))

    @property
    def traits(self) -> Traits:
        """Those of batch normalization."""
        return Traits(
            crosses_batch=True,
            stateful=True,
            shift_invariant=True,
            scale_invariant=True,
            ranks=(3,),
            channels_last=True,
        )

    @in_float
    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Normalize `(N, T, C)`.

        Args:
            x: the sequences.
            lengths: number of steps `(N,)` before the padding, None for all; what follows becomes 0.

        Returns:
            `(N, T, C)`.
        """
        if lengths is None and self.per == "sequence":
            return self._whole(x)
        steps = torch.arange(x.shape[1], device=x.device)
        valid = torch.ones_like(x[..., 0]) if lengths is None else (steps < lengths[:, None]).to(x)
        if self.training:
            mean, var = self._measure(x, valid)
        else:
            mean, var = self.running_mean, self.running_var
        y = (x - mean) * (var + self.eps).rsqrt()
        return Affine(self.affine, self.affine).apply(self, y, x, -1, None) * valid.unsqueeze(-1)

    def _whole(self, x: Tensor) -> Tensor:
        """Normalize sequences without padding."""
        flat = x.flatten(0, 1)
        mean, var = self.running_mean.unsqueeze(0), self.running_var.unsqueeze(0)
        if self.training:
            z = Batch().split(flat)
            enough(len(flat), x)
            mean, var = self.average.moments(z)
            count = self.average.count(z)
            track(self, self.momentum, mean=mean, var=var * (count / (count - 1)))
        scale = (var + self.eps).rsqrt()
        y = scale_shift(flat, scale, -mean * scale)
        return Affine(self.affine, self.affine).apply(self, y, flat, 1, None).reshape(x.shape)

    def _measure(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance, `(C,)` or `(T, C)`, and store their averages over time."""
        whole = self.per == "sequence"
        z = x.flatten(0, 1).mT.unsqueeze(0) if whole else x.permute(1, 2, 0)
        mask = valid.flatten()[None, None] if whole else valid.mT.unsqueeze(1)
        part = self.average.mean(mask)
        count = part * self.average.count(z)
        enough(int(count.detach().max()), x)
        share = part.clamp_min(torch.finfo(x.dtype).tiny)
        mean = self.average.mean(z * mask) / share
        var = self.average.mean((z - mean.unsqueeze(-1)).square() * mask) / share
        unbiased = var * (count / (count - 1).clamp_min(1))
        track(self, self.momentum, mean=mean.mean(0), var=unbiased.mean(0))
        return mean.squeeze(0), var.squeeze(0)
