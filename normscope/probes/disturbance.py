"""Stochastic normalization disturbance (SND): how far the output of a sample moves with the batch that it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from normscope.core.errors import ArgumentError
from normscope.core.estimate import Estimate, Status
from normscope.linalg.protect import undisturbed
from normscope.norms.layer import Norm
from normscope.norms.recognize import NormParts, find_norms
from normscope.norms.recovery import Affine

POINTS = 64  # samples whose outputs are followed
_SHARE = 32  # one of so many members of a batch is followed: what they take from the noise is put back

Run = Callable[[torch.Tensor], torch.Tensor]


class Disturbance(NamedTuple):
    """What resampling has shown.

    Attributes:
        value: mean disturbance of the samples followed; NaN or infinite where an output is.
        error: its standard error: from the spread over samples, and from that over batches, which samples share.
        scale: root of the mean squared norm of their mean outputs.
        n: samples followed.
    """

    value: float
    error: float
    scale: float
    n: int


def snd(
    norm: nn.Module | Run,
    samples: torch.Tensor,
    batch_size: int,
    draws: int = 100,
    *,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return the stochastic normalization disturbance of a layer or a model.

    Delta(x) = (1/s) sum_i || G(x; B_i) - (1/s) sum_j G(x; B_j) ||_2 over s batches that hold x, averaged over samples
    x; times sqrt(s / (s - 1)), so that few draws do not make it small. The other members of a batch are drawn from the
    samples with replacement, so that batches of any size are independent draws. G is the layer in training mode without
    its affine map; in a model the normalization layers are in training mode, all else in evaluation mode. Randomness
    of other origin is the same in every draw. Exactly 0 where the batch does not matter. For Gaussian input of d
    independent features: BatchNorm sqrt(3 d / (2 B)), ZCA sqrt((d + d (d + 1) / 4) / B), Cholesky sqrt((d + d^2 / 2) /
    B), PCA about sqrt(d) whatever B. An argument that cannot work is an ArgumentError.

    Args:
        norm: the layer or model, a module or a function of one batch; left as it was, with its running statistics.
        samples: [N, ...] the population that batches are drawn from.
        batch_size: samples in a batch, B.
        draws: batches that each sample is seen in, s.
        generator: source of the draws; one of its own by default, so that equal calls give equal numbers.

    Returns:
        The mean over `POINTS` of the samples, in units of the output, with its standard error.

    Source: S150 (SBW, section 3), S149 (IterNorm, section 3.3).

    >>> x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    >>> snd(nn.LayerNorm(8), x, batch_size=64, draws=10).value
    0.0
    """
    _check(norm, samples, batch_size, draws)
    draw = torch.Generator().manual_seed(0) if generator is None else generator
    points = torch.randperm(len(samples), generator=draw)[:POINTS]
    with _resampled(norm, samples.device) as run:
        found = disturbance(run, samples, points, batch_size, draws, max(1, batch_size // _SHARE), draw)
    status = Status.SAMPLED if np.isfinite(found.value) else Status.NON_FINITE
    return Estimate(found.value, found.error, unit="output", n=found.n, status=status, source="S150")


def disturbance(
    run: Run,
    samples: torch.Tensor,
    points: torch.Tensor,
    batch_size: int,
    draws: int,
    share: int,
    generator: torch.Generator,
) -> Disturbance:
    """Run samples in many batches and measure how far their outputs move.

    `share` of the points stand in the same batches, with batch_size - share companions drawn anew each time; what that
    takes from the noise, sqrt((batch_size - share) / (batch_size - 1)), is put back.

    Args:
        run: from a batch to its outputs, a row a sample.
        samples: [N, ...] what companions are drawn from.
        points: positions of the samples that are followed.
        batch_size: samples in a batch, at least 2.
        draws: batches a point, at least 2.
        share: points in the same batches, less than batch_size.
        generator: source of the draws.

    Returns:
        The mean disturbance.
    """
    over_points, over_draws, squares = [], [], []
    for group in torch.split(points, share):
        here = samples[group.to(samples.device)]
        outputs = torch.stack([_draw(run, samples, here, batch_size, generator) for _ in range(draws)])
        moved = (outputs - outputs[0]).double()  # equal outputs differ by exactly 0, which a mean of them may not
        lost = (batch_size - 1) / max(batch_size - len(group), 1) * draws / (draws - 1)
        distance = torch.linalg.vector_norm(moved - moved.mean(0), dim=2) * lost**0.5
        over_points.append(distance.mean(0))
        over_draws.append(distance.mean(1))
        squares.append(outputs.double().mean(0).square().sum(1))
    each, shared, square = (torch.cat(some) for some in (over_points, over_draws, squares))
    error = (each.var() / len(each) + shared.var() / len(shared)) ** 0.5
    return Disturbance(float(each.mean()), float(error), float(square.mean()) ** 0.5, len(each))


def without_affine(norm: nn.Module, parts: NormParts) -> dict[str, torch.Tensor]:
    """Return a gain and a bias that do nothing, by name, in place of those of a layer; none for a richer recovery."""
    if isinstance(norm, Norm) and type(norm.recovery) is not Affine:
        return {}
    held = dict(norm.named_parameters(recurse=False)) | dict(norm.named_buffers(recurse=False))
    values = {parts.gain: 1.0 - parts.gain_offset, parts.bias: 0.0}
    return {name: torch.full_like(held[name], value) for name, value in values.items() if name in held}


def runner(module: nn.Module, fixed: dict[str, torch.Tensor], device: torch.device) -> Run:
    """Return a function that runs a module from the same buffers and the same random state each time.

    Args:
        module: the module.
        fixed: tensors in place of its own, by name.
        device: device of the input.

    Returns:
        From a batch to a copy of the outputs.
    """
    state = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def run(batch: torch.Tensor) -> torch.Tensor:
        torch.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        output: torch.Tensor = functional_call(module, buffers | fixed, (batch,))
        return output

    return run


@contextmanager
def _resampled(norm: nn.Module | Run, device: torch.device) -> Iterator[Run]:
    """Yield the layer, model or function as one to be run on many batches; restore it at the end."""
    module = norm if isinstance(norm, nn.Module) else nn.Identity()
    with undisturbed(module):
        if not isinstance(norm, nn.Module):
            yield norm
            return
        layers = find_norms(norm)
        for name, part in norm.named_modules():
            part.training = not layers or any(
                name == layer or not layer or name.startswith(f"{layer}.") for layer in layers
            )
        fixed = without_affine(norm, layers[""]) if "" in layers else {}
        yield runner(norm, fixed, device)


def _draw(
    run: Run, samples: torch.Tensor, here: torch.Tensor, batch_size: int, generator: torch.Generator
) -> torch.Tensor:
    """Return [points, features], the outputs of some points beside companions drawn anew."""
    others = torch.randint(len(samples), (batch_size - len(here),), generator=generator, device=generator.device)
    outputs = run(torch.cat((here, samples[others.to(samples.device)])))
    return outputs[: len(here)].detach().reshape(len(here), -1).clone()


def _check(norm: object, samples: object, batch_size: object, draws: object) -> None:
    if not callable(norm):
        raise ArgumentError(f"norm={norm!r} must be a torch.nn.Module or a function of one batch.")
    if not isinstance(samples, torch.Tensor) or not samples.is_floating_point() or samples.dim() < 2:
        shown = tuple(samples.shape) if isinstance(samples, torch.Tensor) else type(samples).__name__
        raise ArgumentError(f"samples={shown} must be a floating-point tensor [N, ...], as torch.randn(4096, 16).")
    if len(samples) < 2:
        raise ArgumentError(f"samples holds {len(samples)}, too few to draw batches from; pass some thousand.")
    for name, value in (("batch_size", batch_size), ("draws", draws)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            raise ArgumentError(f"{name}={value!r} must be a whole number, at least 2; try {name}=64.")
