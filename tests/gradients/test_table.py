"""Laws of every optimizer of the table: torch's conventions, nothing of the user's changed, names and errors."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.errors import ArgumentError
from normscope.core.source import cite
from normscope.core.survey import PROVIDED, works
from normscope.gradients import STEPS, build, sample_gradients, zoo
from normscope.gradients.table import ROWS
from normscope.probes.optimizers import settings
from tests.gradients.cases import ALL, batch, made, small_model, train

torch.set_num_threads(1)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(one, other):
    for a, b in zip(weights(one), weights(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ALL)
def test_it_learns(name):
    model = small_model()
    with torch.no_grad():
        before = nn.functional.cross_entropy(model(batch()[0]), batch()[1])
    optimizer = made(name, model, lr=0.01)
    for _ in range(30):
        sample_gradients(model, nn.functional.cross_entropy, *batch())
        optimizer.step()
    with torch.no_grad():
        assert nn.functional.cross_entropy(model(batch()[0]), batch()[1]) < before


@pytest.mark.parametrize("name", ALL)
def test_a_state_dict_goes_on_where_it_was(name):
    model = small_model()
    optimizer = made(name, model)
    train(model, optimizer, range(3))
    other = small_model()
    other.load_state_dict(model.state_dict())
    copied = made(name, other, lr=0.7)
    copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    train(other, copied, range(3, 6))
    assert_same(model, other)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("name", ALL)
def test_a_copy_goes_on_where_it_was(name, duplicate):
    model = small_model()
    optimizer = made(name, model)
    train(model, optimizer, range(2))
    for p in model.parameters():
        del p.grad_sample
    other, copied = duplicate((model, optimizer))
    train(other, copied, range(2, 4))
    train(model, optimizer, range(2, 4))
    assert_same(model, other)
    copied.param_groups[0]["lr"] = 0.0  # the copy's groups are its own, and those that its steps use
    assert optimizer.param_groups[0]["lr"] > 0


@pytest.mark.parametrize("name", ALL)
def test_gradients_and_random_state_are_left_alone(name):
    model = small_model()
    optimizer = made(name, model)
    sample_gradients(model, nn.functional.cross_entropy, *batch())
    held = [(p.grad, p.grad.clone()) for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    optimizer.step()
    for p, (grad, value) in zip(model.parameters(), held, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("name", ALL)
def test_a_closure_gives_its_loss_and_the_same_step(name):
    def closure():
        optimizer.zero_grad()
        sample_gradients(model, nn.functional.cross_entropy, *batch())
        assert torch.is_grad_enabled()
        return 1.5

    model, other = small_model(), small_model()
    optimizer = made(name, model)
    for _ in range(2):
        assert optimizer.step(closure) == 1.5
    plain = made(name, other)
    train(other, plain, range(1))
    train(other, plain, range(1))
    assert_same(model, other)


@pytest.mark.parametrize("name", ALL)
def test_step_hooks_fire_once(name):
    model = small_model()
    optimizer = made(name, model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, range(2))
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("name", ALL)
def test_parameters_without_gradient_are_left_alone(name):
    model = small_model()
    optimizer = made(name, model)
    sample_gradients(model, nn.functional.cross_entropy, *batch())
    model[0].weight.grad = None
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(weights(small_model())[-2], model[-1].weight)


@pytest.mark.parametrize("name", ALL)
def test_a_group_can_be_added(name):
    model, other = small_model(), small_model()
    parts = [list(m.parameters()) for m in (model[:3], model[3:])]
    optimizer = made(name, model, parts[0], lr=0.05)
    optimizer.add_param_group({"params": parts[1]})
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]
    assert optimizer.param_groups[0].keys() == optimizer.param_groups[1].keys()
    train(model, optimizer, range(2))
    train(other, made(name, other, lr=0.05), range(2))
    assert_same(model, other)


@pytest.mark.parametrize("name", ALL)
def test_a_schedule_changes_the_rate_in_use(name):
    model = small_model()
    optimizer = made(name, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    train(model, optimizer, range(1))  # on the manifold, where the method has one; the rate is 0 from the start
    before = weights(model)
    train(model, optimizer, range(1, 2))
    schedule.step()
    for a, b in zip(before, weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)  # scaled to length 1 again


@pytest.mark.parametrize("name", ALL)
def test_the_layout_in_memory_does_not_matter(name):
    model, other = small_model(), small_model()
    with torch.no_grad():
        model[0] = nn.Conv2d(2, 4, 3, bias=False).double()
        other[0] = copy.deepcopy(model[0]).to(memory_format=torch.channels_last)
    for m in (model, other):
        path = {"shape": (2, 5, 5)} if name == "path-normalized" else {}
        optimizer = made(name, m, lr=0.05, **path)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in m.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.grad_sample = p.grad[None]
            optimizer.step()
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [name for name in ALL if name != "path-normalized"])
def test_one_group_may_hold_several_dtypes(name):
    start = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(start.to(dtype, copy=True)) for dtype in (torch.float32, torch.float64)]
    optimizer = build(name, params, lr=0.01)
    for p in params:
        p.grad = torch.linspace(-1, 2, 12, dtype=p.dtype).reshape(3, 4)
        p.grad_sample = p.grad[None]
    optimizer.step()
    assert not torch.equal(params[1], start)
    torch.testing.assert_close(params[0].double(), params[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("zeroed", [("0.weight",), ("4.weight",), ("0.weight", "4.weight")])
@pytest.mark.parametrize("name", ALL)
def test_weights_that_start_at_zero_stay_finite(name, zeroed):
    model = small_model()
    with torch.no_grad():
        for path in zeroed:
            model.get_parameter(path).zero_()
    optimizer = made(name, model)
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        assert all(bool(w.isfinite().all()) for w in weights(model)), step


@pytest.mark.parametrize("name", ["sgd-mrt", "adamsrt"])
def test_a_unit_without_direction_keeps_its_moments(name):
    w = nn.Parameter(torch.zeros(2, 3))
    optimizer = build(name, [w], lr=0.1)
    w.grad = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    optimizer.step()
    state = optimizer.state[w]
    moments = state["momentum_buffer"] if name == "sgd-mrt" else state["exp_avg"]
    torch.testing.assert_close(moments, w.grad * (1.0 if name == "sgd-mrt" else 0.1))
    if name == "adamsrt":
        torch.testing.assert_close(state["exp_avg_sq"], torch.tensor([[0.014], [0.0]]))


@pytest.mark.parametrize("name", ALL)
def test_sparse_gradients_are_refused(name):
    model = small_model()
    optimizer = made(name, model)
    p = model[0].weight
    p.grad = torch.zeros_like(p).to_sparse()
    with pytest.raises(ArgumentError, match=r"sparse gradient.*torch\.optim\.SGD"):
        optimizer.step()


@pytest.mark.parametrize("name", ALL)
def test_attach_counts_its_steps_and_reads_its_settings(name):
    model, plain = small_model(), small_model()
    optimizer = made(name, model, lr=0.01)
    with ns.attach(model, optimizer, every=1) as scope:
        for step in range(3):
            x, y = batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            for p in model.parameters():
                p.grad_sample = p.grad[None]
            optimizer.step()
        record = scope.record()
    assert list(record.context["step"]) == [0, 1, 2]
    assert set(record.context["lr"]) == {0.01}
    assert record.events.query("kind == 'probe-failed'").empty
    alone = made(name, plain, lr=0.01)
    for step in range(3):
        x, y = batch(step)
        alone.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        for p in plain.parameters():
            p.grad_sample = p.grad[None]
        alone.step()
    assert_same(model, plain)


@pytest.mark.parametrize("name", ALL)
def test_momentum_and_decay_are_read(name):
    model = small_model()
    known = zoo[name].settings()
    options = {"momentum": 0.7, "betas": (0.7, 0.9), "weight_decay": 0.3}
    given = {key: value for key, value in options.items() if key in known}
    (row,) = settings(optimizer := made(name, model, **given), [optimizer])
    assert row["momentum"] == (0.7 if len(given) > 1 else None)
    assert row["decay"] == (0.3 if len(given) > 1 else None)


def sphere_loss(w):
    targets = torch.linspace(-1, 1, w.numel(), dtype=w.dtype).reshape(w.shape)
    return 1e-3 * (targets * w / w.norm(dim=1, keepdim=True)).sum()


def turn(name, scale):
    """Return how far one step turns scale-invariant weights, and their effective learning rate by the row."""
    torch.manual_seed(0)
    rows = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64))[0].mT
    model = nn.Linear(5, 3, bias=False).double()
    model.weight.data.copy_(scale * rows)
    decay = {"weight_decay": 0.0} if "weight_decay" in zoo[name].settings() else {}
    path = {"shape": (5,)} if name == "path-normalized" else {}
    optimizer = made(name, model, lr=1e-3, **decay, **path)
    for factor in (0.0, 1.0):  # a first step without gradient puts weights on the manifold, where the method has one
        optimizer.zero_grad()
        (factor * sphere_loss(model.weight)).backward()
        model.weight.grad_sample = model.weight.grad[None]
        optimizer.step()
    after = model.weight.detach()
    rate = zoo[name].effective_rate(optimizer.param_groups[0], scale)
    return float((after / after.norm(dim=1, keepdim=True) - rows).norm()), rate


@pytest.mark.parametrize("name", ALL)
def test_the_effective_learning_rate_says_how_a_step_scales(name):
    (one, rate), (other, other_rate) = turn(name, 1.0), turn(name, 3.0)
    assert one > 0
    assert other / one == pytest.approx(other_rate / rate, rel=0.02)


def test_the_catalog_is_provided_by_rows():
    asked = {name for work in works() for name in work.provides if name.startswith("optim:")}
    assert asked == {name for row in ROWS for name in row.provides}
    assert asked == {name for name in PROVIDED if name.startswith("optim:")}
    for name in asked:
        row = zoo[name.removeprefix("optim:")]  # a name after the colon is a row's or its alias
        assert name in row.provides


def test_rows_have_sources_steps_and_names_of_their_own():
    names = [name for row in ROWS for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))
    for row in ROWS:
        assert cite(row.source).key == row.source
        assert row.step in STEPS
        assert all(row.source in {work.id for work in works() if name in work.provides} for name in row.provides)
    assert repr(zoo).splitlines()[2].split() == ["lars", "lr", "trust", "S106"]


def normalized():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))


PARAMS = [torch.ones(2, 3, requires_grad=True)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("larz", PARAMS), r"name='larz' is unknown; did you mean 'lars'"),
        (lambda: build("lars", PARAMS, momentun=0.9), r"option='momentun' is unknown; did you mean 'momentum'"),
        (lambda: build("gc", PARAMS, betas=(0.9, 0.99)), r"option='betas' is unknown"),
        (lambda: build("gc", PARAMS, place="update"), r"place='update' is unknown; .*gradient, step"),
        (lambda: build("fg-sgd", PARAMS, manifold="stiefl"), r"manifold='stiefl' is unknown; did you mean 'stiefel'"),
        (lambda: build("path-sgd", PARAMS), r"needs model, shape; call build\('path-sgd', ..., model=...\)"),
        (lambda: build("path-sgd", PARAMS, model=nn.Linear(3, 2), shape=(3,)), r"no parameter of model=Linear"),
        (
            lambda: build("path-sgd", (model := normalized()).parameters(), model=model, shape=(3,)),
            r"model=Sequential has no path norm: it would fall with a weight of 0.weight.*ReLU and averages",
        ),
        (lambda: build("lars", PARAMS, lr=-1.0), r"lr=-1.0 must be at least 0"),
        (lambda: build("lars", PARAMS, lr=float("nan")), r"lr=nan must be at least 0"),
        (lambda: build("lars", PARAMS, momentum=1.0), r"momentum=1.0 must be at least 0 and below 1"),
        (lambda: build("lars", PARAMS, trust_coefficient=0.0), r"trust_coefficient=0.0 must be above 0"),
        (lambda: build("lamb", PARAMS, betas=0.9), r"betas=0.9 must be two numbers"),
        (lambda: build("lamb", PARAMS, betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\) must be at least 0 and below 1"),
        (lambda: build("agc", PARAMS, clipping=-1.0), r"clipping=-1.0 must be above 0"),
        (lambda: build("ngd", PARAMS, small=-1.0), r"small=-1.0 must be at least 0"),
        (lambda: build("lars", [{"params": PARAMS, "weight_decay": -1}]), r"weight_decay=-1 must be at least 0"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["cayley-sgd", "cayley-adam"])
def test_orthonormal_rows_of_half_precision_are_refused(name, dtype):
    w = nn.Parameter(torch.eye(3, 4, dtype=getattr(torch, dtype)))
    w.grad = torch.ones_like(w)
    with pytest.raises(ArgumentError, match=f"params of dtype={dtype} cannot be kept orthonormal.*float32"):
        build(name, [w]).step()
    build(name, [w], constrained=False).step()
    assert bool(w.isfinite().all())


def test_complex_gradients_are_refused():
    p = torch.ones(2, 2, dtype=torch.complex128, requires_grad=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(ArgumentError, match="complex gradient"):
        build("lars", [p]).step()


def test_gradients_of_samples_are_asked_for():
    p = torch.ones(2, 3, requires_grad=True)
    p.grad = torch.ones(2, 3)
    optimizer = build("clars", [p])
    with pytest.raises(ArgumentError, match=r"found none: call normscope\.gradients.sample_gradients"):
        optimizer.step()
    p.grad_sample = torch.ones(4, 3, 2)
    with pytest.raises(ArgumentError, match=r"found one of shape \(4, 3, 2\)"):
        optimizer.step()
