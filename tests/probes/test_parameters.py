"""Norms of weights, gradients and updates against a run that computes them by hand, and the norm of every step."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.metrics import training
from normscope.probes import optimizers, parameters
from tests.probes.test_activations import scalars

STEPS = 5


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "momentum and decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "fused Adam": lambda p: torch.optim.Adam(p, 0.01, fused=True),
}


def norm(tensor):
    return float(tensor.detach().double().norm())


def run(optimizer, accumulate=1, clip=None, tell=False, scaler=None, closure=False):
    """Train by hand and watched at once; return the record and what was computed by hand, by step."""
    model = make()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    inputs = torch.randn(STEPS, accumulate, 16, 6, generator=torch.Generator().manual_seed(1))
    expected = []
    with ns.attach(model, optimizer, every=1, scaler=scaler) as scope:
        for batches in inputs:
            before = {n: p.detach().clone() for n, p in model.named_parameters()}

            def evaluate(batches=batches):
                optimizer.zero_grad()
                for x in batches:
                    loss = model(x).square().mean() / accumulate
                    (loss if scaler is None else scaler.scale(loss)).backward()
                return loss

            given = None
            if closure:
                optimizer.step(evaluate)
            else:
                loss = evaluate()
                if scaler is not None:
                    scaler.unscale_(optimizer)
                if clip:
                    given = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                if scaler is not None:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                if tell:
                    scope.step(loss=loss, grad_norm=given)
            expected.append(
                {n: (norm(before[n]), norm(p.grad), norm(p.detach() - before[n])) for n, p in model.named_parameters()}
                | {"given": None if given is None else float(given)}
            )
    return scope.record(), expected


def check(record, expected, rtol=1e-5):
    for name in make().state_dict():
        if "running" in name or "num_batches" in name:
            continue
        module, _, slot = name.rpartition(".")
        for role, column in (("value", 0), ("gradient", 1), ("update", 2)):
            found = scalars(record, f"{module}/{slot}", role)["norm"]
            reference = [step[name][column] for step in expected]
            np.testing.assert_allclose(found, reference, rtol=rtol, atol=2e-7, err_msg=f"{name} {role}")
        weights = dict(make().named_parameters())[name].numel()
        rms = scalars(record, f"{module}/{slot}", "value")["rms"]
        np.testing.assert_allclose(rms, [step[name][0] / math.sqrt(weights) for step in expected], rtol=rtol, atol=1e-7)


def totals(expected):
    return [math.sqrt(sum(v[1] ** 2 for n, v in step.items() if n != "given")) for step in expected]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("how", [{}, {"accumulate": 3}, {"closure": True}], ids=["plain", "accumulation", "closure"])
def test_norms_of_five_steps(optimizer, how):
    record, expected = run(optimizer, **how)
    check(record, expected)
    np.testing.assert_allclose(record.context["grad_norm"], totals(expected), rtol=1e-5)


@pytest.mark.parametrize(("room", "tolerance"), [(250, 1e-4), (100, 0.5)], ids=["whole", "thinned"])
def test_copies_take_turns_where_memory_is_short(monkeypatch, room, tolerance):
    monkeypatch.setattr(parameters, "COPIED", room)  # the first weight alone has 192 bytes
    record, expected = run("momentum and decay")
    names = [name for name, _ in make().named_parameters()]
    seen = {name: record.series("/".join(name.rsplit(".", 1)), "norm", role="update") for name in names}
    for name, series in seen.items():
        assert 0 < len(series) < STEPS, name
        reference = [expected[step][name][2] for step in series.index]
        np.testing.assert_allclose(series, reference, rtol=tolerance, atol=2e-7, err_msg=name)
        values = record.series("/".join(name.rsplit(".", 1)), "norm")
        np.testing.assert_allclose(values, [step[name][0] for step in expected], rtol=1e-5)


def test_with_clipping_the_norm_that_is_told_stands():
    record, expected = run("momentum and decay", clip=0.05, tell=True)
    check(record, expected)
    told = [step["given"] for step in expected]
    np.testing.assert_allclose(record.context["grad_norm"], told, rtol=1e-6)
    assert min(told) > 0.1  # it had been clipped, so the gradients themselves would have said 0.05
    untold, expected = run("momentum and decay", clip=0.05)
    np.testing.assert_allclose(untold.context["grad_norm"], [0.05] * STEPS, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["SGD", "fused Adam"])
@pytest.mark.parametrize("unscale", [True, False])
def test_the_loss_scale_is_undone(optimizer, unscale):
    """The scaled run records what the plain one does: parameter gradients, activation gradients and their total."""
    plain = watch_scaled(optimizer, None, unscale)
    scaled = watch_scaled(optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**12), unscale)
    for site, role in (
        ("0/weight", "gradient"),
        ("0/weight", "update"),
        ("0/output", "gradient"),
        ("3/output", "gradient"),
    ):
        for stat, values in scalars(plain, site, role).items():
            np.testing.assert_allclose(
                scalars(scaled, site, role)[stat], values, rtol=1e-3, atol=1e-7, err_msg=f"{site} {stat}"
            )
    np.testing.assert_allclose(scaled.context["grad_norm"], plain.context["grad_norm"], rtol=1e-4)
    assert scaled.context["loss_scale"].tolist() == [2.0**12] * STEPS


def watch_scaled(optimizer, scaler, unscale):
    model = make()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    inputs = torch.randn(STEPS, 16, 6, generator=torch.Generator().manual_seed(1))
    with ns.attach(model, optimizer, every=1, scaler=scaler) as scope:
        for x in inputs:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if scaler is None:
                loss.backward()
                optimizer.step()
                continue
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    return scope.record()


def test_a_skipped_step_is_scaled_by_the_scale_it_ran_with():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with ns.attach(model, optimizer, every=1, scaler=scaler) as scope:
        for step in range(3):
            y = model(torch.ones(4, 3))
            loss = y.sum() + (model.weight.sum() * float("inf") if step == 1 else 0.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    record = scope.record()
    assert record.context["skipped"].tolist() == [False, True, False]
    assert record.context["loss_scale"].tolist() == [1024, 1024, 512]
    np.testing.assert_allclose(scalars(record, "/output", "gradient")["mean"], [1, 1, 1])
    assert np.isnan(record.context["grad_norm"][1])


def test_a_step_skipped_last_is_seen_at_the_close():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with ns.attach(model, optimizer, every=1, scaler=scaler) as scope:
        scaler.scale(model(torch.ones(4, 3)).sum() * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scope.record().context["skipped"].tolist() == [True]


def test_an_optimizer_that_steps_more_often_counts_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    often, seldom = (torch.optim.SGD(model[name].parameters(), 0.1) for name in "ab")
    with ns.attach(model, [often, seldom], every=1) as scope:
        for _ in range(2):
            for scale in (5.0, 3.0):
                often.zero_grad()
                (model["a"](torch.ones(1, 3)).sum() * scale).backward()
                often.step()
            seldom.zero_grad()
            model["b"](torch.ones(1, 3)).sum().backward()
            seldom.step()
    record = scope.record()
    np.testing.assert_allclose(
        record.context.drop_duplicates("step")["grad_norm"], [math.sqrt(8 * 9 + 8)] * 2, rtol=1e-6
    )
    assert record.context.groupby("step")["optimizer"].apply(list).tolist() == [["SGD 0", "SGD 1"]] * 2
    np.testing.assert_allclose(scalars(record, "a/weight", "gradient")["norm"], [3 * math.sqrt(6)] * 2, rtol=1e-6)


def test_the_gradient_norm_is_known_at_every_step():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = []
    with ns.attach(model, optimizer, every=4) as scope:
        for step in range(10):
            optimizer.zero_grad()
            (model(torch.randn(8, 6)).square().mean() * (float("nan") if step == 7 else 1.0)).backward()
            expected.append(math.sqrt(sum(norm(p.grad) ** 2 for p in model.parameters())))
            optimizer.step()
    context = scope.record().context
    assert context["sampled"].tolist() == [step % 4 == 0 for step in range(10)]
    np.testing.assert_allclose(context["grad_norm"][:7], expected[:7], rtol=1e-5)
    assert not np.isfinite(context["grad_norm"][7:]).any()
    assert (context["batch_size"] == 8).all()


def test_settings_of_every_group_are_those_of_the_step():
    model = make()
    groups = [
        {"params": model[0].parameters(), "lr": 0.1},
        {"params": model[3].parameters(), "lr": 0.2, "weight_decay": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with ns.attach(model, optimizer, every=2) as scope:
        for _ in range(3):
            model(torch.randn(8, 6)).sum().backward()
            optimizer.step()
            schedule.step()
    rows = scope.record().context
    sampled = rows[rows["sampled"]]
    assert sampled[["step", "group", "lr", "momentum", "decay"]].values.tolist() == [
        [0, 0, 0.1, 0.9, 0.0],
        [0, 1, 0.2, 0.9, 0.5],
        [2, 0, 0.025, 0.9, 0.0],
        [2, 1, 0.05, 0.9, 0.5],
    ]
    assert rows[~rows["sampled"]]["lr"].isna().all()
    sites = scope.record().sites.set_index("site")
    assert sites.loc[["0/weight", "3/bias"], "group"].tolist() == [0, 1]
    assert sites.loc["0/weight", ["optimizer", "shape", "trainable"]].tolist() == ["SGD", [8, 6], True]


def test_gains_and_biases_of_norms_are_kept_by_channel():
    model = make()
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(8.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with ns.attach(model, optimizer, every=1) as scope:
        model(torch.randn(8, 6)).sum().backward()
        optimizer.step()
    record = scope.record()
    assert record.array("1/weight", "value")[1].tolist() == [list(range(8))]
    found = scalars(record, "1/weight")
    assert [found[name][0] for name in ("value", "value.min", "value.q50", "value.max")] == [3.5, 0, 3.5, 7]
    assert record.array("1/bias", "value")[1].tolist() == [[0] * 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_norms_of_a_tensor_in_every_precision(dtype):
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = x.to(torch.complex128) if dtype.is_complex else x.double()
    expected = float(wide.abs().square().sum().sqrt())
    for tensor in (x, x.t()[:, ::1], x.clone()[::1]):
        assert float(parameters.norms([tensor])[0]) == pytest.approx(expected, rel=1e-5)
        (square,) = parameters.squared_norm([tensor, tensor])
        assert float(square) == pytest.approx(2 * expected**2, rel=1e-5)


def test_norms_of_large_half_precision_and_sparse_gradients():
    assert float(parameters.norms([torch.full((100,), 60000.0, dtype=torch.float16)])[0]) == pytest.approx(
        6e5, rel=1e-3
    )
    assert float(parameters.squared_norm([torch.full((100,), 60000.0, dtype=torch.float16)])[0]) == pytest.approx(
        3.6e11, rel=2e-3
    )
    twice = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 2]]), torch.tensor([1.0, 2.0, 4.0]), (5,), check_invariants=True
    )
    assert float(parameters.norms([twice])[0]) == 5
    assert float(parameters.squared_norm([twice])[0]) == 25
    assert not twice.is_coalesced()
    assert parameters.squared_norm([]) == []


def test_a_mix_of_precisions():
    (square,) = parameters.squared_norm([
        torch.full((4,), 2.0),
        torch.full((4,), 1.0, dtype=torch.float64),
        torch.ones(9).bfloat16(),
    ])
    assert float(square) == 29


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_directions_of_gradients_and_updates(optimizer):
    model = make().double()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    expected = []
    with ns.attach(model, optimizer, every=1) as scope:
        for step in range(STEPS):
            optimizer.zero_grad()
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            model(x).square().mean().backward()
            w, g = model[0].weight.detach().clone(), model[0].weight.grad.clone()
            optimizer.step()
            expected.append((w, g, model[0].weight.detach().clone()))
    record = scope.record()
    for step, (w, g, new) in enumerate(expected):
        dw, size = new - w, float(w.norm())
        cross = new - (new * w).sum() / size**2 * w  # the part across w, whose length is |w'| sin
        by_hand = {
            "relative": float(dw.norm()) / size,
            "radial": float((w * dw).sum()) / size**2,
            "angle": math.atan2(float(cross.norm()), float((new * w).sum()) / size),
        }
        for stat, value in by_hand.items():
            found = record.series("0/weight", stat, role="update")[step]
            assert found == pytest.approx(value, rel=1e-6, abs=1e-12), stat
        cosine = float((w * g).sum() / (w.norm() * g.norm()))
        assert record.series("0/weight", "cosine", role="gradient")[step] == pytest.approx(cosine, rel=1e-6, abs=1e-12)
        rows = (w * g).sum(1) / (w.norm(dim=1) * g.norm(dim=1))
        kept = record.array("0/weight", "row_cosine", role="gradient")[1][step]
        np.testing.assert_allclose(kept, rows, rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(record.array("0/weight", "row_norm")[1][step], w.norm(dim=1), rtol=1e-6)


def test_tiny_angles_keep_their_digits():
    model = nn.Linear(50, 4, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    with ns.attach(model, optimizer, every=1) as scope:
        model.weight.grad = torch.randn(4, 50, dtype=torch.float64)
        w, g = model.weight.detach().clone(), model.weight.grad
        optimizer.step()
    across = g - (g * w).sum() / (w * w).sum() * w
    angle = scope.record().series("/weight", "angle", role="update")[0]
    assert angle == pytest.approx(1e-9 * float(across.norm() / w.norm()), rel=1e-5)


def test_rows_are_taken_where_arrays_are_kept():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ns.attach(model, optimizer, every=1) as scope:
        for _ in range(12):
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
    record = scope.record()
    assert record.array("0/weight", "row_cosine", role="gradient")[0].tolist() == [*range(8), 8, 10]
    assert len(record.series("0/weight", "cosine", role="gradient")) == 12
    assert len(record.array("3/bias", "row_norm")[0]) == 0


@pytest.mark.parametrize(
    ("make_optimizer", "expected"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), ("sgd", False, True)),
        (lambda p: torch.optim.Adam(p, 0.1), ("adam", False, False)),
        (lambda p: torch.optim.AdamW(p, 0.1), ("adam", True, False)),
        (lambda p: torch.optim.RMSprop(p, 0.1), ("", False, False)),
        (lambda p: type("Mine", (torch.optim.AdamW,), {})(p, 0.1), ("adam", True, False)),
        (lambda p: type("Adam", (torch.optim.Adam,), {"step": lambda self: None})(p, 0.1), ("", False, False)),
    ],
    ids=["nesterov", "Adam", "AdamW", "RMSprop", "subclass", "step of its own"],
)
def test_the_rule_of_an_optimizer_is_that_of_its_step(make_optimizer, expected):
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model.parameters())
    found = optimizers.rule(model.weight, [optimizer])
    assert (found["rule"], found["decoupled"], found["nesterov"]) == expected
    assert optimizers.rule(torch.ones(1), [optimizer]) == {}


class Late(nn.Module):
    """Its bias has its gradient before any activation has one."""

    def __init__(self):
        super().__init__()
        self.linear, self.late = nn.Linear(8, 2, bias=False), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.linear(x) + self.late


def left(clear):
    """Train with a way to clear gradients, before and after the forward pass; return what was left at steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), Late())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    before, after = clear
    with ns.attach(model, optimizer, every=1) as scope:
        for _ in range(STEPS):
            if before is not None:
                optimizer.zero_grad(before)
            loss = (model(torch.randn(16, 6)) - 1).square().mean()
            if after is not None:
                optimizer.zero_grad(after)
            loss.backward()
            optimizer.step()
    return training.left_over(scope.record())


@pytest.mark.parametrize("clear", [(True, None), (None, True), (None, False)])
def test_a_gradient_that_comes_early_is_not_left_over(clear):
    assert len(left(clear)) == 0


def test_what_is_left_of_a_gradient_is_seen():
    assert (left((None, None)) > 0.1).sum() == STEPS - 1
    assert left((False, None)).tolist() == [0.0] * (STEPS - 1)
