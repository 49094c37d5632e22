"""Covariance: second moments of inputs and of output gradients, reduced in the hook to what their eigenvalues need.

Those of a linear or convolutional layer are the two factors of K-FAC. A state holds d features and one of three
reductions: the samples themselves [m, d] while they are no more than the matrix would be; the matrix, [1, d + 2, d]
with rows scatter about the mean, mean, count; or, for layers wider than `WIDEST`, a sketch [1, k + 2, d] with rows S w
for k fixed Gaussian w (S = sum x x^T), sum, and count and sum |x|^2. Positions of a convolution are samples. States of
two sets of samples merge to the state of both. On request the patches that a convolution's kernel sees are samples
too: their second moment is the factor of K-FAC proper, with a feature for each channel and tap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

WIDEST = 1024  # features of which all eigenvalues are taken: 0.11 s of one core, and eight times as much per doubling
PERCENTS = (50, 80, 90, 95, 100)
_PROBES, _HELD = 40, 8  # directions of a sketch, and of these those that tell its error
_MOST_PATCHED = 1 << 24  # values of patches laid out at once, 64 MB
_FLOOR = 4 * float(np.finfo(np.float32).eps)  # relative size of eigenvalues that rounding makes of zeros: below 1 eps
_SAMPLES_FLOOR = 1e-12  # the same where the samples are kept: only their own rounding, squared


class Spectra(NamedTuple):
    """What the eigenvalues of a state say.

    Attributes:
        scalars: by name; "moment.*" of the second moment, "covariance.*" of the one about the mean.
        arrays: eigenvalues, descending, by "moment" and "covariance"; those of a sketch are its estimates.
    """

    scalars: dict[str, float]
    arrays: dict[str, np.ndarray]


def is_measured(module: nn.Module) -> bool:
    """Tell whether a module is a linear or convolutional layer, transposed and parametrized ones included."""
    return isinstance(module, (nn.Linear, _ConvNd))


def has_patches(module: nn.Module) -> bool:
    """Tell whether a module is a convolution, neither transposed nor grouped, of patches of at most `WIDEST` values."""
    if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd) or module.groups > 1:
        return False
    return module.in_channels * math.prod(module.kernel_size) <= WIDEST


@torch.no_grad()
def patches(module: _ConvNd, x: torch.Tensor) -> torch.Tensor:
    """Return what the kernel of a convolution is multiplied with at each position, padding included.

    Args:
        module: a convolution with `has_patches`.
        x: its input, with or without a batch.

    Returns:
        [positions of images, channels * taps], in the order of the flattened kernel; of as many images, at least one,
        as keep it near `_MOST_PATCHED` values.
    """
    axes = len(module.kernel_size)
    x = x[None] if x.dim() == axes + 1 else x
    values = x.shape[1:].numel() * math.prod(module.kernel_size) // math.prod(module.stride)
    x = x[: max(1, _MOST_PATCHED // max(1, values))]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode)
    for axis, (size, stride, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True), 2):
        x = x.unfold(axis, (size - 1) * gap + 1, stride)[..., ::gap]
    return x.movedim(1, 1 + axes).flatten(1 + axes).flatten(0, axes)


@torch.no_grad()
def observe(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the state of one tensor, a copy.

    Args:
        x: a strided tensor that is not empty.
        axis: its feature axis; every other position is a sample.

    Returns:
        The state, in float32, or float64 for float64 input and where float32 products are rounded (TF32).
    """
    wide = torch.float64 if x.dtype == torch.float64 or not _exact_products() else torch.float32
    if x.dim() < 2:
        x, axis = x.reshape(1, -1), -1
    last = axis % x.dim() == x.dim() - 1
    features = x.reshape(-1, x.shape[-1]).T if last else x.movedim(axis, 0).reshape(x.shape[axis], -1)
    if features.shape[1] <= most_samples(features.shape[0]):
        return features.T.to(wide).clone(memory_format=torch.contiguous_format)
    return reduced(features.to(wide))


@torch.no_grad()
def merge(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Merge the states of two sets of samples of the same features; associative up to rounding.

    Args:
        a: a state.
        b: a state.

    Returns:
        The state of both sets together.
    """
    width = a.shape[-1]
    if a.dim() == b.dim() == 2:
        joined = torch.cat((a, b))
        return joined if len(joined) <= most_samples(width) else reduced(joined.T)
    a, b = (reduced(state.T) if state.dim() == 2 else state for state in (a, b))
    if width > WIDEST:
        return a + b
    (scatter, mean, count), (other, other_mean, other_count) = _parts(a), _parts(b)
    delta, total = other_mean - mean, count + other_count
    scatter = scatter + other + torch.outer(delta * (count * other_count / total), delta)
    return torch.cat((scatter, (mean + delta * (other_count / total))[None], total[None]))[None]


def _parts(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return state[0, :-2], state[0, -2], state[0, -1]


def most_samples(width: int) -> int:
    """Return how many samples are kept as they are: no more memory than the matrix of `WIDEST` features takes."""
    return min(width, WIDEST**2 // width)


@torch.no_grad()
def reduced(features: torch.Tensor) -> torch.Tensor:
    """Reduce samples [d, m] to a matrix or a sketch."""
    width, count = features.shape
    with torch.autocast(features.device.type, enabled=False):
        if width <= WIDEST:
            mean = features.mean(1)
            centered = features - mean[:, None]
            return torch.cat((centered @ centered.T, mean[None], torch.full_like(mean, count)[None]))[None]
        directions = _directions(width).to(features)
        facts = features.new_zeros(width)
        facts[0], facts[1] = count, torch.linalg.vector_norm(features).square()
        return torch.cat(((features @ (features.T @ directions)).T, features.sum(1)[None], facts[None]))[None]


@lru_cache(maxsize=8)
def _directions(width: int) -> torch.Tensor:
    """Return the directions [d, k] of a sketch, the same at every call: drawn from a generator of their own."""
    return torch.randn(width, _PROBES, generator=torch.Generator().manual_seed(width))


def _exact_products() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by backend, which only the new settings can tell
        return False


# ---- on the host -----------------------------------------------------------------------------------------------------


@np.errstate(all="ignore")  # a diverged run holds infinities
def spectra(state: np.ndarray, factor: float = 1.0) -> Spectra:
    """Return the eigenvalues of a state and what they say.

    Of the second moment (1/m) sum x x^T and of the covariance: `max`, `trace`, `participation` (trace^2 over the sum of
    squared eigenvalues), `rank` (eigenvalues above rounding) and `p50` to `p100`, the ceil(p d)-th largest eigenvalue,
    0 beyond the rank. A sketch has instead of rank and p the `error`: the largest eigenvalue lies between `max` and
    `max + error`.

    Args:
        state: a state on the host.
        factor: what the samples are multiplied by.

    Returns:
        Scalars and eigenvalues; all NaN where a sample is NaN or infinite. With `samples` m and `width` d.
    """
    width = state.shape[-1]
    scalars: dict[str, float] = {"samples": count(state), "width": float(width)}
    arrays: dict[str, np.ndarray] = {}
    if state.ndim == 3 and width > WIDEST:
        for name, (values, trace, square, error) in _nystrom(state[0]).items():
            numbers = {"max": values[0], "trace": trace, "error": error}
            scalars |= {f"{name}.{key}": float(value) * factor**2 for key, value in numbers.items()}
            scalars[f"{name}.participation"] = _participation(trace, square)
            arrays[name] = values * factor**2
        return Spectra(scalars, arrays)
    floor = _FLOOR if state.ndim == 3 else _SAMPLES_FLOOR
    found = {name: _eigenvalues(matrix) * factor**2 for name, matrix in _matrices(state)}
    for name in ("moment", "covariance"):
        arrays[name] = found[name]
        scalars |= {f"{name}.{key}": value for key, value in _numbers(found[name], width, floor).items()}
    return Spectra(scalars, arrays)


@np.errstate(all="ignore")
def correlation(state: np.ndarray) -> np.ndarray:
    """Return the correlations between features, row by row.

    Args:
        state: a state on the host that is no sketch.

    Returns:
        [d * d]; NaN beside a feature that does not vary.
    """
    centered = state - state.mean(0)
    covariance = centered.T @ centered if state.ndim == 2 else state[0, :-2]
    deviation = np.sqrt(np.diag(covariance))
    found: np.ndarray = np.clip(covariance / np.outer(deviation, deviation), -1, 1).ravel()
    return found


def count(state: np.ndarray) -> float:
    """Return the number of samples of a state on the host."""
    return float(len(state) if state.ndim == 2 else state[0, -1, 0])


def holds_matrix(state: np.ndarray, widest: int) -> bool:
    """Tell whether the correlations of all features can be computed, and there are no more of these than `widest`."""
    return int(state.shape[-1]) <= min(widest, WIDEST)


def _matrices(state: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield matrices with the eigenvalues that are not zero for lack of samples: of samples those of X X^T / m.

    One at a time, each to be used before the next is asked for: of a thousand features each takes 8 MB.
    """
    if state.ndim == 2:
        x = state.astype(np.float64)
        for name in ("moment", "covariance"):
            matrix = x @ x.T
            matrix /= len(x)
            yield name, matrix
            x -= x.mean(0)
        return
    matrix, mean = state[0, :-2].astype(np.float64), state[0, -2].astype(np.float64)
    matrix /= state[0, -1, 0]
    yield "covariance", matrix
    matrix += np.outer(mean, mean)
    yield "moment", matrix


def _eigenvalues(matrix: np.ndarray) -> np.ndarray:
    if not np.isfinite(matrix).all():
        return np.full(len(matrix), np.nan)
    return np.maximum(np.linalg.eigvalsh(matrix)[::-1], 0.0)


def _numbers(values: np.ndarray, width: int, floor: float) -> dict[str, float]:
    rank = int((values > floor * values[0]).sum()) if np.isfinite(values[0]) else 0
    trace = float(values.sum())
    found = {"max": values[0], "trace": trace, "rank": rank}
    found["participation"] = _participation(trace, float((values**2).sum()))
    for percent in PERCENTS:
        index = math.ceil(percent * width / 100)
        found[f"p{percent}"] = values[index - 1] if index <= rank else 0.0 * values[0]
    return {name: float(value) for name, value in found.items()}


def _participation(trace: float, square: float) -> float:
    return trace**2 / square if trace else 0.0


def _nystrom(sketch: np.ndarray) -> dict[str, tuple[np.ndarray, float, float, float]]:
    """Estimate by "moment" and "covariance" the eigenvalues, the exact trace, the sum of squares and the error."""
    sketch = sketch.astype(np.float64)
    count, squares = sketch[-1, :2]
    directions = _directions(sketch.shape[1]).numpy().astype(np.float64)
    mean = sketch[-2] / count
    moment = sketch[:-2].T / count
    about = moment - np.outer(mean, mean @ directions)
    return {
        "moment": _low_rank(moment, directions, squares / count),
        "covariance": _low_rank(about, directions, squares / count - mean @ mean),
    }


def _low_rank(product: np.ndarray, directions: np.ndarray, trace: float) -> tuple[np.ndarray, float, float, float]:
    """Estimate eigenvalues of S from S W: those of N = (S W)(W^T S W)^+ (S W)^T never exceed them.

    The last `_HELD` directions w are held out: |(S - N) w|^2 has mean |S - N|_F^2, twice the root of which bounds, at
    98 % or more, what the largest eigenvalue misses; what the trace leaves over always does. |S w|^2 - |N w|^2
    estimates what |N|_F^2 lacks of |S|_F^2.

    Returns:
        Eigenvalues, trace, sum of squared eigenvalues, error of the largest.
    """
    if not np.isfinite(product).all() or not np.isfinite(trace):
        return np.full(_PROBES - _HELD, np.nan), np.nan, np.nan, np.nan
    used, held = product[:, :-_HELD], directions[:, -_HELD:]
    core = directions[:, :-_HELD].T @ used
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    kept = values > _FLOOR * max(values[-1], np.finfo(float).tiny)
    root = used @ (vectors[:, kept] / np.sqrt(values[kept]))
    found = np.zeros(_PROBES - _HELD)
    if kept.any():
        found[: kept.sum()] = np.linalg.svd(root, compute_uv=False) ** 2
    seen, near = product[:, -_HELD:], root @ (root.T @ held)
    own = float((found**2).sum())
    square = max(own + float((seen**2 - near**2).sum()) / _HELD, own)
    left = 2 * math.sqrt(float(((seen - near) ** 2).sum()) / _HELD)
    return found, float(trace), square, min(left, max(float(trace - found.sum()), 0.0))
