"""Adaptation: a trained model meets data of another domain, and its norms are all that changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normscope.core.errors import ArgumentError, brief
from normscope.linalg.protect import undisturbed
from normscope.norms.conversion import swap
from normscope.norms.part import require
from normscope.norms.recalibration import recalibrate

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def adabn(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    progress: bool = True,
) -> nn.Module:
    """Return a copy whose norms use the statistics of a target domain; weights, gains and biases stay (AdaBN).

    Each norm is given mean and variance of its input over all samples of the target domain together; labels are not
    needed. Source: li2016, algorithm 1; S168 does the same with few corrupted images.

    Args:
        model: a trained model; it stays as it is.
        batches: batches of the target domain, as for `normscope.norms.recalibrate`.
        forward: as there.
        progress: as there.

    Returns:
        The copy, in the modes of the model. If nothing can be measured this is an ArgumentError.
    """
    return recalibrate(copy.deepcopy(model), batches, forward, progress=progress)


class MixedNorm(nn.Module):
    """Batch normalization with a mixture of stored statistics and those of the batch, in both modes.

    mean = p mean_s + (1 - p) mean_t,    var = p var_s + (1 - p) var_t,    p = N / (N + n)

    with n the size of the batch and var_t its unbiased variance. Source: schneider2020.

    Args:
        norm: a norm of torch with stored statistics, whose parameters and buffers are taken over.
        source_samples: pseudo-count N of the stored statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: _BatchNorm, source_samples: float) -> None:
        """Take the parts over."""
        super().__init__()
        self.eps, self.num_features, self.source_samples = norm.eps, norm.num_features, source_samples
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(N, C, *)`."""
        p = self.source_samples / (self.source_samples + len(x))
        var, mean = torch.var_mean(x, (0, *range(2, x.ndim)))
        mean, var = self.running_mean.lerp(mean, 1 - p), self.running_var.lerp(var, 1 - p)
        scale = (var + self.eps).rsqrt() if self.weight is None else self.weight * (var + self.eps).rsqrt()
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        wide = (-1, *(1,) * (x.ndim - 2))
        return x * scale.reshape(wide) + shift.reshape(wide)

    def extra_repr(self) -> str:
        """Return the number of channels and the pseudo-count."""
        return f"{self.num_features}, source_samples={self.source_samples:g}"


def prediction_time(model: nn.Module, source_samples: float = 0.0) -> nn.Module:
    """Return a copy whose batch norms use statistics of each batch at inference, alone or mixed with the stored ones.

    Source: nado2020 for batch statistics alone; schneider2020 for the mixture, which helps small batches: try 16.

    Args:
        model: a trained model; it stays as it is.
        source_samples: how many samples the stored statistics count as, see `MixedNorm`; 0 leaves them out.

    Returns:
        The copy, in evaluation mode; nothing is stored when it runs.

    Raises:
        ArgumentError: the model has no batch norm of torch with stored statistics, or source_samples is negative.
    """
    if not 0 <= source_samples < float("inf"):
        raise ArgumentError(f"source_samples={source_samples!r} must be a number of samples, at least 0; try 16.")
    copied = copy.deepcopy(model).eval()
    norms = [norm for norm in _batch_norms(copied) if norm.running_mean is not None]
    if not norms:
        raise ArgumentError(f"model={type(model).__name__} has no batch norm of torch with stored statistics.")
    if source_samples:
        return swap(copied, {norm: MixedNorm(norm, source_samples) for norm in norms})
    for norm in norms:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return copied


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of softmax predictions, -sum_c p_c log p_c, in nats.

    Args:
        logits: `[N, classes]`.

    Returns:
        `[N]`.

    >>> entropy(torch.zeros(1, 2)).item().__round__(4)
    0.6931
    """
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of Tent: Adam, lr 1e-3, betas (0.9, 0.999), no decay."""
    return torch.optim.Adam(parameters, lr=1e-3)


class Tent(nn.Module):
    """Test entropy minimization: each batch is predicted, and then moves gains and biases toward lower entropy.

    Norms use the statistics of the batch; everything but their gains and biases stays. Predictions are those before the
    last update of the batch. Source: S169 (Tent), section 3.

    Args:
        model: a classifier with batch norms; a copy is adapted, the model stays as it is.
        optimizer: makes the optimizer from gains and biases, `adam` by default.
        steps: updates a batch.
        episodic: forget all updates before each batch.

    Attributes:
        model: the copy that adapts.

    Raises:
        ArgumentError: there is no batch norm with a gain, or steps is below 1.
    """

    def __init__(
        self, model: nn.Module, optimizer: MakeOptimizer = adam, *, steps: int = 1, episodic: bool = False
    ) -> None:
        """Copy the model and free its gains and biases alone."""
        super().__init__()
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ArgumentError(f"steps={brief(steps)} must be a number of updates a batch, at least 1.")
        self.model = prediction_time(model).requires_grad_(False)
        self._free = [p for norm in _batch_norms(self.model) for p in (norm.weight, norm.bias) if p is not None]
        if not self._free:
            raise ArgumentError(f"model={type(model).__name__} has no batch norm with gain and bias to adapt.")
        for p in self._free:
            p.requires_grad_(True)
        self.steps, self.episodic = steps, episodic
        self._make, self._optimizer = optimizer, optimizer(self._free)
        self._start = [p.detach().clone() for p in self._free]

    def forward(self, x: Tensor) -> Tensor:
        """Predict a batch, then adapt to it.

        Args:
            x: what the model takes.

        Returns:
            Logits `[N, classes]`, without a graph.
        """
        if self.episodic:
            self.reset()
        with torch.inference_mode(False), torch.enable_grad():
            for _ in range(self.steps):
                logits: Tensor = self.model(x)
                loss = entropy(logits).mean()
                if not torch.isfinite(loss):  # an empty batch, or one with NaN, would spoil the gains for good
                    break
                gradients = torch.autograd.grad(loss, self._free)
                for p, gradient in zip(self._free, gradients, strict=True):
                    p.grad = gradient
                self._optimizer.step()
        return logits.detach()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all updates, those of the optimizer too."""
        for p, start in zip(self._free, self._start, strict=True):
            p.copy_(start)
        self._optimizer = self._make(self._free)

    def train(self, mode: bool = True) -> Tent:
        """Stay in evaluation mode, so that nothing is dropped at random."""
        super().train(False)
        return self


def domain_statistics(
    model: nn.Module,
    layer: str,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Tensor:
    """Return mean and variance of a layer's channels for each batch: batches of one domain lie together (AdaBN).

    Source: li2016, section 3.1 and figure 1.

    Args:
        model: a model; it runs in evaluation mode and stays as it is.
        layer: path of a module with a tensor `(N, C, *)` as output.
        batches: batches of one domain.
        forward: function of model and batch; by default the model is called with the batch, or its first entry.

    Returns:
        `[batches, 2 C]`: C means, then C variances.

    Raises:
        ArgumentError: no batch reaches the layer, or the model has none of that path.
    """
    modules = dict(model.named_modules())
    require(layer, "layer", modules)
    found: list[Tensor] = []
    with undisturbed(model):
        for module in model.modules():
            module.training = False
        module, plain = modules[layer], modules[layer].forward

        def heard(*arguments: Any, **named: Any) -> Any:
            output = plain(*arguments, **named)
            var, mean = torch.var_mean(output, (0, *range(2, output.ndim)), correction=0)
            found.append(torch.cat((mean, var)))
            return output

        module.forward = heard  # no hook: the forward of the instance stands before that of its class
        for batch in batches:
            (forward or _call)(model, batch)
    if not found:
        raise ArgumentError(f"batches: no batch reached layer={layer!r}; pass at least one, not used up.")
    return torch.stack(found)


def _call(model: nn.Module, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _batch_norms(model: nn.Module) -> Iterator[Any]:
    return (cast(Any, module) for module in model.modules() if isinstance(module, _BatchNorm))
