"""Under torch.compile: nothing breaks or recompiles, and what needs no hook is recorded."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import normscope as ns


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def job():
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def train(model, optimizer, steps=12):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()


def wrapped(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def watched(compile_, backend, when, every=3, **settings):
    """Train 2 + 12 steps, attached before or after compiling or after the first 2; return the model and the scope."""
    model, optimizer = job()
    scope = ns.attach(model, optimizer, every=every, **settings) if when == "before" else None
    run = compile_(model, backend)
    scope = ns.attach(run, optimizer, every=every, **settings) if when == "after" else scope
    train(run, optimizer, 2)
    scope = ns.attach(run, optimizer, every=every, **settings) if when == "later" else scope
    train(run, optimizer)
    if scope is not None:
        scope.close()
    return model, scope


@pytest.mark.parametrize("when", ["before", "after", "later"])
@pytest.mark.parametrize("compile_", [wrapped, in_place])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_no_break_no_recompilation_the_same_training(backend, compile_, when, caplog):
    plain, _ = watched(compile_, backend, "never")
    alone = {name: dict(counters[name]) for name in ("stats", "graph_break", "recompiles")}
    counters.clear()
    torch._dynamo.reset()
    model, scope = watched(compile_, backend, when)
    assert {name: dict(counters[name]) for name in alone} == alone
    assert alone["stats"]["unique_graphs"] == 1
    assert not alone["graph_break"]
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    record = scope.record()
    assert record.steps.tolist() == list(range(0, 12 if when == "later" else 14, 3))
    assert {block.site for block in record.blocks if block.stats != ("lr",)} == {
        *("body.0/weight", "body.0/bias", "body.1/weight", "body.1/bias", "body.1/running", "head/weight", "head/bias")
    }
    assert {block.role for block in record.blocks} == {"value", "gradient", "update"}
    assert record.series("head/weight", "norm", role="update", phase="flight").index.tolist() == list(
        range(12 if when == "later" else 14)
    )
    assert sum(r.name == "normscope" and "the model runs compiled" in r.message for r in caplog.records) == 1


def test_running_statistics_are_those_of_the_layer():
    model, scope = watched(wrapped, "eager", "before", every=13)
    steps, means = scope.record().array("body.1/running", "mean")
    assert steps.tolist() == [0, 13]
    assert torch.equal(torch.tensor(means[-1]), model.body[1].running_mean)


def test_the_finding_says_what_is_missing_and_what_to_do():
    _, scope = watched(wrapped, "eager", "after")
    (finding,) = [f for f in scope.findings() if f.id == "run.compiled"]
    assert finding.verdict is ns.Verdict.NOTE
    assert finding.message.startswith("The model runs compiled, where no hook fires: parameters, gradients,")
    assert "torch.compiler.set_stance('force_eager' if step % every == 0 else 'default')" in finding.remedy
    assert not [f for f in scope.findings() if "failed on this record" in f.message]


def test_who_wants_no_activations_is_told_nothing():
    _, scope = watched(wrapped, "eager", "after", probes="parameters")
    assert not [f for f in scope.findings() if f.id == "run.compiled"]


def test_sampled_steps_that_run_uncompiled_are_measured():
    model, optimizer = job()
    compiled = torch.compile(model, backend="aot_eager")
    with ns.attach(compiled, optimizer, every=3) as scope:
        for step in range(12):
            with torch.compiler.set_stance("force_eager" if step % 3 == 0 else "default"):
                train(compiled, optimizer, 1)
    record = scope.record()
    assert record.series("body.0/output", "rms").index.tolist() == [0, 3, 6, 9]
    assert record.series("body.0/output", "rms", role="gradient").index.tolist() == [0, 3, 6, 9]
    assert counters["stats"]["unique_graphs"] == 1
    assert not [f for f in scope.findings() if f.id == "run.compiled"]


def test_of_a_model_compiled_in_parts_the_rest_is_measured():
    model, optimizer = job()
    model.body = torch.compile(model.body, backend="eager")
    with ns.attach(model, optimizer, every=1) as scope:
        train(model, optimizer)
    record = scope.record()
    assert {"body/output", "head/output", "body._orig_mod.0/weight"} <= {block.site for block in record.blocks}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_step_is_heard():
    """The optimizer's hooks run where its step is called outside of what is compiled."""
    model, optimizer = job()

    @torch.compile(backend="aot_eager")
    def loss_of(x):
        return model(x).square().mean()

    with ns.attach(model, optimizer, every=2) as scope:
        for _ in range(6):
            optimizer.zero_grad()
            loss_of(torch.randn(8, 4)).backward()
            optimizer.step()
    assert scope.record().steps.tolist() == [0, 2, 4]
    assert [f.id for f in scope.findings() if f.id == "run.compiled"] == ["run.compiled"]
