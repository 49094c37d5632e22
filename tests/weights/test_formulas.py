"""Independent formulas in float64 numpy for what has no recorded number."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from normscope.norms import build
from normscope.weights import (
    CosineConv2d,
    GatedOrthogonalCell,
    OrthogonalCell,
    apply,
    complex_modrelu,
    regularizer,
    retract,
    selective_mask,
)
from normscope.weights.layers import originals, parametrized
from normscope.weights.parametrization import Layout
from normscope.weights.recurrent import complex_form, real_form
from normscope.weights.rotations import round_robin

torch.set_num_threads(1)


def method(layer):
    return next(parametrized(layer))[3]


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cell(name, size=6, **options):
    torch.manual_seed(0)
    return apply(nn.RNNCell(3, size).double(), name, **options)


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=atol)


def basis(n):
    """The basis of u(n), with the place of each coefficient."""
    for k in range(n):
        for j in range(n):
            t = np.zeros((n, n), complex)
            if k > j:
                t[k, j], t[j, k] = 1, -1
            elif k < j:
                t[k, j] = t[j, k] = 1j
            else:
                t[k, k] = 1j * math.sqrt(2)
            yield (k, j), t


def real(u):
    return np.block([[u.real, -u.imag], [u.imag, u.real]])


@pytest.mark.parametrize("name", ["unitary-lie-algebra", "full-capacity-unitary"])
def test_unitary_from_the_lie_algebra(name):
    layer = cell(name)
    (p,) = originals(layer, "weight_hh")
    base = complex_form(method(layer).base).numpy()
    close(layer.weight_hh, real(base))
    p.data.copy_(draws(3, 3) / 2)
    s = sum(float(p.detach()[place]) * t for place, t in basis(3))
    eye = np.eye(3)
    q = scipy.linalg.expm(s) if name == "unitary-lie-algebra" else np.linalg.inv(eye - s / 2) @ (eye + s / 2)
    close(layer.weight_hh, real(q @ base))


def test_full_capacity_step_is_the_published_one():
    layer = cell("full-capacity-unitary")
    (p,), target, rate = originals(layer, "weight_hh"), draws(6, 6), 0.1
    for _ in range(3):
        x = complex_form(layer.weight_hh.detach()).numpy()
        loss = (layer.weight_hh - target).square().sum()
        (grad,) = torch.autograd.grad(loss, p)
        # gradient with respect to X: of the real and the imaginary part of each entry
        g = 2 * (real(x) - target.numpy())
        g = (g[:3, :3] + g[3:, 3:]) + 1j * (g[3:, :3] - g[:3, 3:])
        a = g @ x.conj().T - x @ g.conj().T
        expected = np.linalg.solve(np.eye(3) + rate / 2 * a, (np.eye(3) - rate / 2 * a) @ x)
        with torch.no_grad():
            p -= rate * grad
        retract(layer)
        assert p.abs().max() == 0
        close(layer.weight_hh, real(expected))


def test_real_form_acts_on_stacked_states():
    u, z = torch.complex(draws(3, 3), draws(3, 3, seed=1)), torch.complex(draws(3, seed=2), draws(3, seed=3))
    close(real_form(u) @ torch.cat([z.real, z.imag]), torch.cat([(u @ z).real, (u @ z).imag]).numpy())
    close(complex_form(real_form(u)), u.numpy())


@pytest.mark.parametrize(("size", "layers"), [(6, None), (5, None), (6, 2)])
def test_givens(size, layers):
    layer = cell("givens", size, layers=layers)
    (theta,) = originals(layer, "weight_hh")
    pairs = [pair for part in round_robin(size)[:layers] for pair in part]
    assert len(theta) == len(pairs) == (size * (size - 1) // 2 if layers is None else 6)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    product = np.eye(size)
    for (i, j), angle in zip(pairs, theta.detach().numpy(), strict=True):
        rotation = np.eye(size)
        rotation[i, i] = rotation[j, j] = math.cos(angle)
        rotation[i, j], rotation[j, i] = -math.sin(angle), math.sin(angle)
        product = rotation @ product
    close(layer.weight_hh, product)


@pytest.mark.parametrize(("size", "negatives"), [(6, None), (5, 0), (5, 3)])
def test_scaled_cayley(size, negatives):
    layer = cell("scaled-cayley", size, negatives=negatives)
    (raw,) = originals(layer, "weight_hh")
    a = np.tril(raw.detach().numpy(), -1)
    a = a - a.T
    # at first 2 x 2 rotations by angles from 0 to pi / 2
    blocks = [a[k + 1, k] for k in range(0, size - 1, 2)]
    assert all(0 < s < 1 for s in blocks)
    assert np.count_nonzero(a) == 2 * len(blocks)
    raw.data.copy_(draws(size, size))
    a = np.tril(raw.detach().numpy(), -1)
    a = a - a.T
    count = size // 2 if negatives is None else negatives
    d = np.diag([1.0] * (size - count) + [-1.0] * count)
    w = np.linalg.inv(np.eye(size) + a) @ (np.eye(size) - a) @ d
    close(layer.weight_hh, w)
    # the gradient of the paper: V = (I + A)^-T dW (D + W^T), dA = V^T - V, here of the strict lower triangle
    gw = draws(size, size, seed=1)
    (grad,) = torch.autograd.grad((layer.weight_hh * gw).sum(), raw)
    v = np.linalg.inv(np.eye(size) + a).T @ gw.numpy() @ (d + w.T)
    close(grad, np.tril(v.T - v, -1))


def test_factorized_orthogonality():
    torch.manual_seed(0)
    layer = apply(nn.Linear(4, 6, bias=False).double(), "soft-orthogonal-svd", margin=0.3)
    left, p, right = originals(layer, "weight")
    for raw in (left, right):
        raw.data += 0.3 * draws(*raw.shape)
    p.data.copy_(draws(4))
    s = np.linalg.svd(layer.weight.detach().numpy(), compute_uv=False)
    expected = 2 * 0.3 / (1 + np.exp(-p.detach().numpy())) + 1 - 0.3
    np.testing.assert_allclose(s, np.sort(expected)[::-1], atol=1e-12)
    before = layer.weight.detach().clone()
    retract(layer)
    close(layer.weight, before.numpy())


def test_singular_value_bounding():
    w = draws(4, 6)
    layer = nn.Linear(6, 4).double()
    layer.weight.data.copy_(w)
    apply(layer, "svb", orthogonalize=False)
    u, s, v = np.linalg.svd(w.numpy(), full_matrices=False)
    close(layer.weight, u @ np.diag(np.clip(s, 1 / 1.05, 1.05)) @ v)
    layer = nn.Linear(6, 4).double()
    layer.weight.data.copy_(w)
    close(apply(layer, "svb").weight, u @ v)


def test_parseval_divides_convolutions_by_the_root_of_their_taps():
    layer = nn.Conv2d(3, 4, 3).double()
    w = layer.weight.detach().clone()
    apply(layer, "parseval")
    close(layer.weight, w.numpy())
    close(originals(layer, "weight")[0], 3 * w.numpy())


def test_projection_follows_the_plain_gradient_and_normalizes():
    layer = apply(nn.Linear(6, 4, bias=False).double(), "projection")
    (raw,) = originals(layer, "weight")
    with torch.no_grad():
        raw += (g := draws(4, 6))
    moved = raw.detach().clone()
    retract(layer)
    close(raw, (moved / moved.norm(dim=1, keepdim=True)).numpy())
    assert g.shape == raw.shape


def test_orthogonal_weights_by_eigenvalues():
    w = draws(6, 8)
    layer = nn.Linear(8, 6).double()
    layer.weight.data.copy_(w)
    apply(layer, "orthogonal", groups=2, scale=1.2)
    expected = []
    for part in w.numpy().reshape(2, 3, 8):
        z = part - part.mean(1, keepdims=True)
        values, vectors = np.linalg.eigh(z @ z.T)
        expected.append(1.2 * vectors @ np.diag(values**-0.5) @ vectors.T @ z)
    close(layer.weight, np.concatenate(expected))


@pytest.mark.parametrize(("outputs", "inputs"), [(4, 7), (7, 4)])
def test_newton_by_eigenvalues(outputs, inputs):
    w = draws(outputs, inputs)
    layer = nn.Linear(inputs, outputs).double()
    layer.weight.data.copy_(w)
    apply(layer, "oni", iterations=6, center=False, scale=1.0)
    u, s, v = np.linalg.svd(w.numpy(), full_matrices=False)
    size = np.linalg.norm(s**2 + 1e-5)
    b, x = np.ones_like(s), (s**2 + 1e-5) / size
    for _ in range(6):
        b = 1.5 * b - 0.5 * b**3 * x
    close(layer.weight, u @ np.diag(b * s / math.sqrt(size)) @ v)


def test_a_transposed_convolution_has_a_row_for_each_output():
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2).double()
    apply(layer, "centered", scale=1.0, eps=1e-12)
    for group in range(2):
        for unit in range(2):
            taps = layer.weight.detach()[3 * group : 3 * group + 3, unit]
            assert float(taps.square().sum()) == pytest.approx(1)
            assert float(taps.sum()) == pytest.approx(0, abs=1e-12)
    layout = Layout.of(layer)
    w = draws(6, 2, 3, 3)
    assert torch.equal(layout.back(layout.rows(w), w.shape), w)


@pytest.mark.parametrize("centered", [False, True])
def test_cosine_of_each_patch(centered):
    torch.manual_seed(0)
    layer = CosineConv2d(4, 6, 3, stride=2, padding=1, groups=2, centered=centered).double()
    x = draws(2, 4, 5, 5)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = layer(x).detach().numpy()
    for n, c, i, j in np.ndindex(y.shape):
        first = c // 3 * 2
        patch = padded[n, first : first + 2, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].ravel()
        w = layer.weight[c].detach().numpy().ravel()
        if centered:
            patch, w = patch - patch.mean(), w - w.mean()
        assert y[n, c, i, j] == pytest.approx(patch @ w / np.linalg.norm(patch) / np.linalg.norm(w), abs=1e-12)


def test_complex_modrelu():
    x, b = draws(4, 6), draws(3, seed=1)
    z = x[:, :3].numpy() + 1j * x[:, 3:].numpy()
    expected = z * np.maximum(np.abs(z) + b.numpy(), 0) / (np.abs(z) + 1e-5)
    close(complex_modrelu(x, b), np.concatenate([expected.real, expected.imag], 1))


@pytest.mark.parametrize("weight", ["givens", "scaled-cayley", "exponential", "unitary"])
def test_the_absolute_value_and_an_orthogonal_matrix_keep_lengths(weight):
    torch.manual_seed(0)
    layer = OrthogonalCell(3, 6, weight, "absolute").double()
    nn.init.zeros_(layer.bias)
    state = draws(2, 6)
    start = state.requires_grad_()
    for _ in range(50):
        state = layer(torch.zeros(2, 3, dtype=torch.float64), state)
    assert torch.allclose(state.norm(dim=1), start.norm(dim=1))
    g = draws(2, 6, seed=1)
    (back,) = torch.autograd.grad(state, start, g)
    assert torch.allclose(back.norm(dim=1), g.norm(dim=1))


def test_cells_compute_their_formula():
    torch.manual_seed(0)
    x, h = draws(2, 3), draws(2, 6, seed=1)
    layer = OrthogonalCell(3, 6, "unitary", "complex-modrelu").double()
    total = x @ layer.weight_ih.T + h @ layer.weight_hh.T
    close(layer(x, h), complex_modrelu(total, layer.bias).detach().numpy())
    close(layer(x), complex_modrelu(x @ layer.weight_ih.T, layer.bias).detach().numpy())
    gated = GatedOrthogonalCell(3, 6).double()
    r, z = np.split(1 / (1 + np.exp(-gated.gates(torch.cat([x, h], 1)).detach().numpy())), 2, 1)
    q = gated.recurrent.weight.detach().numpy()
    t = x.numpy() @ gated.input.weight.detach().numpy().T + r * (h.numpy() @ q.T)
    c = np.sign(t) * np.maximum(np.abs(t) + 1e-3 + gated.bias.detach().numpy(), 0)
    close(gated(x, h), z * h.numpy() + (1 - z) * c)
    np.testing.assert_allclose(q @ q.T, np.eye(6), atol=1e-12)


def gram(w, side):
    g = w @ w.T if side == "out" else w.T @ w
    return g - np.eye(len(g))


MATRIX = {
    "so": lambda w: (gram(w, "out") ** 2).sum(),
    "dso": lambda w: (gram(w, "out") ** 2).sum() + (gram(w, "in") ** 2).sum(),
    "mc": lambda w: np.abs(gram(w, "out")).max(),
    "biggan": lambda w: ((w @ w.T - np.diag(np.diag(w @ w.T))) ** 2).sum() / 2,
    "parseval": lambda w: (gram(w, "out") ** 2).sum() / 2,
    "spectral": lambda w: np.linalg.svd(w)[1][0] ** 2 / 2,
}


@pytest.mark.parametrize("name", MATRIX)
def test_penalties_of_matrices(name):
    model = nn.ModuleDict({"a": nn.Linear(7, 4), "b": nn.Conv2d(2, 3, 3), "norm": nn.BatchNorm2d(3)}).double()
    penalty = regularizer(name, strength=0.5)
    expected = {path: 0.5 * MATRIX[name](model[path].weight.detach().flatten(1).numpy()) for path in "ab"}
    found = penalty.per_layer(model)
    assert {path: float(value.detach()) for path, value in found.items()} == pytest.approx(expected)
    assert float(penalty(model).detach()) == pytest.approx(sum(expected.values()))
    assert torch.autograd.gradgradcheck(lambda w: penalty.row.value(w), draws(3, 5).requires_grad_())
    assert torch.autograd.gradcheck(lambda w: penalty.row.value(w), draws(5, 3).requires_grad_())


def test_the_side_of_the_gram_matrix_changes_a_squared_penalty_by_a_constant():
    layer = nn.Linear(7, 4).double()
    values = [float(regularizer("so", side=side)(layer).detach()) for side in ("out", "in", "short")]
    assert values[1] - values[0] == pytest.approx(3)
    assert values[2] == values[0]


def test_mutual_coherence_as_a_matrix_norm():
    layer = nn.Linear(7, 4).double()
    expected = np.abs(gram(layer.weight.detach().numpy(), "out")).sum(1).max()
    assert float(regularizer("mc", norm="row-sum")(layer).detach()) == pytest.approx(expected)


@pytest.mark.parametrize("style", ["rayleigh", "growth"])
def test_spectral_restricted_isometry(style):
    torch.manual_seed(0)
    layer = nn.Linear(7, 4).double()
    a, b = gram(layer.weight.detach().numpy(), "out"), draws(4).numpy()
    v = a @ b / np.linalg.norm(a @ b)
    u = a @ v / np.linalg.norm(a @ v)
    expected = (u @ a @ v) ** 2 if style == "rayleigh" else np.linalg.norm(a @ v) ** 2
    found = regularizer("srip", style=style, start=draws(4))(layer)
    assert float(found.detach()) == pytest.approx(expected)
    exact = np.abs(np.linalg.eigvalsh(a)).max() ** 2
    penalty = regularizer("srip", style=style)
    state = torch.get_rng_state()
    values = [float(penalty(layer).detach()) for _ in range(200)]
    assert torch.equal(state, torch.get_rng_state())
    assert max(values) <= exact * (1 + 1e-9)
    assert len(set(values)) == 200
    assert max(values) > 0.9 * exact  # a start near the eigenvector is not rare in 4 dimensions


def circular(kernel, size):
    """The matrix of a convolution of stride 1 on a torus."""
    shape = kernel.shape[1], size, size
    columns = torch.eye(math.prod(shape), dtype=kernel.dtype).reshape(-1, *shape)
    padded = nn.functional.pad(columns, (1, 1, 1, 1), mode="circular")
    return nn.functional.conv2d(padded, kernel).flatten(1).T


@pytest.mark.parametrize(("side", "inputs", "outputs"), [("out", 4, 2), ("in", 2, 4)])
def test_orthogonal_convolution_is_that_of_the_operator(side, inputs, outputs):
    kernel, size = draws(outputs, inputs, 3, 3) / 4, 6
    dense = circular(kernel, size)
    error = (dense @ dense.T if side == "out" else dense.T @ dense) - torch.eye(size**2 * min(inputs, outputs))
    layer = nn.Conv2d(inputs, outputs, 3).double()
    layer.weight.data.copy_(kernel)
    found = regularizer("orthogonal-convolution", strength=1.0, side=side, squared=True)(layer)
    # each of the positions of the torus repeats the same rows
    assert float(found.detach()) == pytest.approx(float(error.square().sum()) / size**2)


def test_isometric_penalty_is_half_of_the_operators():
    kernel, size = draws(2, 4, 3, 3) / 4, 6
    dense = circular(kernel, size)
    error = dense @ dense.T - torch.eye(size**2 * 2)
    for transposed in (False, True):
        layer = nn.Conv2d(2, 4, 3) if transposed else nn.Conv2d(4, 2, 3)
        layer.double().weight.data.copy_(kernel.transpose(0, 1) if transposed else kernel)
        found = float(regularizer("isometric", strength=1.0)(layer).detach())
        assert found == pytest.approx(float(error.square().sum()) / size**2 / 2)


def test_groups_of_a_convolution_count_for_themselves():
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    parts = [nn.Conv2d(2, 3, 3).double() for _ in range(2)]
    for part, kernel in zip(parts, layer.weight.detach().chunk(2), strict=True):
        part.weight.data.copy_(kernel)
    penalty = regularizer("isometric")
    assert torch.allclose(penalty(layer), penalty(nn.ModuleList(parts)))
    apply(layer, "isometric")
    assert float(penalty(layer).detach()) == 0
    assert layer.weight.detach().flatten(1).square().sum(1).tolist() == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("direction", ["stored-batch", "batch-stored"])
def test_matching_of_statistics_is_a_divergence_of_gaussians(direction):
    norm = build("batch", 3).double()
    norm.running_mean.copy_(draws(3))
    norm.running_var.copy_(draws(3, seed=1).square() + 0.5)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    x = draws(4, 3, 5, 5, seed=2) * 2 + 1
    normal = torch.distributions.Normal
    stored = normal(norm.running_mean, (norm.running_var + norm.eps).sqrt())
    batch = normal(x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + norm.eps).sqrt())
    pair = (stored, batch) if direction == "stored-batch" else (batch, stored)
    penalty = regularizer("bnm", direction=direction)
    expected = torch.distributions.kl_divergence(*pair).mean()
    torch.testing.assert_close(penalty(norm, x), expected)
    torch.testing.assert_close(penalty({"a": (norm, x), "b": (norm, x)}), 2 * expected)
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())
    exact = norm.running_mean[:, None] + (norm.running_var[:, None]).sqrt() * torch.tensor([-1.0, 1.0])
    assert float(penalty(norm, exact.T)) == pytest.approx(0, abs=1e-12)
    assert torch.autograd.gradgradcheck(lambda t: penalty(norm, t), x[:, :, :2, :1].clone().requires_grad_())


def test_selected_covariances_are_those_that_change_with_the_style():
    plain = draws(5, 4, 4)
    changed = plain.clone()
    changed[:, 0, 2] += 3.0
    changed[:, 1, 3] += 3.1
    changed[:, 0, 1] += 0.5
    mask = selective_mask(plain, changed)
    assert mask.nonzero().tolist() == [[0, 1], [0, 2], [1, 3]]
    assert selective_mask(plain, changed, kept=2).nonzero().tolist() == [[0, 2], [1, 3]]
