"""Normalization layers: the statistics they compute, those they keep, and how much eps weighs against them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from normscope.norms.recognize import NormParts
from normscope.probes.summary import Row, channel_row

AREAS = 256  # areas (tokens, or samples x groups) looked at per step, at a fixed stride
MAX_CHANNELS = 4096  # wider layers, and longer gains and biases, keep scalars only
_COUNTER = "num_batches_tracked"
_TINY = 1e-300


@dataclass
class Calls:
    """How often a normalization layer ran in a step, and how.

    Attributes:
        calls: training forwards, with gradient.
        recomputed: forwards inside a backward pass (activation checkpointing).
        silent: forwards in training mode without gradient.
        training: whether its last training forward was in training mode.
        batch: first dimension of its last input.
    """

    calls: int = 0
    recomputed: int = 0
    silent: int = 0
    training: bool = True
    batch: int = 0


class Normalization:
    """Turns the states of normalization layers into rows.

    Args:
        norms: their parts, by name.
        modules: the watched modules, by name.
        on_site: called with a site and its attributes when it is first seen.
    """

    def __init__(
        self,
        norms: Mapping[str, NormParts],
        modules: Mapping[str, nn.Module],
        on_site: Callable[[str, dict[str, object]], None],
    ) -> None:
        """Start with no layer seen; see the class."""
        self._norms, self._modules, self._on_site = norms, modules, on_site
        self._before: dict[str, np.ndarray] = {}

    def vectors(self) -> dict[str, torch.Tensor]:
        """Return gains, biases and counters of batches by site."""
        found: dict[str, torch.Tensor] = {}
        for name, parts in self._norms.items():
            for part in (parts.gain, parts.bias, _COUNTER if parts.has_running else None):
                tensor = _held(self._modules[name], part) if part else None
                if isinstance(tensor, torch.Tensor) and tensor.numel() <= MAX_CHANNELS:
                    found[f"{name}/{part}"] = tensor.detach()
        return found

    def running(self) -> dict[str, torch.Tensor]:
        """Return a copy of the running statistics of every layer that has them, [2, C]."""
        return {name: running(self._modules[name]) for name, parts in self._norms.items() if parts.has_running}

    def rows(
        self,
        inputs: Mapping[str, np.ndarray],
        owners: Mapping[str, str],
        running: Mapping[str, np.ndarray],
        calls: Mapping[str, Calls],
        vectors: Mapping[str, np.ndarray],
    ) -> list[Row]:
        """Return rows of layers' inputs and of running statistics.

        Args:
            inputs: [3, areas or channels] count, mean, M2 of each input site.
            owners: name of the layer of each input site.
            running: [2, C] running mean and variance of each layer.
            calls: how the layers were called.
            vectors: `vectors()` on the host.

        Returns:
            Rows of sites "layer/input" and "layer/running".
        """
        rows = []
        for site, (count, mean, m2) in inputs.items():
            name = owners[site]
            parts, variance = self._norms[name], m2 / count
            stats = {"mean": mean, "var": variance}
            if parts.eps is not None:
                stats["eps_weight"] = eps_weight(mean, variance, parts.eps, parts.kind == "rms")
            batch = calls[name].batch if name in calls else math.nan
            rows.append(channel_row(site, "value", stats, {"count": float(count[0]), "batch": batch}))
        for name, (mean, variance) in running.items():
            updates = float(vectors.get(f"{name}/{_COUNTER}", np.nan))
            rows.append(
                self._running(name, mean, variance, inputs.get(f"{name}/input"), calls.get(name, Calls()), updates)
            )
        return rows

    def _running(
        self, name: str, mean: np.ndarray, variance: np.ndarray, batch: np.ndarray | None, calls: Calls, updates: float
    ) -> Row:
        site = f"{name}/running"
        if name not in self._before:
            self._on_site(site, {"module": name, "call": 0, "slot": "running", **attributes(self._norms[name])})
        stats = {"mean": mean, "var": variance}
        if batch is not None and self._norms[name].kind == "batch" and batch.shape[1] == len(mean):
            count, batch_mean, m2 = batch
            stats["drift"] = drift(batch_mean, m2 / np.maximum(count - 1, 1), mean, variance)
        now = np.stack((mean, variance))
        before, self._before[name] = self._before.get(name), now
        scalars = {
            "updates": updates,
            "calls": calls.calls,
            "recomputed": calls.recomputed,
            "silent": calls.silent,
            "training": float(calls.training) if calls.calls else math.nan,
            "change": math.nan if before is None else change(before, now),
        }
        return channel_row(site, "value", stats, scalars)


def _held(module: nn.Module, name: str) -> object:
    """Return a parameter, buffer or attribute as it lies; a parametrized one would be computed, which may be random."""
    return module._parameters.get(name, module._buffers.get(name, vars(module).get(name)))


def change(before: np.ndarray, now: np.ndarray) -> float:
    """Return the relative change of running statistics: |d mean| / |std| + |d var| / |var|, Euclidean over channels.

    Args:
        before: [2, C] running mean and variance at the sampled step before.
        now: [2, C] the present ones.

    Returns:
        0 where nothing moved.
    """
    moved = np.linalg.norm(now - before, axis=1)
    spread = math.sqrt(float(np.abs(now[1]).sum()))
    return float(moved[0] / max(spread, _TINY) + moved[1] / max(float(np.linalg.norm(now[1])), _TINY))


def attributes(parts: NormParts) -> dict[str, object]:
    """Return what the record keeps of a normalization layer's parts."""
    return {
        "norm": parts.kind,
        "eps": parts.eps,
        "momentum": parts.momentum,
        "groups": parts.groups,
        "has_running": parts.has_running,
        "gain": parts.gain,
        "gain_offset": parts.gain_offset,
    }


@torch.no_grad()
def running(module: nn.Module) -> torch.Tensor:
    """Return a copy of the running mean and variance, [2, C], or [2, s C] of a layer that keeps s sets of them."""
    mean, variance = module.running_mean, module.running_var
    return torch.stack((mean.detach().reshape(-1), variance.detach().reshape(-1)))  # type: ignore[operator]  # buffers


@torch.no_grad()
def areas(x: torch.Tensor, parts: NormParts, channels: int | None = None) -> torch.Tensor | None:
    """Return mean and variance over the layer's own areas, on at most `AREAS` of them.

    Layer and RMS norms: an area is a token, the normalized trailing dimensions; group and instance norms: a sample and
    group.

    Args:
        x: input of the layer.
        parts: its parts.
        channels: number of channels, by which instance norm tells an input without batch dimension.

    Returns:
        [3, areas]: size of an area, mean, M2 of each; None where another argument says what belongs to a sample, as in
        graph networks.
    """
    if parts.kind == "instance":
        if channels == x.shape[0] and channels != x.shape[1]:
            x = x[None]
        if x.dim() < 3:
            return None
    if parts.kind in ("group", "instance"):
        groups = parts.groups or (x.shape[1] if parts.kind == "instance" else 1)
        rows = x.reshape(x.shape[0] * groups, -1)
    elif parts.axis == -1:
        rows = x.reshape(-1, x.shape[x.dim() - max(parts.normalized_ndim, 1) :].numel())
    else:
        rows = x.movedim(parts.axis, -1).flatten(0, -2)
    rows = rows[:: -(-len(rows) // AREAS)]
    rows = rows if rows.dtype == torch.float64 else rows.to(torch.float32)
    mean = rows.mean(1)
    m2 = (rows - mean[:, None]).square_().sum(1)
    return torch.stack((torch.full_like(mean, rows.shape[1]), mean, m2))


def merge_areas(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Keep the areas of the first of several passes: a step's areas stay bounded."""
    return a


def eps_weight(mean: np.ndarray, variance: np.ndarray, eps: float, rms: bool) -> np.ndarray:
    """Return eps / (v + eps), v the variance, or the mean square for a layer that does not center.

    Args:
        mean: means of the areas.
        variance: biased variances of the areas.
        eps: the layer's eps.
        rms: whether the layer divides by the root mean square.

    Returns:
        The fraction of the denominator that is eps: 0 normal, 1 when the layer no longer normalizes.
    """
    power = variance + mean**2 if rms else variance
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(eps > 0, eps / (power + eps), np.where(power > 0, 0.0, np.nan))


def drift(mean: np.ndarray, variance: np.ndarray, running_mean: np.ndarray, running_var: np.ndarray) -> np.ndarray:
    """Return the Kullback-Leibler divergence of the batch's Gaussian from the running one, per channel, in nats.

    KL = 1/2 [ln(var_r / var_b) + (var_b + (mean_b - mean_r)^2) / var_r - 1]

    Args:
        mean: batch means.
        variance: batch variances, unbiased, as the running ones are.
        running_mean: running means.
        running_var: running variances.

    Returns:
        KL per channel: 0 where both agree, infinite where one variance is 0 and the other is not, NaN where both are.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = variance / running_var
        divergence = 0.5 * (ratio - np.log(ratio) + (mean - running_mean) ** 2 / running_var - 1)
    return np.where(np.isinf(ratio), np.inf, divergence)
