"""Independent numbers: formulas in float64 numpy, written out entry by entry where that is clearest."""

import math

import numpy as np


def standardized(x, axes, eps=1e-5, ddof=0):
    mean = x.mean(axes, keepdims=True)
    return (x - mean) / np.sqrt(x.var(axes, keepdims=True, ddof=ddof) + eps)


def inverse_root(sigma):
    values, vectors = np.linalg.eigh(sigma)
    return vectors @ np.diag(values**-0.5) @ vectors.T


def covariance(rows, ddof=0):
    centered = rows - rows.mean(1, keepdims=True)
    return centered @ centered.T / (rows.shape[1] - ddof)


def channel_rows(x):
    """(N, C, *) -> (C, samples)."""
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


def from_rows(rows, shape):
    return np.moveaxis(rows.reshape(shape[1], shape[0], *shape[2:]), 0, 1)


def whitened(x, matrix):
    rows = channel_rows(x)
    return from_rows(matrix @ (rows - rows.mean(1, keepdims=True)), x.shape)


def local_context(x, size, window, eps=1e-5):
    """Statistics of the nearest whole window and the position's group, at each position."""
    y = np.empty_like(x)
    height, width = x.shape[2:]
    for n, c, i, j in np.ndindex(x.shape):
        top = min(max(i - (window - 1) // 2, 0), height - window)
        left = min(max(j - (window - 1) // 2, 0), width - window)
        first = c // size * size
        seen = x[n, first : first + size, top : top + window, left : left + window]
        y[n, c, i, j] = (x[n, c, i, j] - seen.mean()) / math.sqrt(seen.var() + eps)
    return y


def local_contrast(x, window, sigma, eps=1e-4):
    """Gaussian weights over all channels and the window, made to sum to 1 over what lies inside the map."""
    reach = (window - 1) // 2
    count, channels, height, width = x.shape

    def blur(values):
        out = np.zeros((count, height, width))
        for i, j in np.ndindex(height, width):
            total = 0.0
            for p in range(max(i - reach, 0), min(i + reach, height - 1) + 1):
                for q in range(max(j - reach, 0), min(j + reach, width - 1) + 1):
                    w = math.exp(-((p - i) ** 2 + (q - j) ** 2) / (2 * sigma**2))
                    out[:, i, j] += w * values[:, :, p, q].sum(1)
                    total += w * channels
            out[:, i, j] /= total
        return out

    v = x - blur(x)[:, None]
    deviation = np.sqrt(blur(v**2))
    least = deviation.mean((1, 2))[:, None, None]
    return v / np.maximum(np.maximum(deviation, least), eps)[:, None]


def local_response(x, size, alpha, beta, k):
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        first, last = max(c - size // 2, 0), min(c + (size - 1) // 2, x.shape[1] - 1)
        squares = (x[:, first : last + 1] ** 2).sum(1)
        y[:, c] = x[:, c] / (k + alpha / size * squares) ** beta
    return y


def divisive(x, sum_window, sup_window, sigma):
    """Boxes over the map with zeros beyond the border."""

    def boxed(values, window):
        out = np.zeros_like(values)
        for i, j in np.ndindex(values.shape[1:]):
            for p in range(i - (window - 1) // 2, i - (window - 1) // 2 + window):
                for q in range(j - (window - 1) // 2, j - (window - 1) // 2 + window):
                    if 0 <= p < values.shape[1] and 0 <= q < values.shape[2]:
                        out[:, i, j] += values[:, p, q] / window**2
        return out

    v = x - boxed(x.mean(1), sum_window)[:, None]
    return v / np.sqrt(sigma**2 + boxed((v**2).mean(1), sup_window))[:, None]


def region(x, mask, eps=1e-5):
    """Each of the two regions filled up with its mean, batch normalized, times the root of its share."""
    y = np.zeros_like(x)
    for m in (mask, 1 - mask):
        m = np.broadcast_to(m, x.shape)
        for c in range(x.shape[1]):
            inside = m[:, c] > 0
            filled = np.where(inside, x[:, c], x[:, c][inside].mean())
            normalized = (filled - filled.mean()) / math.sqrt(filled.var() + eps)
            y[:, c] += np.where(inside, normalized * math.sqrt(inside.mean()), 0)
    return y


def deviations(row, pair, level=0.25):
    """Statistic and deviation of generalized batch normalization, for one channel."""
    mean = row.mean()
    if pair == "absolute":
        return mean, np.abs(row - mean).mean()
    if pair == "semideviation":
        return mean, np.maximum(row - mean, 0).mean()
    if pair == "range":
        return (row.max() + row.min()) / 2, row.max() - row.min()
    if pair == "worst-case":
        return row.max(), row.max() - mean
    above = np.sort(row)[::-1][: math.ceil((1 - level) * len(row))]
    return above[-1], above.mean() - mean


def isotropic_factors(deviation, sigma, beta=0.5, eps=1e-3):
    correlation = sigma / np.outer(deviation, deviation)
    theta = ((correlation**2).mean(1) * deviation + eps) ** -beta
    total = np.trace(sigma)
    return theta * math.sqrt(total / ((np.diag(sigma) * theta**2).sum() + eps))
