"""Curvature of a held batch: against the dense Hessian in float64, closed forms, and in a run."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normscope as ns
from normscope.core.errors import Unmeasurable
from normscope.linalg.spectrum import dense
from normscope.metrics import curvature as metrics
from normscope.probes import curvature
from normscope.probes.curvature import LEAST, MOST, SHARE, Work
from tests.checks import bits

ENOUGH = Work(32, 10**9, True)


def make(norm=nn.BatchNorm1d, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), norm(4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(n=32):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, dtype=torch.float64, generator=draw), torch.randint(0, 3, (n,), generator=draw)


def problem(model, loss=F.cross_entropy):
    return ns.Problem(model, loss, [batch()])


def stats(rows):
    return {row.site: dict(zip(row.stats, row.values, strict=True)) for row in rows["batch"]}


@pytest.fixture
def network():
    model = make()
    held = problem(model)
    return model, held, dense(held.operator())


def test_a_small_network_agrees_with_its_dense_hessian(network):
    model, held, matrix = network
    rows = curvature.measure(held, (), ENOUGH)
    found, values = stats(rows)["/output"], np.linalg.eigvalsh(matrix)
    vectors = np.linalg.eigh(matrix)[1][:, ::-1][:, :3]
    g = held.gradient().numpy()
    assert found["sharpness"] == pytest.approx(values[-1], rel=1e-9)
    assert found["smallest"] == pytest.approx(values[0], rel=1e-9)
    assert (found["k"], found["kth"]) == (3, pytest.approx(values[-3], rel=1e-9))
    assert found["energy"] == pytest.approx(np.square(vectors.T @ g).sum() / (g @ g), rel=1e-7)
    assert found["gradient_norm"] == pytest.approx(np.linalg.norm(g))
    assert found["held_loss"] == pytest.approx(held.operator().loss)
    assert abs(found["trace"] - np.trace(matrix)) < 4 * found["trace_error"]
    sizes = np.cumsum([0, *(p.numel() for p in model.parameters())])
    for (name, _), start, end in zip(model.named_parameters(), sizes, sizes[1:], strict=False):
        site = stats(rows)["/".join(name.split("."))]
        assert abs(site["trace"] - np.trace(matrix[start:end, start:end])) < 5 * site["trace_error"] + 1e-12
    assert "preconditioned" not in found
    assert "lr" not in found


def test_nodes_and_weights_are_a_rule_of_the_spectrum(network):
    _, held, matrix = network
    root = curvature.measure(held, (), Work(32, 0, True))["batch"][0]
    nodes, weights = root.arrays["nodes"], root.arrays["weights"]
    start = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    start /= np.linalg.norm(start)
    assert len(nodes) == LEAST
    for order in range(2 * LEAST - 1):
        exact = start @ np.linalg.matrix_power(matrix, order) @ start
        assert weights @ nodes**order == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["sgd", "adam", "amsgrad"])
def test_the_preconditioned_sharpness_is_that_of_the_dense_matrix(kind, groups):
    model = make(nn.LayerNorm)
    params = list(model.parameters())
    split = [{"params": params[:3], "lr": 0.1}, {"params": params[3:], "lr": 0.1 if groups == 1 else 0.02}]
    made = {"sgd": lambda: torch.optim.SGD(split, momentum=0.5), "adam": lambda: torch.optim.Adam(split)}
    optimizer = made.get(kind, lambda: torch.optim.AdamW(split, amsgrad=True, betas=(0.8, 0.95), eps=1e-3))()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        optimizer.step()
    held = problem(model)
    found = stats(curvature.measure(held, (optimizer,), ENOUGH))["/output"]
    scale = []
    for i, p in enumerate(params):
        relative = 0.2 if groups == 2 and i >= 3 else 1.0
        state = optimizer.state[p]
        second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        beta1, beta2, eps = {"adam": (0.9, 0.999, 1e-8), "amsgrad": (0.8, 0.95, 1e-3)}.get(kind, (0, 0, 0))
        inverse = 1.0
        if kind != "sgd":
            inverse = 1 / ((1 - beta1**3) * (np.sqrt(second.numpy() / (1 - beta2**3)) + eps))
        scale.append(np.broadcast_to(relative * inverse, p.shape).reshape(-1))
    expected = np.linalg.eigvals(np.concatenate(scale)[:, None] * dense(held.operator())).real.max()
    assert found["lr"] == 0.1
    if kind == "sgd" and groups == 1:
        assert "preconditioned" not in found
    else:
        error = found["preconditioned_residual"]
        assert found["preconditioned"] == pytest.approx(expected, rel=1e-3 if error < 0.03 * expected else 0.1)


def test_optimizers_with_an_unknown_rule_have_no_preconditioner():
    model = make()
    named = dict(model.named_parameters())
    rmsprop = torch.optim.RMSprop(model.parameters())
    fresh = torch.optim.Adam(model.parameters())
    for stepped in ((), (rmsprop,), (fresh,)):
        rate, scales = curvature.preconditioner(named, stepped)
        assert (np.isnan(rate), scales) == (True, None)


def test_the_loss_along_the_gradient_is_that_of_moved_copies():
    model = make()
    held, rate = problem(model), 0.3
    optimizer = torch.optim.SGD(model.parameters(), rate)
    found = stats(curvature.measure(held, (optimizer,), ENOUGH))["/output"]
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    g, losses, changes = held.gradient(), [], []
    for factor in (0.5, 1, 2, 4):
        moved = make()
        nn.utils.vector_to_parameters(start - factor * rate * g, moved.parameters())
        there = problem(moved)
        losses.append(there.operator().loss)
        changes.append(float((there.gradient() - g).norm()))
    assert (found["loss_low"], found["loss_high"]) == pytest.approx((min(losses), max(losses)))
    assert (found["change_low"], found["change_high"]) == pytest.approx((min(changes), max(changes)))
    ratios = np.array(changes) / (np.array([0.5, 1, 2, 4]) * rate * float(g.norm()))
    assert found["smoothness"] == pytest.approx(ratios.max())


def test_a_snapshot_leaves_no_trace():
    model = make()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    before = [bits(t) for t in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))]
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    held = problem(model)
    curvature.measure(held, (optimizer,), ENOUGH)
    assert before == [bits(t) for t in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))]
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert (held.distributed, len(held.batches[0][0])) == (True, 32)


# ---- what it may cost ------------------------------------------------------------------------------------------------


def test_the_first_and_the_last_are_taken_and_others_only_where_they_cost_little():
    for ends, trained, least, most in ((True, 32, LEAST, LEAST), (False, 32, 0, 0), (False, 10**9, MOST, MOST)):
        assert least <= Work(32, trained, ends).steps(1000, 32) <= most
    steps = Work(64, 64 * 10_000, False).steps(1000, 64)
    assert LEAST < steps <= MOST
    total = (1 + 1 / 3 + 1 / 2) * steps * 2.5 * 64
    assert total <= SHARE * 64 * 10_000 or steps == MOST


def test_large_models_hold_fewer_vectors_and_the_largest_are_refused():
    work = Work(32, 10**12, True)
    assert LEAST < work.steps(curvature.KEPT // 20, 32) <= 20
    with pytest.raises(Unmeasurable, match="parameters, of which 10 vectors would have to be held"):
        work.steps(curvature.KEPT // 4, 32)


def test_as_many_samples_as_a_training_batch_are_run(network):
    _, held, _ = network
    sizes = {n: stats(curvature.measure(held, (), Work(n, 10**9, True)))["/output"]["samples"] for n in (4, 20, 99)}
    assert sizes == {4: 16, 20: 20, 99: 32}


# ---- what cannot be measured -----------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


def refused(model, loss=F.cross_entropy, words=""):
    with pytest.raises(Unmeasurable, match=words):
        curvature.measure(problem(model, loss), (), ENOUGH)


def test_what_has_no_second_derivative_or_is_random_is_refused():
    refused(make(), lambda output, y: F.cross_entropy(Once.apply(output), y), "no second derivative")
    refused(make(), lambda output, y: (output * torch.rand(1)).sum(), "two evaluations")


def test_a_refusal_is_a_note_and_training_goes_on():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    held = problem(model, lambda output, y: F.cross_entropy(Once.apply(output), y))
    with ns.attach(model, optimizer, every=1, problem=held) as scope:
        for _ in range(6):
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
            optimizer.step()
    events = scope.record().events
    assert "probe-failed" not in set(events["kind"])
    assert events["message"].str.startswith("curvature cannot be measured here: ").sum() == 1


def test_a_diverged_model_has_a_loss_alone():
    model = make()
    nn.init.constant_(model[3].weight, torch.inf)
    rows = curvature.measure(problem(model), (), ENOUGH)
    (found,) = stats(rows).values()
    assert set(found) == {"held_loss", "samples"}
    assert not np.isfinite(found["held_loss"])


@pytest.mark.parametrize("other", [64 * 3, 100])
def test_a_batch_is_cut_with_all_its_rows_or_not_at_all(other):
    torch.manual_seed(0)
    model, x, rows = nn.Linear(5, 3).double(), torch.randn(64, 5).double(), torch.randn(other).double()

    def loss(output, target):
        return (output.flatten() - target).square().mean() if other == 192 else output.square().mean()

    measured = curvature.measure(ns.Problem(model, loss, [(x, rows)]), (), Work(16, 10**9, True))
    found = stats(measured)["/output"]
    used = curvature.SAMPLES if other == 192 else 64
    inputs = torch.cat([x[:used], torch.ones(used, 1)], 1)
    hessian = 2 / (3 * used) * inputs.T @ inputs
    assert found["samples"] == used
    assert found["sharpness"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=0.02)


def test_half_precision_is_measured_in_single():
    model = make().bfloat16()
    x, y = batch()
    held = ns.Problem(model, F.cross_entropy, [(x.bfloat16(), y)])
    exact = problem(make().bfloat16().double()).operator()
    found = stats(curvature.measure(held, (), ENOUGH))["/output"]
    assert found["sharpness"] == pytest.approx(np.linalg.eigvalsh(dense(exact))[-1], rel=0.05)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_is_measured_at_few_steps_and_stores_its_spectra():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x, y = batch()
    with ns.attach(model, optimizer, every=1, problem=problem(model), probes="curvature") as scope:
        for _ in range(700):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    record = scope.record()
    frame = metrics.snapshots(record)
    assert frame.index.tolist()[0] == 0
    assert frame.index.tolist()[-1] == 699
    assert 3 <= len(frame) <= 6
    assert list(metrics.spectra(record)) == frame.index.tolist()
    values = np.linalg.eigvalsh(dense(problem(model).operator()))
    assert frame["sharpness"].iloc[-1] == pytest.approx(values[-1], rel=1e-4)
    assert metrics.stability(record)["edge"].iloc[-1] == pytest.approx(3.8 / 0.05)


def test_examine_looks_at_the_curvature_once():
    model = make()
    record = ns.examine(model, F.cross_entropy, [batch()] * 6)
    frame = metrics.snapshots(record)
    assert frame.index.tolist() == [0]
    values = np.linalg.eigvalsh(dense(problem(model).operator()))
    assert frame["sharpness"].iloc[0] == pytest.approx(values[-1], rel=0.05)
    (found,) = [f for f in ns.diagnose(record) if f.id == "curvature.edge-of-stability"]
    assert f"stable below a learning rate of {2 / frame['sharpness'].iloc[0]:.2g}" in found.message
