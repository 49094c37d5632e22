"""Curvature products against differences of gradients and against dense matrices made without normscope."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normscope as ns
from tests.linalg.models import CLASSES, MODELS, Attention, differences, make, mlp, quadratic

LOSS = F.cross_entropy


def random(size, seed=0, count=None):
    shape = (size,) if count is None else (size, count)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_hessian_products_equal_differences_of_the_gradient(name, mode):
    model, batch = make(name)
    problem = ns.Problem(model, LOSS, [batch], mode=mode)
    v = random(problem.size)
    # a ReLU has kinks: the step stays between them
    expected = differences(model, [batch], mode, problem.names, v, step=1e-5 if "batch, in" in name else 1e-4)
    assert torch.linalg.norm(problem.hvp(v) - expected) <= 1e-7 * torch.linalg.norm(expected)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher", "mc-fisher"])
@pytest.mark.parametrize("name", MODELS)
def test_products_are_symmetric_and_linear(name, kind, mode):
    model, batch = make(name)
    operator = ns.Problem(model, LOSS, [batch], mode=mode).operator(kind)
    u, v = random(operator.size, 1), random(operator.size, 2)
    au, av = operator.matvec(u), operator.matvec(v)
    scale = float(au.norm() * v.norm())
    assert abs(float(u @ av - v @ au)) <= 1e-12 * scale
    torch.testing.assert_close(
        operator.matmat(torch.stack([u - 2 * v, v], 1))[:, 0], au - 2 * av, rtol=1e-11, atol=1e-12
    )
    assert kind == "hessian" or float(u @ au) >= 0


def jacobian(model, inputs):
    """Return dz / dtheta, a row for each output, one backward pass each."""
    params = list(model.parameters())
    outputs = model(inputs).reshape(-1)
    rows = [torch.autograd.grad(out, params, retain_graph=True) for out in outputs]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]), outputs.detach()


def eye(operator):
    return torch.eye(operator.size, dtype=operator.dtype)


@pytest.mark.parametrize("name", ["batch", "layer"])
def test_gauss_newton_equals_its_formula(name):
    model, (x, y) = make(name)
    found = ns.Problem(model, LOSS, [(x, y)]).operator("ggn")
    j, z = jacobian(copy.deepcopy(model), x)
    p = z.reshape(-1, CLASSES).softmax(1)
    middle = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p)) / len(x)
    torch.testing.assert_close(found.matmat(eye(found)), j.T @ middle @ j, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["batch", "layer"])
def test_empirical_fisher_equals_the_sum_over_samples(name, reduction):
    model, (x, y) = make(name)

    def loss(output, target):
        return F.cross_entropy(output, target, reduction=reduction)

    found = ns.Problem(model, loss, [(x, y)], reduction=reduction).operator("fisher")
    twin = copy.deepcopy(model)
    losses = F.cross_entropy(twin(x), y, reduction="none")
    rows = [torch.autograd.grad(one, list(twin.parameters()), retain_graph=True) for one in losses]
    g = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    expected = g.T @ g / (len(x) if reduction == "mean" else 1)
    torch.testing.assert_close(found.matmat(eye(found)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        (F.cross_entropy, "mean"),
        (F.mse_loss, "mean"),
        (nn.MSELoss(reduction="sum"), "sum"),
        (partial(F.cross_entropy, reduction="sum"), "sum"),
    ],
)
def test_drawn_fisher_tends_to_gauss_newton(loss, reduction):
    torch.manual_seed(0)
    model = mlp(nn.LayerNorm(4)).double()
    x, y = make("layer")[1]
    if "mse" in str(loss).lower():
        y = random(8, count=CLASSES)
    problem = ns.Problem(model, loss, [(x, y)], reduction=reduction)
    ggn, few, many = (
        problem.operator(*args, **kw)
        for args, kw in [(("ggn",), {}), (("mc-fisher",), {"draws": 20}), (("mc-fisher",), {"draws": 2000})]
    )
    dense = [op.matmat(eye(op)) for op in (ggn, few, many)]
    errors = [float((m - dense[0]).norm() / dense[0].norm()) for m in dense[1:]]
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 4  # ten times less, up to chance


def test_drawn_targets_keep_their_form():
    torch.manual_seed(0)
    model = mlp(nn.LayerNorm(4)).double()
    x, y = make("layer")[1]
    soft = F.one_hot(y, CLASSES).double()
    made = [ns.Problem(model, LOSS, [(x, t)]).operator("mc-fisher", seed=4) for t in (y, soft)]
    torch.testing.assert_close(made[0].matmat(eye(made[0])), made[1].matmat(eye(made[1])))
    loss = nn.CrossEntropyLoss(ignore_index=-100, reduction="sum")
    ignored = ns.Problem(model, loss, [(x, torch.cat([y[:4], torch.full_like(y[4:], -100)]))], reduction="sum")
    half = ns.Problem(model, loss, [(x[:4], y[:4])], reduction="sum")
    few, many = (p.operator("ggn") for p in (half, ignored))
    torch.testing.assert_close(few.matmat(eye(few)), many.matmat(eye(many)))
    drawn = ignored.operator("mc-fisher", draws=2000)
    assert (drawn.matmat(eye(drawn)) - few.matmat(eye(few))).norm() < 0.05 * few.matmat(eye(few)).norm()


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("name", ["batch", "layer"])
def test_uneven_batches_are_weighted_by_their_samples(name, kind):
    model, (x, y) = make(name)
    parts = [(x[:5], y[:5]), (x[5:], y[5:])] if name == "layer" else [(x[:4], y[:4]), (x[4:], y[4:])]
    both = ns.Problem(model, LOSS, parts).operator(kind)
    single = [ns.Problem(model, LOSS, [part]).operator(kind) for part in parts]
    expected = sum(op.matmat(eye(op)) * len(part[0]) for op, part in zip(single, parts, strict=True)) / len(x)
    torch.testing.assert_close(both.matmat(eye(both)), expected, rtol=1e-10, atol=1e-13)
    union = ns.Problem(model, LOSS, [(x, y)]).operator(kind)
    same = torch.allclose(both.matmat(eye(both)), union.matmat(eye(union)), rtol=1e-9, atol=1e-12)
    assert same is (name == "layer")  # batch statistics differ from one batch to the next


def test_a_summed_loss_adds_its_batches():
    model, (x, y) = make("layer")

    def loss(output, target):
        return F.cross_entropy(output, target, reduction="sum")

    mean, total = (
        ns.Problem(model, one, [(x[:5], y[:5]), (x[5:], y[5:])], reduction=how)
        for one, how in ((LOSS, "mean"), (loss, "sum"))
    )
    v = random(mean.size)
    torch.testing.assert_close(total.hvp(v), mean.hvp(v) * len(x))
    torch.testing.assert_close(total.gradient(), mean.gradient() * len(x))


def test_any_batch_structure_by_forward():
    model, (x, y) = make("layer")
    batches = [{"x": x[:5], "more": {"y": y[:5]}}, {"x": x[5:], "more": {"y": y[5:]}}]
    problem = ns.Problem(model, LOSS, batches, forward=lambda m, b: (m(b["x"]), b["more"]["y"]))
    v = random(problem.size)
    torch.testing.assert_close(problem.hvp(v), ns.Problem(model, LOSS, [(x, y)]).hvp(v))


def test_a_loss_inside_the_model():
    model, (x, y) = make("layer")
    problem = ns.Problem(
        model,
        lambda output, _: output,
        [(x[:5], y[:5]), (x[5:], y[5:])],
        forward=lambda m, b: (F.cross_entropy(m(b[0]), b[1]), None),
    )
    v = random(problem.size)
    torch.testing.assert_close(problem.hvp(v), ns.Problem(model, LOSS, [(x, y)]).hvp(v))


def test_a_loader_is_held_or_read_anew():
    model, (x, y) = make("layer")
    data = torch.utils.data.TensorDataset(x, y)
    whole = ns.Problem(model, LOSS, [(x, y)])
    v = random(whole.size)
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    torch.testing.assert_close(ns.Problem(model, LOSS, loader, held=None).hvp(v), whole.hvp(v))
    torch.testing.assert_close(ns.Problem(model, LOSS, loader).hvp(v), whole.hvp(v))
    assert len(ns.Problem(model, LOSS, loader, held=2).batches) == 2
    assert "batches from DataLoader" in repr(ns.Problem(model, LOSS, loader, held=None))


def test_weight_decay_in_the_loss_is_seen():
    model, (x, y) = make("layer")
    held = list(model.parameters())
    decayed = ns.Problem(model, lambda o, t: LOSS(o, t) + sum(p.square().sum() for p in held), [(x, y)])
    v = random(decayed.size)
    torch.testing.assert_close(decayed.hvp(v), ns.Problem(model, LOSS, [(x, y)]).hvp(v) + 2 * v)


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("batches", [1, 2])
def test_blocks_are_blocks(kind, batches):
    model, (x, y) = make("batch")
    parts = [(x, y)] if batches == 1 else [(x[:3], y[:3]), (x[3:], y[3:])]
    problem = ns.Problem(model, LOSS, parts)
    operator = problem.operator(kind)
    dense = operator.matmat(eye(operator))
    where = torch.cat([torch.full((p.numel(),), name.startswith("1.")) for name, p in model.named_parameters()])
    block = operator.block("1.*")
    assert block.names == ("1.weight", "1.bias")
    torch.testing.assert_close(block.matmat(eye(block)), dense[where][:, where])
    chosen = ns.Problem(model, LOSS, parts, parameters="1.*").operator(kind)
    torch.testing.assert_close(chosen.matmat(eye(chosen)), dense[where][:, where])
    assert chosen.size == ns.Problem(model, LOSS, parts, parameters=["1.weight", "1.bias"]).size == 8


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle, self.norm = nn.Linear(6, 3), nn.Linear(2, 2), nn.LayerNorm(3)

    def forward(self, x):
        return self.norm(self.used(x))


def test_unused_parameters_are_named_and_left_out():
    model, batch = Unused().double(), make("layer")[1]
    problem = ns.Problem(model, LOSS, [batch])
    assert problem.size == 27
    assert problem.unused == ("idle.weight", "idle.bias")
    assert problem.names == ("used.weight", "used.bias", "norm.weight", "norm.bias")
    assert "not used by the loss: idle.weight, idle.bias" in repr(problem)
    assert len(problem.hvp(random(27))) == 27


def test_a_parameter_that_one_batch_alone_uses():
    model, (x, y) = Unused().double(), make("layer")[1]

    def forward(m, batch):
        out = m(batch[0])
        return (out + m.idle.bias.sum() if len(out) == 3 else out), batch[1]

    problem = ns.Problem(model, F.cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])], forward=forward)
    assert problem.unused == ("idle.weight",)
    matrix = problem.operator().matmat(torch.eye(problem.size, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.T)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 3), nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.linear(x) * self.scale


def test_the_gradient_of_a_scalar_parameter_has_its_type():
    x, y = make("layer")[1]
    model = Scaled()
    problem = ns.Problem(model, LOSS, [(x.float(), y)])
    assert problem.operator().gradient.dtype == torch.float32
    LOSS(model(x.float()), y).backward()
    exact = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(problem.operator().gradient, exact)


def test_another_dtype_runs_on_a_copy():
    model, (x, y) = make("batch")
    reference = ns.Problem(model, nn.CrossEntropyLoss(weight=torch.ones(3).double()), [(x, y)])
    single = copy.deepcopy(model).float()
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    problem = ns.Problem(single, loss, [(x.float(), y)], dtype=torch.float64)
    v = random(problem.size)
    torch.testing.assert_close(problem.hvp(v), reference.hvp(v), rtol=1e-4, atol=1e-5)
    assert problem.hvp(v).dtype == torch.float64
    assert single[0].weight.dtype == loss.weight.dtype == torch.float32
    rough = ns.Problem(single, loss, [(x.float(), y)]).hvp(v.float())
    torch.testing.assert_close(rough.double(), problem.hvp(v), rtol=1e-3, atol=1e-4)


def test_a_linear_loss_has_no_curvature():
    model = nn.Linear(3, 1).double()
    problem = ns.Problem(model, lambda output, _: output.mean(), [(random(5, count=3), None)])
    for kind in ("hessian", "ggn"):
        assert not problem.operator(kind).matvec(random(4)).any()


def test_compiled_and_parallel_models_are_unwrapped():
    model, batch = make("batch")
    v = random(ns.Problem(model, LOSS, [batch]).size)
    expected = ns.Problem(model, LOSS, [batch]).hvp(v)
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        torch.testing.assert_close(ns.Problem(wrapped, LOSS, [batch]).hvp(v), expected, rtol=0, atol=0)


def test_scipy_takes_the_operator():
    from scipy.sparse.linalg import eigsh

    problem, matrix = quadratic([5.0, 3.0, -2.0, *np.linspace(-1, 1, 30)])
    found = problem.operator().linear_operator()
    assert found.shape == (33, 33)
    np.testing.assert_allclose(np.sort(eigsh(found, 3, return_eigenvectors=False)), [-2, 3, 5], rtol=1e-10)
    np.testing.assert_allclose(found @ np.eye(33), matrix, atol=1e-12)


def test_attention_has_second_derivatives_here():
    torch.manual_seed(0)
    model, batch = Attention().double(), make("attention")[1]
    assert "dropout evaluated in 1 modules" in repr(ns.Problem(model, LOSS, [batch]))
    assert ns.Problem(model, LOSS, [batch]).hvp(random(sum(p.numel() for p in model.parameters()))).isfinite().all()
