"""Robust estimates: against numpy formulas over several steps, control of the gradient, errors."""

import numpy as np
import pytest
import torch

from normscope.core.errors import ArgumentError
from normscope.norms.families.robust_batch import predicted
from normscope.norms.table import build

EPS = 1e-5


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(2)
    return [torch.randn(5, 4, 3, 3, generator=g, dtype=torch.float64) * (k + 1) + k for k in range(4)]


def moments(x):
    a = x.numpy()
    return a.mean((0, 2, 3)), a.var((0, 2, 3))


def normalized(x, mean, var):
    mean, var = (np.asarray(v).reshape(1, -1, 1, 1) for v in (mean, var))
    return (x.detach().numpy() - mean) / np.sqrt(var + EPS)


def close(found, expected, rtol=1e-9):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=rtol, atol=1e-11)


def rates(name, steps=4, examples=5):
    if name == "momentum-batch":
        rho = min(examples / 64, 1) ** (1 / 64)
        return [1 - (rho ** (100 / 99 * max(100 - t, 0)) - rho**100) for t in range(1, steps + 1)]
    return [1 / t if name == "diminishing-batch" else 0.1 for t in range(1, steps + 1)]


@pytest.mark.parametrize("name", ["running-batch", "diminishing-batch", "full-normalization", "momentum-batch"])
def test_blended_statistics(batches, name):
    layer = build(name, 4, dtype=torch.float64)
    mean, var = np.zeros(4), np.ones(4)
    for x, rate in zip(batches, rates(name), strict=True):
        m, v = moments(x)
        mean, var = (1 - rate) * mean + rate * m, (1 - rate) * var + rate * v
        close(layer(x), normalized(x, mean, var))
    close(layer.eval()(x), normalized(x, mean, var))


def test_momentum_of_a_large_batch_borrows_less(batches):
    layer = build("momentum-batch", 4)
    assert layer.rate(100, 64) == 1.0
    assert layer.rate(100, 16) > layer.rate(100, 2)
    assert layer.rate(1, 16) > layer.rate(100, 16)


def test_full_normalization_has_the_gradient_of_its_batch_at_the_blended_point(batches):
    # at momentum 1 the blended point is the batch itself
    outputs = []
    for name, options in (("full-normalization", {"momentum": 1.0}), ("batch", {})):
        x = batches[1].clone().requires_grad_()
        layer = build(name, 4, dtype=torch.float64, **options)
        (layer(x) * batches[2]).sum().backward()
        outputs.append(x.grad)
    close(outputs[0], outputs[1].numpy())
    x, other = (batches[1].clone().requires_grad_() for _ in range(2))
    (build("full-normalization", 4, dtype=torch.float64)(x) * batches[2]).sum().backward()
    (build("running-batch", 4, dtype=torch.float64)(other) * batches[2]).sum().backward()
    assert not torch.allclose(x.grad, other.grad)


def test_renorm_starts_as_batch_normalization_and_ends_with_stored_statistics(batches):
    layer = build("batch-renorm", 4, dtype=torch.float64)
    assert layer.limits() == (1, 0)
    m, v = moments(batches[0])
    close(layer(batches[0]), (batches[0].numpy() - m.reshape(-1, 1, 1)) / (np.sqrt(v) + 1e-3).reshape(-1, 1, 1))
    layer.num_batches_tracked.fill_(10**6)
    assert layer.limits() == (3, 5)
    stored = [b.clone().reshape(-1, 1, 1) for b in (layer.running_mean, layer.running_std)]
    # with corrections below their limits nothing of the batch is left
    close(layer(batches[0] + 0), ((batches[0] - stored[0]) / stored[1]).numpy())


def kalman(x, p, mean_pre, var_pre):
    m, v = moments(x)
    p = p if np.mean(var_pre / v) < 100 else 0
    return p * mean_pre + (1 - p) * m, p * var_pre + (1 - p) * v + p * (1 - p) * (m - mean_pre) ** 2


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_kalman(batches, size):
    x, pre = batches[1], (np.arange(4) / 3, size * np.array([0.5, 1.0, 2.0, 3.0]))
    layer = build("kalman", 4, p=0.3, dtype=torch.float64)
    mean, var = kalman(x, 0.3, *pre)
    close(layer(x, torch.tensor(np.stack(pre))), normalized(x, mean, var))
    close(layer.running_mean, 0.1 * mean)
    close(layer.running_var, 0.9 + 0.1 * var)
    assert (size > 10) == np.allclose(mean, moments(x)[0])


def test_prediction_passes_samples_through_what_lies_between():
    mean, var = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([1.0, 4.0], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    found = predicted(mean, var, torch.nn.ReLU(), samples=200_000, size=(), generator=g)
    # moments of the rectified standard normal distribution
    first = 1 / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(found[:, 0].numpy(), [first, 0.5 - first**2], rtol=1e-2)


def test_memory(batches):
    layer = build("memorized-batch", 4, memory=3, decay=0.5, dtype=torch.float64)
    seen = []
    for x in batches:
        m, v = moments(x)
        seen = [(m, v + m**2), *seen][:3]
        w = 0.5 ** np.arange(len(seen))
        mean, square = (sum(a * s[i] for a, s in zip(w / w.sum(), seen, strict=True)) for i in (0, 1))
        close(layer(x), normalized(x, mean, square - mean**2))
    before = layer.num_batches_tracked.clone()
    m, v = moments(batches[0])
    seen[0] = (m, v + m**2)
    mean, square = (sum(a * s[i] for a, s in zip(w / w.sum(), seen, strict=True)) for i in (0, 1))
    close(layer(batches[0], again=True), normalized(batches[0], mean, square - mean**2))
    assert layer.num_batches_tracked == before


def test_cross_iteration_compensates_exactly_where_statistics_are_linear():
    # the mean of a convolution is linear in its weight: carried over, past means equal those of the present weight
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(6, 3, 5, 5, generator=g, dtype=torch.float64) for _ in range(2)]
    weights = [torch.randn(4, 3, 1, 1, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    layer = build("cross-iteration-batch", 4, dtype=torch.float64)
    for x, w in zip(inputs, weights, strict=True):
        y = layer(torch.nn.functional.conv2d(x, w), w)
    now = torch.nn.functional.conv2d(inputs[1], weights[1])
    means = [torch.nn.functional.conv2d(x, weights[1]).mean((0, 2, 3)) for x in inputs]
    # y = (x - mean) / s: from two entries follows the mean that was used
    slope = (y[0, :, 0, 0] - y[0, :, 1, 1]) / (now[0, :, 0, 0] - now[0, :, 1, 1])
    used = now[0, :, 0, 0] - y[0, :, 0, 0] / slope
    averaged = torch.isclose(used, (means[0] + means[1]) / 2)
    # a filter whose past variance came out negative leaves the past aside
    assert bool((averaged | torch.isclose(used, means[1])).all())
    assert bool(averaged.any())


def test_cross_iteration_without_memory_is_batch_normalization_with_unbiased_variance(batches):
    x = batches[1]
    layer = build("cross-iteration-batch", 4, memory=0, inside=True, dtype=torch.float64)
    m, v = moments(x)
    close(layer(x), normalized(x, m, v * 45 / 44))


@pytest.mark.parametrize(("guard", "bound"), [("clamp", 5.0), ("none", 30.0)])
def test_online_guard(guard, bound):
    x = torch.full((2, 4, 3, 3), 30.0, dtype=torch.float64)
    assert float(build("online", 4, guard=guard, dtype=torch.float64)(x)[0].detach().max()) == pytest.approx(
        bound, rel=1e-4
    )


def test_online_layer_guard(batches):
    y = build("online", 4, guard="layer", dtype=torch.float64)(batches[1])
    close(y.square().mean((1, 2, 3)), np.ones(5), 1e-4)


def test_online_batch_is_as_many_steps(batches):
    whole, parts = (build("online", 4, dtype=torch.float64) for _ in range(2))
    grads = []
    for layer, pieces in ((whole, [batches[1]]), (parts, batches[1].split(1))):
        found = []
        for piece in pieces:
            value = piece.clone().requires_grad_()
            layer(value).square().sum().backward()
            found.append(value.grad)
        grads.append(torch.cat(found))
    close(grads[0], grads[1].numpy())
    for name in ("running_mean", "running_var", "control_mean", "control_var"):
        close(getattr(whole, name), getattr(parts, name).numpy())


def test_moving_average_correction(batches):
    layer = build("moving-average-batch", 4, batches=1, warmup=0, correction=0, dtype=torch.float64)
    layer(batches[0])
    stored = layer.running_var.clone()
    square = batches[1].square().mean((0, 2, 3))
    r = ((square + EPS) / (stored + EPS)).sqrt().clamp(0.2, 5)
    y = batches[1] * (r / (square + EPS).sqrt()).reshape(-1, 1, 1)
    close(layer(batches[1]), y.numpy())


def test_power_leaves_padding_out_of_phi():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 4, generator=g, dtype=torch.float64)
    padding = torch.rand(5, 3, generator=g) < 0.4
    layers = [build("power", 4, groups=0, dtype=torch.float64) for _ in range(3)]
    y = layers[0](x, padding)
    phi = x[~padding].square().mean(0)
    close(y, (x / (phi + EPS).sqrt()).numpy())
    close(layers[1](x, padding.mT), y.detach().numpy())
    close(layers[2](torch.where(padding[..., None], 9.0, x), padding)[~padding], y[~padding].detach().numpy())


def test_power_channels_first_is_the_same():
    x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = build("power", 4, groups=2, channels="first", dtype=torch.float64)(x)
    close(y, build("power", 4, groups=2, dtype=torch.float64)(x.mT).mT.detach().numpy())


def test_stochastic_extremes(batches):
    x = batches[1]
    close(build("stochastic", 4, p=0.0, dtype=torch.float64)(x), normalized(x, *moments(x)))
    close(build("stochastic", 4, p=1.0, dtype=torch.float64)(x), normalized(x, np.zeros(4), np.ones(4)))


def test_noise_aware_variance_is_that_of_noisy_inputs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 4, generator=g, dtype=torch.float64) + torch.arange(4)
    layer = build("noise-aware-batch", 4, noise=0.5, momentum=1.0, dtype=torch.float64)
    layer(x)
    noisy = x + 0.5 * x.square().mean(0).sqrt() * torch.randn(x.shape, generator=g, dtype=torch.float64)
    np.testing.assert_allclose(layer.running_var.numpy(), noisy.var(0).numpy(), rtol=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("kalman", 4, p=2), "p=2"),
        (lambda: build("stochastic", 4, p=-1), "p=-1"),
        (lambda: build("batch-renorm", 4, start=9, d_end=5), "start=9"),
        (lambda: build("online", 4, guard="clip"), "did you mean 'clamp'"),
        (lambda: build("online", 4, forward_decay=1), "forward_decay=1"),
        (lambda: build("moving-average-batch", 4, batches=0), "batches=0"),
        (lambda: build("memorized-batch", 4, memory=0), "memory=0"),
        (lambda: build("cross-iteration-batch", 4, memory=-1), "memory=-1"),
        (lambda: build("momentum-batch", 4, steps=1), "steps=1"),
        (lambda: build("noise-aware-batch", 4, noise=-1), "noise=-1"),
        (lambda: build("power", 4)(torch.zeros(2, 3, 4), torch.zeros(3, 3).bool()), "padding has shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
