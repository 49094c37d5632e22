"""Independent float64 numpy formulas of normscope.norms.families.mixtures."""

import numpy as np


def softmax(z, axis=-1):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _c(v):
    return v.reshape(1, -1, 1, 1)


def mode(x, gate, offset, eps, weight, bias):
    g = softmax(x.mean((2, 3)) @ gate.T + offset, 1)
    y = np.zeros_like(x)
    means, squares = [], []
    for k in range(g.shape[1]):
        w = g[:, k].reshape(-1, 1, 1, 1)
        n = g[:, k].sum() * x.shape[2] * x.shape[3]
        mean = (w * x).sum((0, 2, 3)) / n
        square = (w * x**2).sum((0, 2, 3)) / n
        y += w * (x - _c(mean)) / np.sqrt(_c(square - mean**2) + eps)
        means.append(mean)
        squares.append(square)
    return y * _c(weight) + _c(bias), np.stack(means), np.stack(squares)


def mixture(x, posterior, eps):
    """Mixture normalization for given posteriors (K, N, H, W)."""
    y = np.zeros_like(x)
    for p in posterior:
        w = p[:, None]
        mean = (w * x).sum((0, 2, 3)) / p.sum()
        var = (w * (x - _c(mean)) ** 2).sum((0, 2, 3)) / p.sum()
        y += w / np.sqrt(p.mean()) * (x - _c(mean)) / np.sqrt(_c(var) + eps)
    return y


def exemplar(x, key, key_bias, ratio, ratio_bias, eps, weight, bias):
    axes = [(2, 3), (1, 2, 3), (0, 2, 3)]
    moments = [(x.mean(a, keepdims=True), x.var(a, keepdims=True)) for a in axes]
    pool = x.mean((2, 3), keepdims=True)
    normal = [((x - m) / np.sqrt(v + eps), (pool - m) / np.sqrt(v + eps)) for m, v in moments]
    z = np.stack([np.maximum(p[:, :, 0, 0] @ key.T + key_bias, 0) for _, p in normal], 1)
    correlation = np.einsum("nkh,njh->nkj", z, z).reshape(len(x), -1)
    a = softmax(correlation @ ratio.T + ratio_bias, 1)
    return sum(a[:, k].reshape(-1, 1, 1, 1) * (normal[k][0] * _c(weight[k]) + _c(bias[k])) for k in range(3))


def dynamic(x, channel_groups, eps, *, batch):
    """Dynamic normalization for given blocks of channels that share statistics."""
    y = np.empty_like(x)
    for c in channel_groups:
        axes = (0, 1, 2, 3) if batch else (1, 2, 3)
        part = x[:, c]
        y[:, c] = (part - part.mean(axes, keepdims=True)) / np.sqrt(part.var(axes, keepdims=True) + eps)
    return y


def invariant(x, eps, window=3):
    r = window // 2
    square = (x**2).mean(1)
    local = np.empty_like(square)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            box = square[:, max(i - r, 0) : i + r + 1, max(j - r, 0) : j + r + 1]
            local[:, i, j] = box.mean((1, 2))
    z = x / np.sqrt(local[:, None] + eps)
    flat = z.transpose(1, 0, 2, 3).reshape(x.shape[1], -1)
    flat = flat - flat.mean(1, keepdims=True)
    sigma = flat @ flat.T / flat.shape[1] + eps * np.eye(len(flat))
    p, scaled = np.eye(len(flat)), sigma / np.trace(sigma)
    for _ in range(5):
        p = 1.5 * p - 0.5 * p @ p @ p @ scaled
    white = p @ flat / np.sqrt(np.trace(sigma))
    return white.reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(1, 0, 2, 3)
