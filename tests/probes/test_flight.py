"""The flight recorder against float64 norms taken around each step, and what it leaves alone."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.schedule import RING
from normscope.metrics import tables
from normscope.probes import flight

LIMIT = {"norm": 2e-6, "rms_t": 2e-6}


def network(width=24):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 3))


def wide(x):
    return x.detach().double().numpy().copy()


def run(optimizer_of, steps=20, model=None, every=7, probes=None, hook=None, dtype=torch.float32):
    """Train, attached; return the record and what float64 says of each step: |g|, |dw|, |w|, RMS_t."""
    model = network() if model is None else model
    model.to(dtype)
    optimizer = optimizer_of(model)
    truth = {}
    with ns.attach(model, optimizer, every=every, probes=probes) as scope:
        for step in range(steps):
            optimizer.zero_grad()
            if hook is not None:
                hook(step, model)
            model(torch.randn(16, 12, dtype=dtype)).square().mean().backward()
            before = {n: wide(p) for n, p in model.named_parameters()}
            gradients = {n: wide(p.grad) for n, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            truth[step] = {n: told(p, before[n], gradients.get(n), optimizer) for n, p in model.named_parameters()}
    return scope.record(), truth


def told(parameter, before, gradient, optimizer):
    after = wide(parameter)
    known = {"update": np.linalg.norm(after - before), "value": np.linalg.norm(after)}
    if gradient is not None:
        known["gradient"] = np.linalg.norm(gradient)
        state = optimizer.state[parameter]
        moment = state.get("exp_avg_sq", state.get("square_avg"))
        if moment is not None:
            group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
            beta = group["betas"][1] if "betas" in group else group.get("alpha", group.get("rho"))
            v = wide(moment) / (1 - beta ** float(state["step"]))
            known["rms_t"] = math.sqrt(np.mean(gradient**2 / np.maximum(v, group["eps"] ** 2)))
    return known


def recorded(record, role):
    stat = "rms_t" if role == "rms_t" else "norm"
    return tables.table(record, stat, slot="*", role="gradient" if role == "rms_t" else role, phase="flight")


OPTIMIZERS = {
    "adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "adam-eps": lambda m: torch.optim.Adam(m.parameters(), eps=0.1),
    "adam-fused": lambda m: torch.optim.Adam(m.parameters(), fused=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "adam-groups": lambda m: torch.optim.Adam([
        {"params": list(m.parameters())[:3], "lr": 1e-3, "betas": (0.5, 0.9)},
        {"params": list(m.parameters())[3:]},
    ]),
    "nadam": lambda m: torch.optim.NAdam(m.parameters()),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_is_what_float64_says(name):
    record, truth = run(OPTIMIZERS[name])
    for role in ("gradient", "update", "value", "rms_t"):
        found = recorded(record, role)
        if name == "sgd" and role == "rms_t":
            assert found.isna().to_numpy().all()  # no second moment
            continue
        assert found.index.tolist() == list(range(20))
        expected = [[truth[step][f"{s.replace('/', '.')}"][role] for s in found.columns] for step in found.index]
        np.testing.assert_allclose(found.to_numpy(), expected, rtol=1e-4 if role == "update" else 3e-6)


def test_steps_counted_on_a_device_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(flight, "_is_here", lambda number: isinstance(number, float))
    record, truth = run(OPTIMIZERS["adam-groups"])
    found = recorded(record, "rms_t")
    expected = [[truth[step][s.replace("/", ".")]["rms_t"] for s in found.columns] for step in found.index]
    np.testing.assert_allclose(found.to_numpy(), expected, rtol=3e-6)


def test_the_total_is_the_gradient_norm_of_the_step():
    record, _ = run(OPTIMIZERS["adamw"])
    total = np.sqrt((recorded(record, "gradient") ** 2).sum(axis=1))
    np.testing.assert_allclose(total, tables.context(record)["grad_norm"], rtol=1e-6)


def test_learning_rates_of_each_group_are_kept():
    def schedule(step, model):
        del model
        kept["optimizer"].param_groups[0]["lr"] = 0.1 / (1 + step)

    kept = {}

    def build(model):
        kept["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
        return kept["optimizer"]

    record, _ = run(build, hook=schedule)
    lr = tables.table(record, "lr", slot="*", phase="flight")["SGD/group0"]
    np.testing.assert_allclose(lr, [0.1 / (1 + step) for step in range(20)], rtol=1e-6)


def test_rms_t_is_one_at_the_first_step_and_bounded():
    def burst(step, model):
        if step == 15:
            model[0].weight.register_hook(lambda g: g * 1e6)

    record, _ = run(lambda m: torch.optim.AdamW(m.parameters(), lr=0.0), hook=burst)
    rms = recorded(record, "rms_t")
    np.testing.assert_allclose(rms.iloc[0], 1, rtol=1e-5)
    bias = math.sqrt((1 - 0.999**16) / (1 - 0.999))  # of v / (1 - beta^t), all of it from this one gradient
    assert rms["0/weight"].iloc[15] == pytest.approx(bias, rel=1e-3)
    assert rms["3/weight"].iloc[15] < 2.5


def test_a_large_tensor_is_estimated_from_a_sample():
    record, truth = run(OPTIMIZERS["adamw"], steps=5, model=nn.Sequential(nn.Linear(12, 20_000), nn.Linear(20_000, 1)))
    for role in ("update", "value", "rms_t"):
        found = recorded(record, role)["0/weight"]
        np.testing.assert_allclose(found, [truth[s]["0.weight"][role] for s in range(5)], rtol=0.05)
    exact = [truth[s]["0.weight"]["gradient"] for s in range(5)]
    np.testing.assert_allclose(recorded(record, "gradient")["0/weight"], exact, rtol=1e-5)


def test_what_has_no_gradient_is_missing_and_what_is_not_finite_is_infinite():
    def act(step, model):
        model[3].weight.requires_grad_(step < 4)
        if step == 10:
            model[0].weight.register_hook(lambda g: g * float("nan"))

    record, _ = run(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), hook=act)
    gradient = recorded(record, "gradient")
    assert gradient["3/weight"].isna().tolist() == [step >= 4 for step in range(20)]
    assert np.isinf(gradient["0/weight"]).tolist() == [step >= 10 for step in range(20)]
    assert not np.isinf(gradient.loc[10, ["1/weight", "3/bias"]]).any()


def test_bfloat16_is_summed_in_float32():
    record, truth = run(OPTIMIZERS["adamw"], dtype=torch.bfloat16)
    expected = [truth[step]["0.weight"]["gradient"] for step in range(20)]
    np.testing.assert_allclose(recorded(record, "gradient")["0/weight"], expected, rtol=1e-5)
    assert (recorded(record, "update")["0/weight"] > 0).all()


def test_closures_and_two_optimizers():
    model = network()
    names = [n for n, _ in model.named_parameters()]
    first = torch.optim.LBFGS(model[0].parameters(), max_iter=2)
    second = torch.optim.AdamW([*model[1].parameters(), *model[3].parameters()])
    x = torch.randn(16, 12)

    def closure():
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with ns.attach(model, [first, second]) as scope:
        for _ in range(6):
            first.step(closure)
            second.step()
    record = scope.record()
    for role in ("gradient", "update", "value"):
        found = recorded(record, role)
        assert sorted(found.columns) == sorted(n.replace(".", "/") for n in names)
        assert found.notna().to_numpy().all()
        assert len(found) == 6


def test_a_parameter_that_joins_later_is_recorded_from_there():
    model = network()
    optimizer = torch.optim.AdamW(model[0].parameters())
    with ns.attach(model, optimizer) as scope:
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": model[3].parameters()})
            optimizer.zero_grad()
            model(torch.randn(4, 12)).sum().backward()
            optimizer.step()
    found = recorded(scope.record(), "gradient")
    assert found["3/weight"].isna().tolist() == [True] * 3 + [False] * 3
    assert found["0/weight"].notna().all()


def test_only_the_last_steps_stay_and_those_around_what_fires(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with ns.attach(model, optimizer, run=tmp_path / "a", every=50, probes=("parameters", "flight")) as scope:
        for step in range(1200):
            optimizer.zero_grad()
            loss = model(torch.randn(16, 12)).square().mean()
            loss.backward()
            optimizer.step()
            scope.step(loss=1e3 if step == 400 else 1 + 0.01 * float(torch.rand(())))
    kept = recorded(ns.load(tmp_path / "a"), "gradient").index
    expected = set(range(400 - RING + 1, 465)) | set(range(1200 - RING, 1200))
    assert set(kept) == expected
    assert tables.context(ns.load(tmp_path / "a")).index.tolist() == list(range(1200))  # loss and norm of all steps


def test_training_and_generator_are_left_alone():
    def train(attached):
        model, optimizer = network(), None
        optimizer = torch.optim.AdamW(model.parameters())
        scope = ns.attach(model, optimizer, probes="flight") if attached else None
        for _ in range(15):
            optimizer.zero_grad()
            model(torch.randn(16, 12)).square().mean().backward()
            optimizer.step()
        if scope is not None:
            scope.close()
        return [*model.parameters(), *(p.grad for p in model.parameters()), torch.get_rng_state()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


def test_sixteen_bytes_a_tensor_and_step():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    recorder = flight.Flight(dict(model.named_parameters()), [optimizer], str)
    recorder.before_step(optimizer, 0)
    ((part, _),) = recorder._mine(optimizer)
    assert part.ring.nelement() * part.ring.element_size() == 16 * RING * len(list(model.parameters()))


def test_a_failure_switches_it_off_and_training_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(flight._Flat, "norms", lambda *_: 1 / 0)
    record, _ = run(OPTIMIZERS["adamw"])
    assert len(tables.context(record)) == 20
    assert not recorded(record, "gradient").size
    assert "flight: ZeroDivisionError" in caplog.text


def test_a_fused_optimizer_that_undoes_the_loss_scale_leaves_gradients_without_it():
    model = nn.Linear(4, 4, bias=False)
    optimizer, scaler = torch.optim.Adam(model.parameters(), fused=True), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with ns.attach(model, optimizer, scaler=scaler) as scope:
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(8, 4)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert recorded(scope.record(), "rms_t").iloc[0, 0] == pytest.approx(1, rel=1e-5)


class Clipped(torch.optim.Adam):
    """Steps with the step of its base class, which has hooks of its own, and then does more."""

    def step(self, closure=None):
        if self.fails:
            super().step(lambda: 1 / 0)
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(-0.3, 0.3)

    fails = False


def test_a_step_that_calls_that_of_its_base_class_is_one_step():
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    record, truth = run(lambda m: Clipped(m.parameters(), lr=0.05), steps=6)
    found = recorded(record, "update")
    assert found.index.tolist() == list(range(6))
    expected = [[truth[step][s.replace("/", ".")]["update"] for s in found.columns] for step in found.index]
    np.testing.assert_allclose(found.to_numpy(), expected, rtol=1e-4)


def test_a_step_that_raised_inside_another_is_forgotten():
    model = network()
    optimizer = Clipped(model.parameters(), lr=0.05)
    with ns.attach(model, optimizer) as scope:
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(16, 12)).square().mean().backward()
            optimizer.fails = step == 1
            if optimizer.fails:
                with pytest.raises(ZeroDivisionError):
                    optimizer.step()
            else:
                optimizer.step()
    assert recorded(scope.record(), "update").index.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_type_does_not_matter(dtype):
    torch.set_default_dtype(dtype)
    try:
        model = nn.ModuleList([nn.Linear(4, 4, bias=False, dtype=torch.float32) for _ in range(2)])
        optimizer = torch.optim.Adam(model.parameters())
        with ns.attach(model, optimizer) as scope:
            for step in range(3):
                model[0].weight.grad = torch.full((4, 4), 1e5 / 3, dtype=torch.float32)
                model[1].weight.grad = torch.ones(4, 4, dtype=torch.float32) if step < 2 else None
                optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    found = recorded(scope.record(), "gradient").to_numpy()
    np.testing.assert_allclose(found, [[4e5 / 3, 4], [4e5 / 3, 4], [4e5 / 3, math.nan]], rtol=1e-6)


ODD = {
    "float8": lambda: torch.zeros(4, 4).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "meta": lambda: torch.zeros(4, 4, device="meta"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_that_cannot_be_read_is_left_out(kind, caplog):
    model = network()
    model.register_parameter("odd", nn.Parameter(ODD[kind](), requires_grad=False))
    record = trained(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert recorded(record, "value").shape == (3, 6)
    assert not caplog.text


def trained(model, optimizer):
    with ns.attach(model, optimizer) as scope:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 12)).square().mean().backward()
            optimizer.step()
    return scope.record()


class Pair(torch.optim.Adam):
    """Has settings and states that are no numbers."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.param_groups[0]["eps"], self.param_groups[0]["betas"] = (1e-30, 1e-3), (0.9,)

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"step": 1, "exp_avg_sq": torch.ones_like(p)}


def test_settings_that_are_no_numbers_are_passed_over(caplog):
    model = network()
    assert len(recorded(trained(model, Pair(model.parameters())), "value")) == 3
    assert not caplog.text


class Pruned(torch.optim.SGD):
    """Cuts a weight inside its sixth step."""

    steps = 0

    def step(self, closure=None):
        super().step(closure)
        self.steps += 1
        if self.steps == 6:
            p = self.param_groups[0]["params"][0]
            p.data, p.grad = p.data[:2].clone(), None


def test_steps_before_one_that_switches_it_off_are_kept(caplog):
    model = nn.Linear(4, 4, bias=False)
    optimizer = Pruned(model.parameters(), lr=0.1)
    with ns.attach(model, optimizer, every=1000) as scope:
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
    assert recorded(scope.record(), "value").index.tolist() == list(range(5))
    assert "switched a probe off" in caplog.text


SHAPES = {"experts": (4, 128, 128), "two rows": (2, 20_000), "alternating rows": (1024, 64), "a column": (20_000, 1)}


@pytest.mark.parametrize("name", SHAPES)
def test_a_sample_has_a_part_of_every_row(name):
    x = torch.randn(SHAPES[name])
    x[::2] *= 100
    flat = flight._Flat([x])
    flat.copy(0, [x])
    (found,) = flat.norms(0) * math.sqrt(x.numel() / flat.sizes[0])
    assert flat.sizes[0] <= flight.SAMPLE
    assert float(found) == pytest.approx(float(x.norm()), rel=0.15)


def test_gradients_of_another_order_of_memory_are_looked_at_where_the_weight_is():
    x = torch.randn(300, 200)
    flat = flight._Flat([x])
    flat.copy(0, [x])
    flat.copy(1, [x.T.contiguous().T])
    assert torch.equal(*flat.both)
    turned = flight._Flat([x.T])
    turned.copy(0, [x.T])
    turned.copy(1, [x.T.contiguous()])
    assert torch.equal(*turned.both)


def test_what_is_made_in_inference_mode_can_be_written_later(caplog):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ns.attach(model, optimizer) as scope:
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 12)).square().mean().backward()
            with torch.inference_mode(step == 0):
                optimizer.step()
    assert len(recorded(scope.record(), "value")) == 3
    assert not caplog.text
