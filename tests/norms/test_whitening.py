"""Methods that whiten, against formulas written out in numpy, and the roots they use."""

import itertools

import numpy as np
import pytest
import torch

from normscope.core.errors import ArgumentError
from normscope.norms import Batch, Norm, Running, Whiten, build, roots
from normscope.norms.families.concepts import cayley_step
from normscope.norms.families.deconvolution import Deconv2d, DeconvLinear
from tests import references
from tests.norms.keys.key import recorded
from tests.norms.test_areas import close, maps


def spread(condition, size=8, dtype=torch.float64):
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    values = torch.logspace(0, -np.log10(condition), size, dtype=torch.float64)
    return ((basis * values) @ basis.T).to(dtype)


@pytest.mark.parametrize("root", [roots.zca, roots.pca, roots.cholesky], ids=lambda f: f.__name__)
@pytest.mark.parametrize("condition", [1, 1e2, 1e6])
def test_roots_whiten(root, condition):
    sigma = spread(condition)
    assert roots.residual(sigma, root(sigma)) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("iterations", [20, 40, 80])
def test_coupled_newton_stays_where_it_converged(iterations, dtype):
    sigma = spread(414, dtype=dtype)
    assert roots.residual(sigma, roots.newton(sigma, iterations)) < 1e-3


def test_uncoupled_newton_is_the_same_until_it_diverges():
    sigma = spread(414)
    torch.testing.assert_close(roots.newton(sigma, 5, coupled=False), roots.newton(sigma, 5), rtol=1e-9, atol=1e-9)
    assert roots.residual(sigma, roots.newton(sigma, 5)) > 0.5
    assert not roots.residual(sigma, roots.newton(sigma, 25, coupled=False)) < 1


@pytest.mark.parametrize("root", [roots.zca, roots.cholesky, roots.newton], ids=lambda f: f.__name__)
def test_gradients_of_repeated_eigenvalues_are_those_of_finite_differences(root):
    sigma = torch.eye(4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(root, sigma)
    assert torch.autograd.gradgradcheck(root, sigma)


def test_gradients_of_pca_are_finite_for_repeated_eigenvalues_and_right_for_others():
    sigma = torch.diag(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)).requires_grad_()
    (grad,) = torch.autograd.grad(roots.pca(sigma).sum(), sigma)
    assert torch.isfinite(grad).all()
    apart = spread(50, 4).requires_grad_()
    assert torch.autograd.gradcheck(roots.pca, apart)
    assert torch.autograd.gradgradcheck(roots.pca, apart)


def test_a_covariance_that_is_not_one_is_refused():
    for root in (roots.zca, roots.pca, roots.cholesky):
        with pytest.raises(ArgumentError, match="NaN"):
            root(torch.full((3, 3), torch.nan))


def test_a_singular_covariance_whitens_in_the_span_of_the_data():
    x = torch.from_numpy(maps(3, 6, 1, 1))
    y = Norm(Batch(), Whiten("zca", 1e-9), num_features=6)(x).detach().reshape(3, 6).numpy()
    values = np.linalg.eigvalsh(y.T @ y / 3)
    np.testing.assert_allclose(values, [0, 0, 0, 0, 1, 1], atol=1e-6)
    with pytest.raises(ArgumentError, match="3 samples cannot whiten 6 features with eps=0"):
        Norm(Batch(), Whiten("zca", 0.0), num_features=6)(x)


@pytest.mark.parametrize("method", ["zca", "pca", "cholesky"])
def test_groups_of_channels_are_whitened_apart(method):
    x = maps(6, 10, 3, 3)
    layer = build("dbn", 10, group_size=4, method=method, affine=False).double()
    y = layer(torch.from_numpy(x)).detach().numpy()
    # three groups, the last one smaller
    for first, last in ((0, 4), (4, 8), (8, 10)):
        rows = references.channel_rows(x[:, first:last])
        sigma = references.covariance(rows) + 1e-3 * np.eye(last - first)
        found = references.channel_rows(y[:, first:last])
        whitening = found @ np.linalg.pinv(rows - rows.mean(1, keepdims=True))
        np.testing.assert_allclose(whitening @ sigma @ whitening.T, np.eye(last - first), atol=1e-9)
    if method == "zca":
        rows = references.channel_rows(x[:, :4])
        root = references.inverse_root(references.covariance(rows) + 1e-3 * np.eye(4))
        np.testing.assert_allclose(y[:, :4], references.whitened(x[:, :4], root), atol=1e-9)


@pytest.mark.parametrize("population", ["matrix", "sigma", "covariance"])
def test_what_is_averaged_over_batches(population):
    layer = build("dbn", 4, population=population, affine=False, momentum=0.25).double()
    x = [maps(6, 4, 3, 3, seed=seed) * (1 + seed) for seed in range(2)]
    sigmas = [references.covariance(references.channel_rows(v)) for v in x]
    ridge = 1e-3 * np.eye(4)
    for value in x:
        layer(torch.from_numpy(value))
    average = lambda a, b: 0.75 * (0.75 * np.eye(4) + 0.25 * a) + 0.25 * b  # noqa: E731
    expected = {
        "matrix": lambda: average(*(references.inverse_root(s + ridge) for s in sigmas)),
        "sigma": lambda: references.inverse_root(average(*(s + ridge for s in sigmas))),
        "covariance": lambda: references.inverse_root(average(*sigmas) + ridge),
    }[population]()
    mean = 0.75 * 0.25 * x[0].mean((0, 2, 3)) + 0.25 * x[1].mean((0, 2, 3))
    rows = expected @ (references.channel_rows(x[0]) - mean[:, None])
    close(layer.eval()(torch.from_numpy(x[0])), references.from_rows(rows, x[0].shape), 1e-9)


def test_recorded_pca_up_to_the_signs_of_rows():
    data = recorded("sbw_pca")
    layer = build("bw", 8, method="pca", group_size=4).double()
    state = layer.state_dict()
    for name in ("weight", "bias"):
        state[name].copy_(data[f"state0/{name}"].flatten())
    pieces = lambda when, what: torch.stack([data[f"{when}/PCAWhitening_Groups.{i}.{what}"] for i in range(2)])  # noqa: E731
    state["running_mean"].copy_(pieces("state0", "running_mean").flatten())
    bias = data["state0/bias"]
    matrices = []
    for step in "123":
        x = data[f"x{step}"].clone().requires_grad_()
        y = layer(x)
        matrices.append(layer.statistics(x)["matrix"].detach())
        if step == "2":
            continue
        sign = ((y - bias) * (data[f"y{step}"] - bias)).sum((0, 2, 3), keepdim=True).sign().detach()
        torch.testing.assert_close((y - bias) * sign + bias, data[f"y{step}"], rtol=0, atol=1e-9)
        (grad,) = torch.autograd.grad((((y - bias) * sign + bias) * data[f"w{step}"]).sum(), x)
        torch.testing.assert_close(grad, data[f"gx{step}"], rtol=0, atol=1e-9)
    torch.testing.assert_close(layer.running_mean, pieces("state3", "running_mean").flatten(), rtol=0, atol=1e-9)
    start, end = pieces("state0", "running_projection"), pieces("state3", "running_projection")
    for group, row in np.ndindex(2, 4):
        tries = itertools.product((1, -1), repeat=3)
        sums = [sum(0.1 * 0.9 ** (2 - k) * s[k] * matrices[k][group, row] for k in range(3)) for s in tries]
        errors = [(0.9**3 * start[group, row] + total - end[group, row]).abs().max() for total in sums]
        assert min(errors) < 1e-9
    state["running_matrix"].copy_(end)
    torch.testing.assert_close(layer.eval()(data["x_eval"]), data["y_eval"], rtol=0, atol=1e-9)


def test_renorm_whitens_by_the_stored_covariance():
    x = maps(6, 4, 3, 3)
    layer = build("wc", 4, renorm=True, affine=False, momentum=0.5).double()
    # what is stored at first is the identity
    centered = x - x.mean((0, 2, 3), keepdims=True)
    close(layer(torch.from_numpy(x)), centered, 1e-9)
    sigma = 0.5 * np.eye(4) + 0.5 * references.covariance(references.channel_rows(x), 1)
    root = np.linalg.inv(np.linalg.cholesky((1 - 1e-3) * sigma + 1e-3 * np.eye(4)))
    close(layer(torch.from_numpy(x)), references.whitened(x, root), 1e-9)


def test_coloring_by_class():
    x, labels = maps(4, 3, 2, 2), torch.tensor([0, 2, 1, 2])
    layer = build("wc", 3, classes=3, kernels=2).double()
    plain = build("wc", 3, affine=False).double()(torch.from_numpy(x)).detach().numpy()
    close(layer(torch.from_numpy(x), labels), plain)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    y = layer(torch.from_numpy(x), labels).detach().numpy()
    for n, label in enumerate(labels.tolist()):
        own = sum(p["embedding"][label, k] * p["class_weight"][k] for k in range(2))
        expected = np.einsum("ij,jhw->ihw", p["weight"] + own, plain[n])
        expected += (p["bias"] + p["class_bias"][label])[:, None, None]
        np.testing.assert_allclose(y[n], expected, atol=1e-9)
    with pytest.raises(ArgumentError, match=r"condition=None: ClassColoring.* needs the labels"):
        layer(torch.from_numpy(x))


def test_deconvolution_is_a_convolution_of_whitened_patches():
    x = maps(4, 3, 5, 5)
    layer = Deconv2d(3, 2, 3, block=3, sampling_stride=1, iterations=30).double()
    patches = torch.nn.functional.unfold(torch.from_numpy(x), 3).numpy()
    rows = np.moveaxis(patches, 1, 0).reshape(27, -1)
    root = references.inverse_root(references.covariance(rows) + 1e-5 * np.eye(27))
    weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
    out = weight.reshape(2, 27) @ root @ (rows - rows.mean(1, keepdims=True)) + bias[:, None]
    expected = np.moveaxis(out.reshape(2, 4, 3, 3), 0, 1)
    close(layer(torch.from_numpy(x)), expected, 1e-6)


def test_deconvolution_of_a_linear_layer_removes_mean_and_covariance():
    x = maps(200, 4)
    layer = DeconvLinear(4, 4, iterations=30).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
        layer.bias.zero_()
    y = layer(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(y.T @ y / 200, np.eye(4), atol=1e-4)


def test_channel_equilibrium_mixes_by_its_gate():
    x = maps(6, 8, 3, 3)
    layer = build("ce", 8, group_size=4, iterations=30).double()
    with torch.no_grad():
        layer.gate.fill_(1e3)
    y = layer(torch.from_numpy(x)).detach().numpy()
    for first in (0, 4):
        rows = references.channel_rows(x[:, first : first + 4])
        root = references.inverse_root(references.covariance(rows) + 1e-5 * np.eye(4))
        expected = references.from_rows(root @ rows, x[:, :4].shape)
        np.testing.assert_allclose(y[:, first : first + 4], expected, atol=1e-8)
    with torch.no_grad():
        layer.gate.fill_(-1e3)
    variance = x.var((2, 3), ddof=1)
    weights = layer.fc(torch.from_numpy(variance)).detach().numpy()
    close(layer(torch.from_numpy(x)), x * weights[:, :, None, None] / np.sqrt(variance.mean()))


def test_isotropic_factors_keep_the_total_variance():
    x = maps(64, 5, seed=2) @ np.random.default_rng(0).normal(size=(5, 5))
    layer = build("isobn", 5).double()
    y = layer(torch.from_numpy(x)).detach().numpy()
    sigma = references.covariance(x.T)
    theta = references.isotropic_factors(np.sqrt(np.diag(sigma)), sigma)
    np.testing.assert_allclose(y, x * theta, atol=1e-9)
    assert y.var(0).sum() == pytest.approx(x.var(0).sum(), rel=1e-3)
    close(layer.eval()(torch.from_numpy(x)), x * theta, 1e-9)


def test_shuffled_groups_change_and_stay_in_place_in_evaluation():
    x = torch.from_numpy(maps(16, 8, 1, 1))
    layer = build("shuffled-decorrelated", 8, groups=2).double()
    torch.manual_seed(0)
    passes = [layer(x) for _ in range(4)]
    assert not all(torch.allclose(passes[0], other) for other in passes[1:])
    assert torch.allclose(layer.eval()(x), layer(x))


def test_domains_share_the_affine_map_and_nothing_else():
    x = maps(6, 4, 3, 3)
    layer = build("dwt", 4, domains=2).double()
    with torch.no_grad():
        layer.weight.fill_(3.0)
    y = layer(torch.from_numpy(x)).detach().numpy()
    for part in (slice(0, 3), slice(3, 6)):
        sigma = references.covariance(references.channel_rows(x[part]))
        root = np.linalg.inv(np.linalg.cholesky((1 - 1e-3) * sigma + 1e-3 * np.eye(4)))
        np.testing.assert_allclose(y[part], 3 * references.whitened(x[part], root), atol=1e-9)
    layer.eval()
    assert torch.equal(layer(torch.from_numpy(x)), layer(torch.from_numpy(x), 1))
    with pytest.raises(ArgumentError, match="domain=2 must be at least 0 and below domains=2"):
        layer(torch.from_numpy(x), 2)
    with pytest.raises(ArgumentError, match="a batch of 5 has no 2 equal parts"):
        layer.train()(torch.from_numpy(x[:5]))


def test_group_coloring():
    x, rng = maps(3, 4, 2, 2), np.random.default_rng(1)
    s, shift = rng.normal(size=(3, 2, 2, 2)), rng.normal(size=(3, 4))
    layer = build("gdwct", 4, groups=2).double()
    y = layer(torch.from_numpy(x), (torch.from_numpy(s), torch.from_numpy(shift))).detach().numpy()
    centered = x - x.mean((0, 2, 3), keepdims=True)
    colored = np.empty_like(x)
    for n, g in np.ndindex(3, 2):
        lengths = np.linalg.norm(s[n, g], axis=0)
        unit = s[n, g] / lengths
        matrix = unit @ np.diag(lengths) @ unit.T
        rows = slice(2 * g, 2 * g + 2)
        colored[n, rows] = np.einsum("ij,jhw->ihw", matrix, centered[n, rows]) + shift[n, rows, None, None]
    np.testing.assert_allclose(y, 0.6 * colored + 0.4 * x, atol=1e-7)
    white = build("dbn", 4, group_size=2, eps=1e-12, affine=False).double()(torch.from_numpy(x))
    assert layer.penalty(white) < 0.1 < layer.penalty(5 * white)


@pytest.mark.parametrize("activation", ["pool_max", "max", "pos_mean", "mean"])
@pytest.mark.parametrize("published", [False, True])
def test_concepts_collect_where_a_channel_is_active(activation, published):
    x = maps(4, 3, 6, 6)
    layer = build("cw", 3, activation=activation, published=published).double()
    y = layer(torch.from_numpy(x), 1).detach().numpy()
    row = np.zeros(3)
    for n, c in np.ndindex(4, 3):
        seen = y[n, c if published else 1]
        mask = {
            "mean": lambda v: np.ones_like(v),
            "pos_mean": lambda v: v > 0,
            "max": lambda v: v == v.max(),
            "pool_max": lambda v: v == v.reshape(2, 3, 2, 3).max((1, 3)).repeat(3, 0).repeat(3, 1),
        }[activation](seen)
        row[c] -= (y[n, c] * mask).sum() / (mask.sum() + (1e-4 if activation == "pos_mean" else 0)) / 4
    close(layer.gradient[1], 0.05 * row, 1e-10)
    assert layer.gradient[0].abs().max() == 0
    assert layer.counter.tolist() == pytest.approx([0.001, 1.001, 0.001])


def test_rotating_makes_a_channel_more_active_for_its_concept():
    x = torch.from_numpy(maps(16, 4, 6, 6))
    layer = build("cw", 4, activation="max").double()
    before = layer(x, 2)[:, 2].amax((1, 2)).mean()
    for _ in range(40):
        layer(x, 2)
    layer.rotate()
    assert layer(x)[:, 2].amax((1, 2)).mean() > before
    torch.testing.assert_close(layer.rotation @ layer.rotation.T, torch.eye(4).double(), rtol=0, atol=1e-6)


def test_a_cayley_step_lowers_the_objective_and_stays_orthogonal():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    start = torch.eye(5, dtype=torch.float64)
    moved = cayley_step(start, gradient)
    assert (gradient * moved).sum() < (gradient * start).sum()
    torch.testing.assert_close(moved @ moved.T, start, rtol=0, atol=1e-10)


def composed(layer, x):
    """The same layer with the gradient that autograd finds."""
    layer._whitens_jointly = lambda z: False
    return layer(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: build("iterative", 8),
        lambda: build("iterative", 8, groups=2),
        lambda: build("gw", 8, groups=2),
        lambda: build("gw", 8, groups=4, method="zca", affine=False),
        lambda: build("network-deconvolution", 8, block=4),
        lambda: Norm(Batch(2, "last"), Whiten("newton"), population=Running(), num_features=8),
    ],
)
def test_the_gradient_written_by_hand_is_that_of_autograd(make, monkeypatch):
    monkeypatch.setattr("normscope.norms.whitening._CACHED", 50)  # several chunks
    results = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        layer = make().double()
        x = torch.randn(6, 8, 5, 8, dtype=torch.float64, requires_grad=True)
        assert layer._whitens_jointly(layer.area.split(x, layer.area.axis(x, 8)))
        y = layer(x) if by_hand else composed(layer, x)
        (grad,) = torch.autograd.grad((y * torch.arange(8.0)).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x, retain_graph=True)
        parameters = torch.autograd.grad(y.pow(3).sum(), list(layer.parameters())) if layer.weight is not None else ()
        results.append((y, grad, second, *parameters, *layer.buffers()))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Whiten("svd"), "method='svd' is unknown; .*Options: zca, pca, cholesky, newton"),
        (lambda: Whiten(eps=-1.0), r"eps=-1.0 must be at least 0"),
        (lambda: Whiten(iterations=0), "iterations=0 must be at least 1; the published number is 5"),
        (lambda: build("cw", 4)(torch.rand(2, 4, 3, 3), 4), "concept=4 must be below num_features=4"),
        (lambda: build("gdwct", 4)(torch.rand(2, 4, 3, 3)), "style=None: coloring needs"),
    ],
)
def test_errors_name_argument_value_and_way_out(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
