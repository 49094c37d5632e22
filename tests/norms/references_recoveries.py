"""Formulas of normscope.norms.families.recoveries in numpy, float64, written for reading."""

import numpy as np


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def standardized(x, axes, eps=1e-5, ddof=0):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True, ddof=ddof) + eps)


def dynamic_layer(x, p):
    """x `(N, L, C)`."""
    a = np.tanh(x @ p["summary.weight"].T + p["summary.bias"]).mean(1)
    scale = a @ p["to_scale.weight"].T + p["to_scale.bias"]
    shift = a @ p["to_shift.weight"].T + p["to_shift.bias"]
    return standardized(x, 2) * scale[:, None] + shift[:, None]


def layer_instance(x, rho, scale, shift, ddof, smooth=0.0):
    rho = np.clip(rho - smooth, 0, 1) if smooth else rho
    rho = rho[:, None, None]
    y = rho * standardized(x, (2, 3), ddof=ddof) + (1 - rho) * standardized(x, (1, 2, 3), ddof=ddof)
    return y * scale[:, :, None, None] + shift[:, :, None, None]


def instance_meta(x, p, keys, normalized, crossed=False, ddof=1):
    n, c = x.shape[:2]
    out = np.empty_like(x)
    for i in range(n):
        groups = x[i].reshape(keys, -1)
        mean, var = groups.mean(1), groups.var(1, ddof=ddof)
        first, second = (mean, var) if crossed else (var, mean)
        scale = sigmoid(p["to_scale.weight"] @ np.maximum(p["embed.weight"] @ first, 0))
        shift = np.tanh(p["to_shift.weight"] @ np.maximum(p["embed.weight"] @ second, 0))
        scale, shift = np.repeat(scale, c // keys) + p["weight"], np.repeat(shift, c // keys) + p["bias"]
        out[i] = normalized[i] * scale[:, None, None] + shift[:, None, None]
    return out


def group(x, groups, ddof=0):
    return standardized(x.reshape(x.shape[0], groups, -1), 2, ddof=ddof).reshape(x.shape)


def convolution(y, filters, kernel):
    """Convolve `(N, C, H, W)` with filters `(N, C, C / groups, kernel^2)`, zeros beyond the border."""
    _, c, h, w = y.shape
    size = filters.shape[2]
    m = kernel // 2
    padded = np.pad(y, ((0, 0), (0, 0), (m, m), (m, m)))
    out = np.zeros_like(y)
    for o in range(c):
        first = o // size * size
        for j in range(size):
            for k in range(kernel**2):
                r, s = divmod(k, kernel)
                out[:, o] += filters[:, o, j, k, None, None] * padded[:, first + j, r : r + h, s : s + w]
    return out


def dynamic_instance(x, v, p, kernel, groups):
    filters = v @ p["to_filter.weight"].T + p["to_filter.bias"]
    filters = filters.reshape(len(x), x.shape[1], x.shape[1] // groups, kernel**2)
    shift = v @ p["to_shift.weight"].T + p["to_shift.bias"]
    return convolution(standardized(x, (2, 3)), filters, kernel) + shift[:, :, None, None]


def adaptive_convolution(x, v, p, kernel, groups):
    n, c, h, w = x.shape
    m = kernel // 2
    filters = (v @ p["to_filter.weight"].T + p["to_filter.bias"]).reshape(n, c, c // groups, kernel**2)
    shift = v @ p["to_shift.weight"].T + p["to_shift.bias"]
    padded = np.pad(x, ((0, 0), (0, 0), (m, m), (m, m)), mode="edge")
    z = np.empty_like(x)
    for r in range(h):
        for s in range(w):
            window = padded[:, :, r : r + kernel, s : s + kernel]
            z[:, :, r, s] = (x[:, :, r, s] - window.mean((2, 3))) / np.sqrt(window.var((2, 3)) + 1e-5)
    return convolution(z, filters, kernel) + shift[:, :, None, None]


def passport(x, first, second, p):
    def f(v):
        h = p["passport.0.weight"] @ v
        return p["passport.2.weight"] @ np.where(h > 0, h, 0.01 * h)

    scale, shift = f(first.mean((0, 2, 3))), f(second.mean((0, 2, 3)))
    return standardized(x, (0, 2, 3)) * scale[:, None, None] + shift[:, None, None]


def softmax(v):
    e = np.exp(v - v.max(0))
    return e / e.sum(0)


def semantic(x, p, temperature, positions=None):
    out = np.empty_like(x)
    for i in range(len(x)):
        z = x[i].reshape(x.shape[1], -1)
        scores = p["filters"] @ z
        if positions is not None:
            keys = p["keys.weight"] @ z[:, positions] + p["keys.bias"][:, None]
            queries = p["queries.weight"] @ z + p["queries.bias"][:, None]
            scores = scores + np.clip(p["alpha"], 0, 1)[:, None] * (keys.T @ queries)
        regions = softmax(scores / temperature)
        y = np.zeros_like(z)
        for region, gain, bias in zip(regions, p["gain"], p["bias"], strict=True):
            share = region / region.sum()
            mean = (share * z).sum(1, keepdims=True)
            var = (share * (z - mean) ** 2).sum(1, keepdims=True)
            y += region * (gain[:, None] * (z - mean) / np.sqrt(var + 1e-5) + bias[:, None])
        out[i] = x[i] + p["residual"] * y.reshape(x[i].shape)
    return out


def selfnorm(x, p, both):
    mean, sd = x.mean((2, 3)), np.sqrt(x.var((2, 3), ddof=1) + 1e-12)
    gates = []
    for g in range(2 if both else 1):
        v = standardized(mean * p["gate"][g, :, 0] + sd * p["gate"][g, :, 1], 0)
        gates.append(sigmoid(v * p[f"norms.{g}.weight"] + p[f"norms.{g}.bias"])[:, :, None, None])
    mean = mean[:, :, None, None]
    return x * gates[0] + (mean * (gates[1] - gates[0]) if both else 0)
