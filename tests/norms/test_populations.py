"""Population statistics and inference estimators against formulas in numpy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from normscope.core.errors import ArgumentError
from normscope.norms import build, convert, recalibrate
from normscope.norms.families.populations_linear import center_slope, rectified_moments
from tests.norms.keys.key import recorded

torch.set_num_threads(1)

NAMES = {"gamma": "weight", "beta": "bias", "moving_x": "running_mean", "moving_x2": "running_square"}


def data(n=40, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + 2.0


def images(seed=0, n=4, c=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, 3, 4, generator=generator, dtype=torch.float64) * 2 + 1


def plain(layer):
    """W and b of the same map without normalization."""
    weight = (layer.weight @ layer.transform).detach().numpy()
    return weight, layer.bias.detach().numpy() - weight @ layer.center.numpy()


LINEAR = ["centering", "factor-centering", "natural-neural-network"]


@pytest.mark.parametrize("name", LINEAR)
def test_a_refreshment_keeps_the_function_and_normalizes_the_input(name):
    layer, x = build(name, 4, momentum=1.0, every=1, dtype=torch.float64), data()
    before = layer(x).detach()
    weight, bias = plain(layer)
    np.testing.assert_allclose(before.numpy(), x.numpy() @ weight.T + bias, rtol=1e-10)
    layer.refresh()
    torch.testing.assert_close(layer.eval()(x), before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.center, x.mean(0))
    white = (x - layer.center) @ layer.transform.T
    if name == "natural-neural-network":
        expected = np.cov(x.numpy().T, bias=True)
        values = np.linalg.eigvalsh(expected)
        np.testing.assert_allclose(np.cov(white.T, bias=True), np.diag(values / (values + 1e-3)), atol=1e-9)
    else:
        torch.testing.assert_close(white, x - x.mean(0))


def test_natural_descent_is_the_natural_step_on_the_plain_weights():
    x, layer = data(), build("natural-neural-network", 4, momentum=1.0, every=None, eps=1e-9, dtype=torch.float64)
    layer(x)
    layer.refresh()
    weight, _ = plain(layer)
    target = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = layer(x)
    delta = (y - target).detach()
    (0.5 * (y - target).square().sum()).backward()
    with torch.no_grad():
        layer.weight -= 0.01 * layer.weight.grad
    moved = plain(layer)[0] - weight
    centered = (x - x.mean(0)).numpy()
    expected = -0.01 * delta.numpy().T @ centered @ np.linalg.inv(np.cov(centered.T, bias=True))
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-8)


def test_every_counts_batches():
    layer = build("centering", 4, every=3, momentum=None, dtype=torch.float64)
    batches = [data(seed=seed) for seed in range(4)]
    for k, x in enumerate(batches):
        layer(x)
        expected = torch.stack(batches[:3]).mean((0, 1)) if k == 3 else torch.zeros(4, dtype=torch.float64)
        torch.testing.assert_close(layer.center, expected)


def test_generalized_whitening_is_compact_and_standardized():
    x = data(200, 5)
    layer = build("generalized-whitened", 5, rank=3, momentum=1.0, every=1, dtype=torch.float64)
    layer(x)
    y = layer(x).detach().numpy()
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    kept = vectors[:, -3:] @ vectors[:, -3:].T
    assert layer.weight.shape == (5, 3)
    projection = torch.linalg.pinv(layer.transform) @ layer.transform
    np.testing.assert_allclose(projection, kept, atol=1e-9)
    np.testing.assert_allclose(
        np.diag(np.cov(((x - x.mean(0)) @ layer.transform.T).T, bias=True)), values[-3:] / (values[-3:] + 1e-3)
    )
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(y.var(0), 1, rtol=1e-2)


def test_rectified_moments_are_those_of_quadrature():
    correlation = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    mean, covariance = rectified_moments(correlation)
    grid = np.linspace(-9, 9, 1801)
    a, b = np.meshgrid(grid, grid)
    density = np.exp(-(a**2 - 1.2 * a * b + b**2) / (2 * 0.64)) / (2 * np.pi * 0.8) * 0.01**2
    relu_a, relu_b = np.maximum(a, 0), np.maximum(b, 0)
    first = (relu_a * density).sum()
    np.testing.assert_allclose(mean, first, rtol=1e-4)
    np.testing.assert_allclose(covariance[0, 1], (relu_a * relu_b * density).sum() - first**2, rtol=1e-3)
    np.testing.assert_allclose(covariance[0, 0], (relu_a**2 * density).sum() - first**2, rtol=1e-3)


def gradients(layer, x, weights):
    copied = copy.deepcopy(layer)
    value = x.clone().requires_grad_()
    (copied(value) * weights).sum().backward()
    return value.grad.numpy(), copied.weight.grad.numpy(), copied.bias.grad.numpy()


def test_factor_centering_centers_inputs_and_errors():
    x, delta = data(), torch.randn(40, 4, dtype=torch.float64)
    layer = build("factor-centering", 4, momentum=1.0, every=None, dtype=torch.float64)
    layer(x)
    layer.refresh()
    gx, gw, gb = gradients(layer, x, delta)
    errors, inputs = delta.numpy(), x.numpy()
    np.testing.assert_allclose(gw, (errors - errors.mean(0)).T @ (inputs - inputs.mean(0)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(gb, errors.sum(0))
    np.testing.assert_allclose(gx, errors @ layer.weight.detach().numpy())


def test_slopes_lose_their_mean():
    x = data().requires_grad_()
    y = center_slope(torch.tanh, x)
    y.sum().backward()
    slope = 1 - np.tanh(x.detach().numpy()) ** 2
    np.testing.assert_allclose(y.detach(), np.tanh(x.detach().numpy()))
    np.testing.assert_allclose(x.grad, slope - slope.mean(0), atol=1e-12)


def test_mean_normalized_step_is_the_step_of_the_centered_layer():
    x, delta = data(), torch.randn(40, 4, dtype=torch.float64)
    layer = build("mean-normalized-sgd", 4, momentum=1.0, dtype=torch.float64)
    layer(x)
    gx, gw, gb = gradients(layer, x, delta)
    errors, mean = delta.numpy(), x.numpy().mean(0)
    expected = errors.T @ (x.numpy() - mean)
    np.testing.assert_allclose(gw, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(gb, errors.sum(0) - expected @ mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(gx, errors @ layer.weight.detach().numpy())


def test_transformed_units_are_zero_on_average_and_the_function_stays():
    x = data()
    layer = build("linear-transformations", 4, hidden=7, momentum=1.0, every=None, dtype=torch.float64)
    before = layer(x).detach()
    layer.refresh()
    torch.testing.assert_close(layer.eval()(x), before, rtol=1e-9, atol=1e-9)
    h = x.numpy() @ layer.inner.weight.detach().numpy().T + layer.inner.bias.detach().numpy()
    alpha, beta = layer.alpha.numpy(), layer.beta.numpy()
    np.testing.assert_allclose((np.tanh(h) + alpha * h + beta).mean(0), 0, atol=1e-12)
    np.testing.assert_allclose((1 - np.tanh(h) ** 2 + alpha).mean(0), 0, atol=1e-12)


def test_input_whitening_whitens_the_data_it_was_measured_on():
    batches = [images(seed=seed) for seed in range(5)]
    layer = recalibrate(build("input-whitening", 6, eps=1e-9, dtype=torch.float64), batches).eval()
    y = layer(torch.cat(batches)).transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(y.mean(1), 0, atol=1e-9)
    np.testing.assert_allclose(np.cov(y, bias=True), np.eye(6), atol=1e-6)
    # in training a batch is normalized by the statistics of those before it, and then added to them
    other = images(7) * 3
    expected = layer(other)
    torch.testing.assert_close(layer.train()(other), expected)
    assert not torch.allclose(layer.eval()(other), expected)


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("groups", [6, 3])
def test_example_weighting(a, groups):
    layer = build("example-weighting", 6, groups=groups, examples=2, weight_eval=a, momentum=0.5, dtype=torch.float64)
    x = images()
    z = x.numpy().reshape(2, 2, groups, 6 // groups, 12)
    mean, var = z.mean((1, 3, 4), keepdims=True), z.var((1, 3, 4), keepdims=True)
    np.testing.assert_allclose(layer(x).detach(), ((z - mean) / np.sqrt(var + 1e-5)).reshape(x.shape), rtol=1e-9)
    stored = 0.5 * x.numpy().mean((0, 2, 3)), 0.5 + 0.5 * (x.numpy() ** 2).mean((0, 2, 3))
    np.testing.assert_allclose(layer.running_square, stored[1])
    z = images(1, n=3).numpy().reshape(3, groups, -1)
    own = z.mean(2), (z**2).mean(2)
    first, second = (
        (1 - a) * kept.reshape(groups, -1).mean(1) + a * mine for kept, mine in zip(stored, own, strict=True)
    )
    expected = (z - first[..., None]) / np.sqrt(second - first**2 + 1e-5)[..., None]
    np.testing.assert_allclose(
        layer.eval()(images(1, n=3)).detach(), expected.reshape(3, 6, 3, 4), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("fourthings_ghostbn", {"examples": 4, "weight_eval": 0.0}),
        ("fourthings_batchgroup", {"examples": 2, "groups": 4, "weight_eval": 0.0}),
        ("fourthings_gn", {"examples": 1, "groups": 4, "weight_eval": 1.0}),
    ],
)
def test_example_weighting_reproduces_recorded_numbers(key, options):
    data = recorded(key)
    layer = build("example-weighting", 8, **options, dtype=torch.float64)
    state = layer.state_dict()
    before = {n.removeprefix("state0/"): value for n, value in data.items() if n.startswith("state0/")}
    after = {n.removeprefix("state3/"): value for n, value in data.items() if n.startswith("state3/")}
    for name, value in before.items():
        state[NAMES[name]].copy_(value.reshape(-1))
    for step in "123":
        y = layer(data[f"x{step}"])
        torch.testing.assert_close(y, data.get(f"y{step}", y), rtol=1e-9, atol=1e-9)
    for name in NAMES.keys() & after.keys():
        torch.testing.assert_close(layer.state_dict()[NAMES[name]], after[name].reshape(-1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.eval()(data["x_eval"]), data["y_eval"], rtol=1e-9, atol=1e-9)


def test_example_weighting_of_a_trained_batch_norm():
    old = nn.BatchNorm2d(6).double()
    for seed in range(3):
        old(images(seed))
    new = convert(nn.Sequential(old), to="example-weighting", weight_eval=0.0)
    torch.testing.assert_close(new.eval()(images(9)), old.eval()(images(9)), rtol=1e-9, atol=1e-9)


def test_evalnorm_trains_as_batch_norm_and_learns_its_mixture():
    layer, other = build("evalnorm", 6, start=0.3, dtype=torch.float64), nn.BatchNorm2d(6).double()
    x, w = images().requires_grad_(), images(5)
    twin = x.detach().clone().requires_grad_()
    (layer(x) * w).sum().backward()
    (other(twin) * w).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(layer.weight.grad, other.weight.grad)
    torch.testing.assert_close(layer.running_var, other.running_var)

    def loss(mean_mix, var_mix):
        z = x.detach().numpy()
        a, b = (1 / (1 + np.exp(-float(v))) for v in (mean_mix, var_mix))
        mean = a * z.mean((2, 3), keepdims=True) + (1 - a) * layer.running_mean.numpy().reshape(1, -1, 1, 1)
        var = b * z.var((2, 3), keepdims=True) + (1 - b) * layer.running_var.numpy().reshape(1, -1, 1, 1)
        batch = (z - z.mean((0, 2, 3), keepdims=True)) / np.sqrt(z.var((0, 2, 3), keepdims=True) + 1e-5)
        return (((z - mean) / np.sqrt(var + 1e-5) - batch) ** 2).mean()

    a, b, h = float(layer.mean_mix.detach()), float(layer.var_mix.detach()), 1e-5
    slopes = (loss(a + h, b) - loss(a - h, b)) / (2 * h), (loss(a, b + h) - loss(a, b - h)) / (2 * h)
    np.testing.assert_allclose([float(layer.mean_mix.grad), float(layer.var_mix.grad)], slopes, rtol=1e-5)


@pytest.mark.parametrize("estimate", ["covariance", "matrix"])
def test_population_whitening_by_averaged_covariance_or_matrix(estimate):
    layer = build("population-estimation", 6, estimate=estimate, momentum=None, dtype=torch.float64)
    batches = [images(seed=seed) * (1 + seed) for seed in range(2)]
    found = []
    for x in batches:
        layer(x)
        found.append(np.cov(np.moveaxis(x.numpy(), 1, 0).reshape(6, -1), bias=True))

    def root(sigma):
        values, vectors = np.linalg.eigh(sigma + 1e-5 * np.eye(6))
        return vectors / np.sqrt(values) @ vectors.T

    matrix = root(sum(found) / 2) if estimate == "covariance" else sum(map(root, found)) / 2
    mean = sum(x.numpy().mean((0, 2, 3)) for x in batches) / 2
    expected = np.einsum("ij,njhw->nihw", matrix, batches[0].numpy() - mean.reshape(1, -1, 1, 1))
    np.testing.assert_allclose(layer.eval()(batches[0]).detach(), expected, rtol=1e-8, atol=1e-9)


def test_precise_batch_pools_all_samples():
    layer = build("precise-batch", 6, dtype=torch.float64)
    batches = [images(seed, n=n) + seed for seed, n in enumerate((2, 5, 3))]
    for x in batches:
        layer(x)
    together = torch.cat(batches).numpy()
    np.testing.assert_allclose(layer.running_mean, together.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, together.var((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("centering", {"every": 0}, "every=0"),
        ("generalized-whitened", {"rank": 9}, "rank=9"),
        ("natural-neural-network", {"eps": 0.0}, "eps=0.0"),
        ("example-weighting", {"weight_eval": 2.0}, "weight_eval=2.0"),
        ("evalnorm", {"start": 1.0}, "start=1.0"),
    ],
)
def test_errors(name, options, reason):
    with pytest.raises(ArgumentError, match=reason):
        build(name, 6, **options)
