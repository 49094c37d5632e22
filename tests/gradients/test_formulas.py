"""Steps against the papers' formulas, written again in numpy: what no recorded number covers."""

import numpy as np
import pytest
import torch
from torch import nn

from normscope.gradients import build, sample_gradients

torch.set_num_threads(1)


def steps_of(name, shape=(3, 6), steps=4, seed=0, scale=1.0, before=lambda p, g: None, **options):
    """Run an optimizer on random gradients: initial weights, gradients, weights after each step, as numpy."""
    generator = np.random.default_rng(seed)
    w = generator.normal(size=shape)
    gradients = scale * generator.normal(size=(steps, *shape))
    p = nn.Parameter(torch.tensor(w))
    optimizer = build(name, [p], **options)
    found = []
    for g in gradients:
        p.grad = torch.tensor(g)
        before(p, g)
        optimizer.step()
        found.append(p.detach().numpy().copy())
    return w, gradients, found


def rows(a):
    return np.linalg.norm(a.reshape(len(a), -1), axis=1).reshape(-1, *[1] * (a.ndim - 1))


def check(expected, found):
    np.testing.assert_allclose(np.stack(found), np.stack(list(expected)), rtol=0, atol=1e-10)


def test_lamb():
    w, gradients, found = steps_of("lamb", lr=0.1, weight_decay=0.3, betas=(0.8, 0.9))

    def expected(w, m=0.0, v=0.0):
        for t, g in enumerate(gradients, start=1):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            u = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6) + 0.3 * w
            w = w - 0.1 * np.linalg.norm(w) / np.linalg.norm(u) * u
            yield w

    check(expected(w), found)


def test_lans():
    w, gradients, found = steps_of("lans", lr=0.1, weight_decay=0.3, betas=(0.8, 0.9))

    def expected(w, m=0.0, v=0.0):
        for t, g in enumerate(gradients, start=1):
            g = g / (np.linalg.norm(g) + 1e-6)
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            root = np.sqrt(v / (1 - 0.9**t)) + 1e-6
            r, c = m / (1 - 0.8**t) / root + 0.3 * w, g / root + 0.3 * w
            step = 0.8 * r / np.linalg.norm(r) + 0.2 * c / np.linalg.norm(c)
            w = w - 0.1 * np.linalg.norm(w) * step
            yield w

    check(expected(w), found)


def test_clars():
    generator = np.random.default_rng(1)
    samples = generator.normal(size=(4, 5, 3, 6))

    left = iter(samples)

    def before(p, g):
        p.grad_sample = torch.tensor(next(left))
        p.grad = p.grad_sample.mean(0)

    w, _, found = steps_of("clars", before=before, lr=0.7, momentum=0.9, weight_decay=0.2, trust_coefficient=0.05)

    def expected(w, b=0.0):
        for each in samples:
            norm = np.mean([np.linalg.norm(g) for g in each])
            ratio = 0.05 * np.linalg.norm(w) / (norm + 0.2 * np.linalg.norm(w))
            b = 0.9 * b + 0.7 * ratio * (each.mean(0) + 0.2 * w)
            w = w - b
            yield w

    check(expected(w), found)


def test_samples_have_the_gradients_of_single_backward_passes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    sample_gradients(model, nn.functional.cross_entropy, x, y)
    for p in model.parameters():
        for one in range(5):
            loss = nn.functional.cross_entropy(model(x[one : one + 1]), y[one : one + 1])
            torch.testing.assert_close(p.grad_sample[one], torch.autograd.grad(loss, p)[0])
        (whole,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), p)
        torch.testing.assert_close(p.grad, whole)


@pytest.mark.parametrize("adaptive", [False, True])
def test_block_normalized(adaptive):
    w, gradients, found = steps_of("block-normalized", lr=0.1, momentum=0.5, adaptive=adaptive, small=0.01)

    def expected(w, b=0.0):
        for g in gradients:
            step = g / (np.linalg.norm(g) + 0.01) * (np.linalg.norm(w) if adaptive else 1)
            b = 0.5 * b + step
            w = w - 0.1 * b
            yield w

    check(expected(w), found)


def test_adams():
    w, gradients, found = steps_of("adams", (3, 2, 3), lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))

    def expected(w, m=0.0, v=0.0):
        for t, g in enumerate(gradients, start=1):
            g = g + 0.2 * w
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * rows(g) ** 2
            w = w - 0.1 * np.sqrt(6) * m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
            yield w

    check(expected(w), found)


def test_psi():
    w, gradients, found = steps_of("psi-manifold", (3, 2, 3), lr=0.05, momentum=0.9, weight_decay=0.1)

    def expected(w, b=0.0):
        for g in gradients:
            b = 0.9 * b + rows(w) ** 2 * g
            w = (1 - 0.05 * 0.1) * w - 0.05 * b
            yield w

    check(expected(w), found)


@pytest.mark.parametrize("tangent", [False, True])
def test_projection(tangent):
    options = {"lr": 0.1, "momentum": 0.5, "tangent": tangent}
    w, gradients, found = steps_of("projection-weight-norm", **options)

    def expected(w, b=0.0):
        for g in gradients:
            unit = w / rows(w)
            b = 0.5 * b + (g - np.diag(np.diag(unit @ g.T)) @ unit if tangent else g)
            w = w - 0.1 * b
            w = w / rows(w)
            yield w

    check(expected(w), found)


def test_grassmann_penalty():
    w, gradients, found = steps_of("grassmann-sgd", steps=1, lr=0.1, max_norm=None, orthogonality=0.3)
    y = w / (rows(w) + 1e-8)
    g = gradients[0] + 2 * 0.3 * (y @ y.T @ y - y)
    h = -0.1 * (g - (y * g).sum(1, keepdims=True) * y)
    check([y * np.cos(rows(h)) + h / (rows(h) + 1e-8) * np.sin(rows(h))], found)


def cayley(x, w, start, rate, sign):
    step = sign * min(1 / (np.abs(w).sum(0).max() + 1e-8), rate)
    y = x.T + step * start
    for _ in range(5):
        y = x.T + step / 2 * w @ (x.T + y)
    return y.T


def skew(x, m):
    hat = m @ x - 0.5 * x.T @ (x @ m @ x)
    return hat - hat.T


def test_cayley_sgd_with_momentum():
    options = {"lr": 0.1, "momentum": 0.9, "retraction": None}
    w, gradients, found = steps_of("cayley-sgd", (2, 3, 2), **options)

    def expected(x, v=0.0):
        for g in gradients.reshape(4, 2, 6):
            x = x / (rows(x) + 1e-8)
            v = 0.9 * v - g.T
            matrix = skew(x, v)
            x, v = cayley(x, matrix, v, 0.1, 1), matrix @ x.T
            yield x.reshape(2, 3, 2)

    check(expected(w.reshape(2, 6)), found)


def test_cayley_adam():
    w, gradients, found = steps_of("cayley-adam", lr=0.3, betas=(0.8, 0.9), retraction=None)

    def expected(x, m=0.0, v=0.0):
        for t, g in enumerate(gradients, start=1):
            x = x / (rows(x) + 1e-8)
            m, v = 0.8 * m + 0.2 * g.T, 0.9 * v + 0.1 * (g**2).sum()
            root = np.sqrt(v / (1 - 0.9**t) + 1e-8)
            matrix = skew(x, m / (1 - 0.8**t)) / root
            x, m = cayley(x, matrix, m, 0.3, -1), matrix @ x.T * root * (1 - 0.8**t)
            yield x

    check(expected(w), found)


def polar_by_qr(x):
    q, r = np.linalg.qr(x.T)
    return (q * np.sign(np.diag(r))).T


def size(h, curvature, radius):
    length = np.linalg.norm(h)
    bound = max((2 * radius + length) ** 2, 1 + curvature * (radius + length))
    return 0.2 / np.sqrt(max(1, length**2 * bound))


def radial(manifold, w, g):
    if manifold == "stiefel":
        return (g @ w.T + w @ g.T) / 2 @ w
    return (w * g).sum(1 if manifold == "oblique" else None, keepdims=True) * w


@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize(("curvature", "radius"), [(1.0, 1.0), (40.0, 0.1)])
@pytest.mark.parametrize("manifold", ["oblique", "sphere", "stiefel"])
def test_fine_grained(manifold, curvature, radius, scale):
    settings = {"curvature": curvature, "radius": radius, "lr": 0.2, "momentum": 0.9}
    w, gradients, found = steps_of("fine-grained-manifold", manifold=manifold, scale=scale, **settings)
    onto = {"oblique": lambda w: w / rows(w), "sphere": lambda w: w / np.linalg.norm(w), "stiefel": polar_by_qr}

    def expected(w, b=0.0):
        for g in gradients:
            w, b = onto[manifold](w), 0.9 * b + g
            h = b - radial(manifold, w, b)
            step = -size(h, curvature, radius) * h
            norm = rows(step) if manifold == "oblique" else np.linalg.norm(step)
            moved = polar_by_qr(w + step) if manifold == "stiefel" else w * np.cos(norm) + step / norm * np.sin(norm)
            w = moved
            yield w

    check(expected(w), found)


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("adams", {"invariant": False}),
        ("adamsrt", {"invariant": False}),
        ("grassmann-adam", {"invariant": False}),
        ("cayley-adam", {"constrained": False}),
    ],
)
def test_what_is_left_to_adam_takes_the_steps_of_torch(name, flag):
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.2}
    _, _, found = steps_of(name, **settings, **flag)
    _, _, vectors = steps_of(name, (5,), **settings)
    for shape, ours in (((3, 6), found), ((5,), vectors)):
        generator = np.random.default_rng(0)
        p = nn.Parameter(torch.tensor(generator.normal(size=shape)))
        optimizer = torch.optim.Adam([p], **settings)
        for step, g in enumerate(generator.normal(size=(4, *shape))):
            p.grad = torch.tensor(g)
            optimizer.step()
            np.testing.assert_allclose(ours[step], p.detach().numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("lars", {"trust_coefficient": None}),
        ("sgd-mrt", {"invariant": False}),
        ("psi-manifold", {"invariant": False}),
        ("grassmann-sgd", {"invariant": False}),
        ("cayley-sgd", {"constrained": False}),
        ("projection-weight-norm", {"constrained": False}),
        ("fine-grained-manifold", {"manifold": None}),
    ],
)
def test_what_is_left_to_sgd_takes_the_steps_of_torch(name, flag):
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    w, gradients, found = steps_of(name, **settings, **flag)
    p = nn.Parameter(torch.tensor(w))
    optimizer = torch.optim.SGD([p], **settings)
    for ours, g in zip(found, gradients, strict=True):
        p.grad = torch.tensor(g)
        optimizer.step()
        np.testing.assert_allclose(ours, p.detach().numpy(), rtol=0, atol=1e-12)
