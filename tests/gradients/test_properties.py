"""What the methods promise, over random shapes: no radial part, points that stay on their manifold, invariances."""

import math

import pytest
import torch
from torch import nn

from normscope.gradients import build
from normscope.gradients.spherical import transport

torch.set_num_threads(1)

SHAPES = [(3, 7), (1, 9), (5, 5), (4, 2, 3, 3), (6, 4, 1, 1), (2, 3, 5)]


def made(shape, seed, name, scale=1.0, **options):
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64))
    return p, build(name, [p], **options), generator


def dots(a, b):
    return (a.flatten(1) * b.flatten(1)).sum(1)


def norms(a):
    return a.detach().flatten(1).norm(dim=1)


def invariant_gradient(p, generator):
    """A gradient without radial part in each unit, in proportion to 1 / |w|: that of a scale-invariant loss."""
    g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    w = p.detach()
    shape = (-1, *[1] * (p.ndim - 1))
    g = g - (dots(g, w) / dots(w, w)).reshape(shape) * w
    return g / norms(w).reshape(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamp", {}),
        ("adamp", {"nesterov": True}),
        ("sgdp", {}),
        ("sgdp", {"nesterov": True}),
        ("sgdp", {"store_projected": True}),
        ("psi-manifold", {"momentum": 0.0}),
    ],
)
def test_a_projected_step_has_no_radial_part(name, options, shape):
    p, optimizer, generator = made(shape, 1, name, lr=0.1, **options)
    for _ in range(4):
        before = p.detach().clone()
        p.grad = invariant_gradient(p, generator)
        optimizer.step()
        step = p.detach() - before
        assert step.norm() > 1e-3
        assert dots(step, before).abs().max() <= 1e-7 * norms(step).max() * norms(before).max()
        # Pythagoras: the growth of the norm is that of the step alone
        torch.testing.assert_close(norms(p) ** 2, norms(before) ** 2 + norms(step) ** 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_gradient_that_is_not_orthogonal_is_not_projected(shape):
    p, optimizer, _ = made(shape, 2, "sgdp", lr=0.1, momentum=0.0)
    before = p.detach().clone()
    p.grad = 2 * before
    optimizer.step()
    torch.testing.assert_close(p.detach(), 0.8 * before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_norm_growth_of_momentum_is_the_lemma_of_the_paper(momentum, shape):
    """|w_t+1|^2 = |w_t|^2 + lr^2 |p_t|^2 + 2 lr^2 sum_k<t momentum^(t-k) |p_k|^2, exact without projection."""
    p, optimizer, generator = made(shape, 3, "sgdp", lr=0.1, momentum=momentum, delta=0.0)
    squares = []
    for t in range(12):
        before = p.detach().clone()
        p.grad = invariant_gradient(p, generator)
        optimizer.step()
        squares.append(norms(before - p.detach()) ** 2)
        older = sum((momentum ** (t - k) * square for k, square in enumerate(squares[:t])), torch.zeros(len(p)))
        torch.testing.assert_close(norms(p) ** 2, norms(before) ** 2 + squares[t] + 2 * older, rtol=1e-12, atol=1e-12)


def test_without_projection_momentum_grows_the_norm_and_with_it_no_more_than_sgd_does():
    growth = {}
    for label, options in {
        "sgd": {"momentum": 0.0, "delta": 0.0},
        "momentum": {"momentum": 0.9, "delta": 0.0},
        "sgdp": {"momentum": 0.9},
    }.items():
        p, optimizer, generator = made((4, 30), 4, "sgdp", lr=0.05, **options)
        before = norms(p).square().sum()
        for _ in range(100):
            p.grad = invariant_gradient(p, generator)
            optimizer.step()
        growth[label] = float(norms(p).square().sum() - before)
    # random gradients: |p|^2 is 1 / (1 - 0.81) = 5.3 times |g|^2, the lemma adds 2 * 0.9 / 0.1 = 18 times |p|^2
    assert growth["momentum"] > 30 * growth["sgd"]
    assert growth["sgdp"] < 6 * growth["sgd"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grassmann-sgd", {"max_norm": None}),
        ("grassmann-sgd", {"orthogonality": 0.1}),
        ("grassmann-adam", {}),
        ("projection-weight-norm", {}),
        ("projection-weight-norm", {"tangent": True, "momentum": 0.9}),
        ("fine-grained-manifold", {}),
    ],
)
def test_units_keep_length_one(name, options, shape):
    p, optimizer, generator = made(shape, 5, name, scale=3.0, lr=0.3, **options)
    for _ in range(5):
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close(norms(p), torch.ones(len(p), dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["grassmann-sgd", "grassmann-adam"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transported_momentum_is_tangent(shape, name):
    p, optimizer, generator = made(shape, 6, name)
    for _ in range(5):
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        (state,) = optimizer.state.values()
        moment = state.get("momentum_buffer", state.get("exp_avg"))
        assert moment.norm() > 1e-3
        assert dots(moment, p.detach()).abs().max() < 1e-6 * norms(moment).max()


def test_a_geodesic_turns_by_the_length_of_the_step():
    p, optimizer, _ = made((2, 6), 7, "grassmann-sgd", lr=1.0, momentum=0.0, max_norm=None)
    p.data /= norms(p)[:, None]
    before = p.detach().clone()
    p.grad = invariant_gradient(p, torch.Generator().manual_seed(0)) * 0.3
    length = norms(p.grad)
    optimizer.step()
    torch.testing.assert_close(dots(before, p.detach()), length.cos(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["cayley-sgd", "cayley-adam"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] <= math.prod(shape[1:])])
def test_rows_stay_orthonormal(shape, name):
    p, optimizer, generator = made(shape, 8, name, lr=0.05)
    for _ in range(20):
        before = p.detach().clone()
        p.grad = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        x = p.detach().flatten(1)
        torch.testing.assert_close(x @ x.mT, torch.eye(len(x), dtype=x.dtype), rtol=0, atol=1e-6)
    assert shape == (1, 9) or (p.detach() - before).norm() > 1e-3


def test_more_iterations_are_closer_to_orthonormal():
    residuals = []
    for iterations in (2, 4, 8, 16):
        p, optimizer, generator = made((4, 9), 9, "cayley-sgd", lr=0.5, iterations=iterations)
        for _ in range(3):
            p.grad = 2 * torch.randn(4, 9, generator=generator, dtype=torch.float64)
            optimizer.step()
        x = p.detach()
        residuals.append(float((x @ x.mT - torch.eye(4, dtype=x.dtype)).norm()))
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-7


def test_rows_that_drift_are_made_orthonormal_again():
    p, optimizer, generator = made((3, 8), 10, "cayley-sgd", retraction=2)
    defects = []
    for _ in range(4):
        p.data += 0.01 * torch.randn(3, 8, generator=generator, dtype=torch.float64)
        p.grad = 1e-6 * torch.randn(3, 8, generator=generator, dtype=torch.float64)
        optimizer.step()
        defects.append(float((p.detach() @ p.detach().mT - torch.eye(3)).norm()))
    assert max(defects[0], defects[2]) < 1e-9
    assert min(defects[1], defects[3]) > 1e-4


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_the_short_side_is_orthonormal_on_the_stiefel_manifold(shape):
    p, optimizer, generator = made(shape, 11, "fine-grained-manifold", manifold="stiefel")
    for _ in range(4):
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    x = p.detach() if shape[0] < shape[1] else p.detach().mT
    torch.testing.assert_close(x @ x.mT, torch.eye(3, dtype=x.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "options"), [("lars", {}), ("lamb", {"eps": 0.0}), ("psi-manifold", {"weight_decay": 0.1}), ("clars", {})]
)
def test_equivalent_weights_stay_equivalent(name, options, shape):
    """From c w each iterate is c times what it is from w, as the gradient of a scale-invariant loss is 1 / c times."""
    if name in ("lars", "clars"):
        options = {"weight_decay": 0.0, "trust_coefficient": 0.1}
    elif name == "lamb":
        options = {"weight_decay": 0.0, "eps": 0.0}
    finals = []
    for scale in (1.0, 8.0):
        p, optimizer, generator = made(shape, 12, name, scale=scale, lr=0.1, **options)
        for _ in range(6):
            p.grad = invariant_gradient(p, generator)
            p.grad_sample = p.grad[None]
            optimizer.step()
        finals.append(p.detach() / scale)
    torch.testing.assert_close(*finals, rtol=1e-9, atol=1e-9)


def test_lars_and_lamb_move_by_their_share_of_the_weights():
    for name, share in (("lars", 0.1 * 0.02), ("lamb", 0.1)):
        options = {"trust_coefficient": 0.02, "momentum": 0.0} if name == "lars" else {}
        p, optimizer, generator = made((5, 4), 13, name, lr=0.1, weight_decay=0.0, **options)
        before = p.detach().clone()
        p.grad = 1e3 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
        optimizer.step()
        assert float((p.detach() - before).norm() / before.norm()) == pytest.approx(share)


@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "clars"])
def test_weights_that_start_at_zero_move(name):
    p = nn.Parameter(torch.zeros(3, 4))
    optimizer = build(name, [p], lr=0.1)
    p.grad = torch.ones(3, 4)
    p.grad_sample = p.grad[None]
    optimizer.step()
    assert torch.isfinite(p).all()
    assert (p < 0).all()


@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "block-normalized", "agc", "adamp", "sgdp", "fg-sgd"])
def test_a_zero_gradient_is_no_accident(name):
    p = nn.Parameter(torch.ones(3, 4) / 2)
    optimizer = build(name, [p], lr=0.1)
    p.grad = torch.zeros(3, 4)
    optimizer.step()
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_centralization_keeps_the_mean_of_each_unit(shape):
    p, optimizer, generator = made(shape, 14, "gc", lr=0.1, momentum=0.9)
    before = p.detach().flatten(1).mean(1)
    for _ in range(4):
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(p.detach().flatten(1).mean(1), before)


@pytest.mark.parametrize("shape", [*SHAPES, (5,)])
def test_clipping_binds_long_gradients_and_leaves_short_ones(shape):
    p, optimizer, generator = made(shape, 15, "agc", lr=1.0, clipping=0.1)
    short, long = 1e-4, 1e4
    for scale in (short, long):
        before = p.detach().clone()
        grad = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        p.grad = grad
        optimizer.step()
        step = before - p.detach()
        if scale == short:
            torch.testing.assert_close(step, grad)
        else:
            unit = (lambda a: a[None]) if len(shape) == 1 else (lambda a: a)
            torch.testing.assert_close(norms(unit(step)), 0.1 * norms(unit(before)))


@pytest.mark.parametrize("shape", SHAPES)
def test_transport_to_the_next_tangent_space(shape):
    generator = torch.Generator().manual_seed(16)
    w, step = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    p = nn.Parameter(w)
    moment = invariant_gradient(p, generator)
    new = w + 0.1 * step
    carried = transport(moment, w, new)
    assert carried.norm() > 0
    assert dots(carried, new).abs().max() < 1e-12
    # a moment that no step has turned is scaled by the inverse of the weights' growth
    torch.testing.assert_close(transport(moment, w, 2 * w), moment / 2)


def network(scale):
    torch.manual_seed(17)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight.mul_(scale[:, None])
        model[0].bias.mul_(scale)
        model[2].weight.div_(scale)
    return model


@pytest.mark.parametrize(("name", "invariant"), [("path-normalized", True), ("lars", False)])
def test_path_steps_do_not_see_how_nodes_are_balanced(name, invariant):
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = []
    for scale in (torch.ones(6), torch.tensor([0.2, 0.5, 1.0, 2.0, 3.0, 10.0])):
        model = network(scale)
        options = {"model": model, "shape": (4,)} if name == "path-normalized" else {}
        optimizer = build(name, model.parameters(), lr=0.05, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        outputs.append(model(x).detach())
    assert torch.allclose(*outputs, rtol=1e-9, atol=1e-9) is invariant


def test_path_scales_are_derivatives_of_the_sum_over_paths():
    model = network(torch.ones(6))
    with torch.no_grad():
        model[2].weight[:, 2] = 0.0  # no path leads through this node
    optimizer = build("path-normalized", model.parameters(), lr=0.1, model=model, shape=(4,))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    first, bias, second, _ = before
    outgoing = second.square().sum(0)
    moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    expected = torch.where(outgoing > 0, 0.1 / outgoing, 0.0)
    torch.testing.assert_close(moved[0], expected[:, None].expand(6, 4))
    torch.testing.assert_close(moved[1], expected)
    torch.testing.assert_close(moved[2], (0.1 / (first.square().sum(1) + bias.square())).expand(3, 6))
    torch.testing.assert_close(moved[3], torch.full((3,), 0.1, dtype=torch.float64))


def test_fine_grained_steps_shrink_with_the_gradient():
    lengths = []
    for scale in (1e-3, 1.0, 1e3):
        p, optimizer, generator = made((2, 8), 18, "fine-grained-manifold", lr=0.1, momentum=0.0)
        p.data /= norms(p)[:, None]
        before = p.detach().clone()
        p.grad = scale * invariant_gradient(p, generator)
        gradient = p.grad.norm()
        optimizer.step()
        angle = dots(before, p.detach()).clamp(-1, 1).arccos()
        bound = max(1.0, float(gradient**2 * (2 + gradient) ** 2))
        lengths.append(float(angle.norm()))
        assert lengths[-1] == pytest.approx(0.1 * float(gradient) / math.sqrt(bound), rel=1e-4)
    assert lengths[2] < lengths[1]
