"""What each method promises, over random shapes."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normscope.weights import INVARIANCES, apply, in_manifold, remove, retract, zoo
from normscope.weights.layers import originals, parametrized
from normscope.weights.parametrization import Layout

torch.set_num_threads(1)

CELLS = [name for name, row in zoo.items() if row.layers == (nn.RNNCellBase,)]
OTHERS = [name for name in zoo if name not in CELLS]


def tensor_of(layer):
    return "weight_hh" if isinstance(layer, nn.RNNCellBase) else "weight"


def weight(layer):
    return getattr(layer, tensor_of(layer))


def layers(name, seed=0):
    """Layers of every kind that a method takes, in float64."""
    torch.manual_seed(seed)
    if name in CELLS:
        return [nn.RNNCell(3, 6).double(), nn.GRUCell(3, 2).double()][:1]
    found = [
        nn.Linear(7, 4),
        nn.Linear(4, 7),
        nn.Conv1d(3, 4, 3),
        nn.Conv2d(3, 5, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
    ]
    return [layer.double() for layer in found if name != "isometric" or not isinstance(layer, nn.Linear)]


def inputs(layer):
    if isinstance(layer, nn.RNNCellBase):
        return torch.randn(2, layer.input_size, dtype=torch.float64), torch.randn(2, layer.hidden_size).double()
    if isinstance(layer, nn.Linear):
        return (torch.randn(2, layer.in_features, dtype=torch.float64),)
    return (torch.randn(2, layer.in_channels, *[5] * (layer.weight.ndim - 2), dtype=torch.float64),)


def step(layer, rate=0.05):
    """A step of gradient descent on some loss."""
    parameters = list(layer.parameters())
    grads = torch.autograd.grad(layer(*inputs(layer)).square().sum(), parameters, allow_unused=True)
    with torch.no_grad():
        for p, g in zip(parameters, grads, strict=True):
            if g is not None:
                p -= rate * g / (g.norm() + 1e-12)


@pytest.mark.parametrize("name", zoo)
def test_weights_are_on_the_manifold_and_stay_there(name):
    for layer in layers(name):
        apply(layer, name)
        for _ in range(3):
            step(layer)
            retract(layer)
        for _ in range(40 if name == "spectral" else 0):
            layer(*inputs(layer))  # power iteration catches up
        if name not in {"parseval", "isometric"}:  # these approach it: parseval by its step, isometric by its penalty
            assert in_manifold(layer) == {"": True}, layer
        elsewhere = weight(layer).detach() * 3 + 1
        method = next(parametrized(layer))[3]
        assert name == "weight-norm" or not method.in_manifold(elsewhere)
        assert not method.in_manifold(elsewhere * torch.nan)


@pytest.mark.parametrize("name", ["parseval", "isometric"])
def test_what_approaches_the_manifold_gets_there(name):
    for layer in layers(name):
        apply(layer, name, **({"beta": 0.5} if name == "parseval" else {}))
        if name == "parseval":
            with torch.no_grad():
                originals(layer, "weight")[0].div_(3)
        for _ in range(60):
            retract(layer)
        assert in_manifold(layer, 1e-6) == {"": True}


@pytest.mark.parametrize("name", zoo)
def test_a_method_keeps_the_shape_and_can_be_taken_off(name):
    for layer in layers(name):
        shape, count = weight(layer).shape, len(list(layer.parameters()))
        apply(layer, name)
        layer.eval()
        used, x = weight(layer).detach().clone(), inputs(layer)
        y = layer(*x)
        assert used.shape == shape
        remove(layer)
        assert not list(parametrized(layer))
        assert [n for n, _ in layer.named_parameters()].count(tensor_of(layer)) == 1
        assert len(list(layer.parameters())) == count
        torch.testing.assert_close(weight(layer).detach(), used, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer(*x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", zoo)
def test_state_and_copies(name):
    for layer, other in zip(layers(name), layers(name, seed=1), strict=True):
        apply(layer, name)
        apply(other, name)
        step(layer)
        step(other)
        layer.eval()
        other.eval()
        used = weight(layer).detach()
        assert not torch.equal(weight(other), used)
        torch.testing.assert_close(weight(copy.deepcopy(layer)).detach(), used, rtol=0, atol=0)
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(weight(other).detach(), used, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, row in zoo.items() if row.invariance != "none"])
def test_scale_invariance(name):
    row = zoo[name]
    for layer in layers(name):
        apply(layer, name)
        layer.eval()
        layout, raw = Layout.of(layer), originals(layer, "weight")[-1]
        used = weight(layer).detach().clone()
        rows = layout.rows(raw.detach())
        per_dim = name == "weight-norm" and layout.transposed  # torch takes the groups of a unit together
        factor = torch.linspace(1, 5, len(rows), dtype=torch.float64)[:, None] if row.invariance == "row" else 3.0
        factor = 3.0 if per_dim else factor
        with torch.no_grad():
            raw.copy_(layout.back(rows * factor, raw.shape))
        torch.testing.assert_close(weight(layer).detach(), used, rtol=1e-3, atol=1e-3)
        units = len(rows) // next(parametrized(layer))[3].groups if name == "orthogonal" else len(rows)
        if row.invariance == "tensor" and units > 1:
            with torch.no_grad():
                raw.copy_(layout.back(rows * torch.linspace(1, 5, len(rows)).double()[:, None], raw.shape))
            assert (weight(layer) - used).abs().max() > 1e-2


def test_none_means_none():
    for name, row in zoo.items():
        assert row.invariance in INVARIANCES
        if row.invariance == "none" and row.layers != (nn.RNNCellBase,):
            layer = layers(name)[-1]
            apply(layer, name)
            step(layer, 0.5)
            used = weight(layer).detach().clone()
            with torch.no_grad():
                for raw in originals(layer, "weight"):
                    raw.mul_(3)
            assert (weight(layer) - used).abs().max() > 1e-3, name


def strictly_lower(method, signs, raw):
    return method.forward(raw.tril(-1) + signs)


@pytest.mark.parametrize("name", zoo)
def test_gradients_of_first_and_second_order(name):
    for layer in (layers(name)[0], layers(name)[-1]):
        apply(layer, name)
        step(layer, 0.3)
        layer.eval()
        method = next(parametrized(layer))[3]
        raw = tuple(t.detach().clone().requires_grad_() for t in originals(layer, tensor_of(layer)))
        if name == "householder":  # the diagonal holds signs
            free = raw[0].detach().tril(-1).requires_grad_()
            signs = raw[0].detach().triu()

            if free.shape[0] < free.shape[1] or free.ndim > 2:
                continue
            raw, used = (free,), functools.partial(strictly_lower, method, signs)
        else:
            used = method.forward
        assert torch.autograd.gradcheck(used, raw)
        assert torch.autograd.gradgradcheck(used, raw)


@pytest.mark.parametrize("name", zoo)
def test_float32(name):
    layer = layers(name)[-1].float()
    apply(layer, name)
    step_dtype = {p.dtype for p in [*layer.parameters(), *layer.buffers()] if p.is_floating_point()}
    assert step_dtype == {torch.float32}
    assert weight(layer).dtype == torch.float32
    assert next(parametrized(layer))[3].in_manifold(weight(layer), 1e-4) or name in {
        *("centered", "standardized", "scaled-standardized", "spectral", "parseval")
    }


sizes = st.tuples(st.integers(1, 9), st.integers(2, 5), st.sampled_from([1, 3]))


def conv(size):
    out, inputs, kernel = size
    torch.manual_seed(out * 100 + inputs * 10 + kernel)
    return nn.Conv2d(inputs, out, kernel).double()


def matrix(layer):
    return layer.weight.detach().flatten(1)


@settings(max_examples=25, deadline=None)
@given(sizes)
def test_rows_are_centered_and_scaled(size):
    rows = matrix(apply(conv(size), "centered", scale=1.0, eps=1e-9))
    assert rows.mean(1).abs().max() < 1e-12
    assert (rows.norm(dim=1) - 1).abs().max() < 1e-6
    rows = matrix(apply(conv(size), "standardized", eps=1e-9))
    assert (rows.std(1) - 1).abs().max() < 1e-6
    assert rows.mean(1).abs().max() < 1e-12
    rows = matrix(apply(conv(size), "scaled-standardized", gamma=1.7, eps=1e-9))
    assert (rows.var(1, correction=0) * rows.shape[1] - 1.7**2).abs().max() < 1e-6
    rows = matrix(apply(conv(size), "cosine"))
    assert (rows.norm(dim=1) - 1).abs().max() < 1e-12


@settings(max_examples=25, deadline=None)
@given(sizes, st.sampled_from(["orthogonal", "exponential", "cayley", "householder", "soft-orthogonal-svd", "oni"]))
def test_orthogonality(size, name):
    layer = conv(size)
    options = {
        "orthogonal": {"scale": 1.0},
        "soft-orthogonal-svd": {"margin": 0.0},
        "oni": {"iterations": 60, "scale": 1.0, "eps": 1e-12, "center": False},
    }
    apply(layer, name, **options.get(name, {}))
    rows = matrix(layer)
    groups = next(parametrized(layer))[3].groups if name == "orthogonal" else 1
    for part in rows.chunk(groups):
        gram = part @ part.T if len(part) <= part.shape[1] else part.T @ part
        assert (gram - torch.eye(len(gram))).abs().max() < 1e-6


@settings(max_examples=15, deadline=None)
@given(sizes)
def test_spectral_norm_is_one(size):
    layer = conv(size)
    apply(layer, "spectral", iterations=300)
    assert torch.linalg.svdvals(matrix(layer))[0] == pytest.approx(1, abs=1e-3)
    apply(layer := conv(size), "singular-value-bounding", eps=0.1)
    step(layer, 2.0)
    retract(layer)
    s = torch.linalg.svdvals(matrix(layer))
    assert s.max() <= 1.1 + 1e-9
    assert s.min() >= 1 / 1.1 - 1e-9


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5).map(lambda n: 2 * n), st.sampled_from(CELLS))
def test_recurrent_matrices_are_orthogonal(size, name):
    cell = nn.RNNCell(3, size).double()
    apply(cell, name)
    step(cell, 1.0)
    w = cell.weight_hh.detach()
    assert (w @ w.T - torch.eye(size)).abs().max() < 1e-6
    if "unitary" in name:
        n = size // 2
        torch.testing.assert_close(w[:n, :n], w[n:, n:])
        torch.testing.assert_close(w[:n, n:], -w[n:, :n])
