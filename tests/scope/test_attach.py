"""What attach accepts and refuses, and what the scope does with it."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.errors import ArgumentError, NormscopeError, StoreError

LOSS = nn.functional.mse_loss


def model_of(**others):
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))


MODEL, OTHER = model_of(), model_of()


def optimizer_of(model=MODEL):
    return torch.optim.SGD(model.parameters(), 0.1)


OPTIMIZER = optimizer_of()
PROBLEM = ns.Problem(OTHER, LOSS, [(torch.ones(4, 4), torch.ones(4, 2))])


def scripted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


class Silent(torch.optim.Optimizer):
    """An optimizer that has not called its base class: it has no step hooks."""

    def __init__(self, params):
        self.param_groups = [{"params": list(params)}]


REFUSED = {
    "model, a class": ((nn.Linear, OPTIMIZER), {}, "model=type must be a torch.nn.Module"),
    "model, none": ((None, OPTIMIZER), {}, "model=NoneType must be a torch.nn.Module"),
    "model, scripted": ((scripted(MODEL), OPTIMIZER), {}, "model=.* is scripted and takes no hooks"),
    "model without parameters": (
        (nn.ReLU(), OPTIMIZER),
        {},
        "model=ReLU has no parameters, so nothing trains",
    ),
    "optimizer, parameters": (
        (MODEL, MODEL.parameters()),
        {},
        "optimizer=generator must be a torch.optim.Optimizer or a sequence",
    ),
    "optimizer, none": ((MODEL, None), {}, "optimizer=NoneType must be"),
    "optimizer, a class": ((MODEL, torch.optim.SGD), {}, "optimizer=type must be"),
    "optimizers, empty": ((MODEL, []), {}, r"optimizer=\(\) is empty; pass the optimizer"),
    "optimizers, one twice": ((MODEL, [OPTIMIZER, OPTIMIZER]), {}, "the same optimizer is there twice"),
    "optimizers, one of them wrong": ((MODEL, [OPTIMIZER, 3]), {}, "optimizer=int must be"),
    "optimizer of another model": (
        (MODEL, optimizer_of(OTHER)),
        {},
        "holds none of the model's 8 parameters: it belongs to another model",
    ),
    "one optimizer of another model": (
        (MODEL, (OPTIMIZER, optimizer_of(OTHER))),
        {},
        "holds none of the model's 8 parameters",
    ),
    "optimizer without hooks": ((MODEL, Silent(MODEL.parameters())), {}, "optimizer=Silent has no step hooks"),
    "every 0": (
        (MODEL, OPTIMIZER),
        {"every": 0},
        "every=0 must be a whole number of steps, at least 1; the default is 10",
    ),
    "every -1": ((MODEL, OPTIMIZER), {"every": -1}, "every=-1 must be"),
    "every True": ((MODEL, OPTIMIZER), {"every": True}, "every=True must be"),
    "every 1.5": ((MODEL, OPTIMIZER), {"every": 1.5}, "every=1.5 must be"),
    "every, text": ((MODEL, OPTIMIZER), {"every": "10"}, "every='10' must be"),
    "layers, no match": (
        (MODEL, OPTIMIZER),
        {"layers": "layer3.*"},
        r"layers='layer3\.\*' is unknown; .*It matches no module",
    ),
    "layers, nearly": ((MODEL, OPTIMIZER), {"layers": "BatchNorm1"}, "did you mean 'BatchNorm1d'"),
    "layers, one does not match": ((MODEL, OPTIMIZER), {"layers": ["0", "9"]}, "layers='9' is unknown"),
    "layers, type without match": ((MODEL, OPTIMIZER), {"layers": nn.Conv2d}, "It matches no module"),
    "layers, another type": (
        (MODEL, OPTIMIZER),
        {"layers": [int]},
        "must be a glob over module paths or a subclass of torch.nn.Module",
    ),
    "layers, a number": ((MODEL, OPTIMIZER), {"layers": 3}, "layers=3 must be a glob"),
    "layers, a module": ((MODEL, OPTIMIZER), {"layers": [MODEL[0]]}, "layers=Linear.* must be a glob"),
    "layers, empty": ((MODEL, OPTIMIZER), {"layers": []}, r"layers=\[\] is empty; None watches all layers"),
    "probes, unknown": (
        (MODEL, OPTIMIZER),
        {"probes": "moment"},
        "probes='moment' is unknown; did you mean 'moments'.*Options: moments, tails",
    ),
    "probes, one unknown": ((MODEL, OPTIMIZER), {"probes": ["tails", 3]}, "probes=3 is unknown"),
    "probes, empty": ((MODEL, OPTIMIZER), {"probes": ()}, r"probes=\(\) is empty; options: moments"),
    "probes, a number": ((MODEL, OPTIMIZER), {"probes": 3}, "probes=3 must be a name or a sequence of names"),
    "reduction": ((MODEL, OPTIMIZER), {"reduction": "none"}, "reduction='none' is unknown; .*Options: mean, sum"),
    "problem, a function": (
        (MODEL, OPTIMIZER),
        {"problem": LOSS},
        r"problem=function must be normscope.Problem\(model, loss, batches\)",
    ),
    "problem of another model": ((MODEL, OPTIMIZER), {"problem": PROBLEM}, "problem holds another model, a Sequential"),
    "scaler": ((MODEL, OPTIMIZER), {"scaler": 1024.0}, "scaler=float must be a torch.amp.GradScaler"),
    "run, a number": ((MODEL, OPTIMIZER), {"run": 3}, "run=3 must be a folder for the record, as 'runs/a'"),
    "run, empty": ((MODEL, OPTIMIZER), {"run": ""}, "run='' must be a folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_argument_is_named_and_nothing_is_left_behind(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (args, settings, message) = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        ns.attach(*args, **{"run": "run", **settings})
    assert not any("_hooks" in key and value for module in MODEL.modules() for key, value in vars(module).items())
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_exists_is_a_file_or_cannot_be_written(tmp_path):
    ns.attach(MODEL, OPTIMIZER, run=tmp_path / "a").close()
    (tmp_path / "file").write_text("")
    for run, message in (
        (tmp_path / "a", "holds a run already"),
        (tmp_path / "file", "cannot be created"),
        ("/proc/x", "cannot be created"),
    ):
        with pytest.raises(StoreError, match=message):
            ns.attach(MODEL, OPTIMIZER, run=run)
    assert not any("_hooks" in key and value for module in MODEL.modules() for key, value in vars(module).items())


@pytest.mark.parametrize("argument", ["loss", "grad_norm", "batch"])
@pytest.mark.parametrize("value", ["0.5", torch.ones(2), [1.0], 1j, torch.tensor(1j), None])
def test_what_step_is_told_is_a_number(argument, value):
    with ns.attach(MODEL, OPTIMIZER) as scope:
        if value is None:
            scope.step(**{argument: None})
        else:
            with pytest.raises(ArgumentError, match=f"{argument}=.* must be a number or a tensor of one element"):
                scope.step(**{argument: value})


def test_every_error_has_one_base():
    assert issubclass(ArgumentError, NormscopeError)
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(StoreError, NormscopeError)
    assert issubclass(StoreError, OSError)


# ---- what is accepted ------------------------------------------------------------------------------------------------


def train(model, optimizer, steps=1, tell=None, **settings):
    with ns.attach(model, optimizer, every=1, **settings) as scope:
        for step in range(steps):
            model(torch.ones(8, 4) * torch.arange(8.0)[:, None]).square().mean().backward()
            if tell == "before":
                scope.step(loss=step)
            optimizer.step()
            if tell == "after":
                scope.step(loss=step)
    return scope


@pytest.mark.parametrize(
    ("layers", "modules"),
    [
        (None, {"0", "1", "2.0", "2.1", "3"}),
        ("2", {"2.0", "2.1"}),
        ("2.*", {"2.0", "2.1"}),
        (nn.Linear, {"0", "2.0", "3"}),
        (["0", nn.ReLU], {"0", "2.1"}),
        ("*", {"0", "1", "2.0", "2.1", "3"}),
        ("", {"0", "1", "2.0", "2.1", "3"}),
    ],
)
def test_layers(layers, modules):
    model = model_of()
    sites = train(model, optimizer_of(model), layers=layers).record().sites
    assert set(sites.loc[sites["slot"] == "output", "module"]) == modules
    assert set(sites.loc[sites["class"] == "Parameter", "module"]) == modules - {"2.1"}


@pytest.mark.parametrize(
    ("probes", "stats"),
    [
        ("moments", {"mean", "var", "rms", "count", "nonfinite", "dead"}),
        (["tails"], {"max", "zeros", "kurtosis", "sample_n"}),
        (
            ("parameters",),
            {"norm", "rms", "row_norm", "cosine", "row_cosine", "relative", "radial", "angle"},
        ),
    ],
)
def test_probes(probes, stats):
    model = model_of()
    record = train(model, optimizer_of(model), probes=probes).record()
    assert {stat.partition(".")[0] for block in record.blocks for stat in block.stats} == stats
    assert record.runs[0]["probes"] == ([probes] if isinstance(probes, str) else list(probes))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("root", [True, False], ids=["forward", "training step"])
def test_the_loss_belongs_to_its_step(when, root):
    model = model_of()
    optimizer = optimizer_of(model)
    body = model if root else nn.ModuleDict({"inner": model})
    with ns.attach(body, optimizer, every=2) as scope:
        for step in range(5):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            if when == "before":
                scope.step(loss=torch.tensor(float(step)), grad_norm=10 * step)
            optimizer.step()
            if when == "after":
                scope.step(loss=step, grad_norm=torch.tensor(10.0 * step), batch=np.int64(7))
    context = scope.record().context
    assert context["loss"].tolist() == [0, 1, 2, 3, 4]
    assert context["grad_norm"].tolist() == [0, 10, 20, 30, 40]
    if when == "after":
        assert context["batch_size"].tolist() == [7] * 5


def test_a_loss_told_later_does_not_follow_the_tensor():
    model = model_of()
    optimizer = optimizer_of(model)
    running = torch.zeros(())
    with ns.attach(model, optimizer, every=5) as scope:
        for _ in range(3):
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
            running += 1
            scope.step(loss=running)
    assert scope.record().context["loss"].tolist() == [1, 2, 3]


def test_the_record_can_be_read_at_any_time(tmp_path):
    model = model_of()
    optimizer = optimizer_of(model)
    with ns.attach(model, optimizer, run=tmp_path / "a", every=2) as scope:
        assert len(scope.record().context) == 0
        for step in range(6):
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
            assert scope.record().context["step"].unique().tolist() == list(range(step + 1))
            assert scope.record().steps.tolist() == list(range(0, step + 1, 2))
            assert ns.load(tmp_path / "a").steps.tolist() == list(range(0, step + 1, 2))
    closed = scope.record()
    assert closed.frame().equals(ns.load(tmp_path / "a").frame())
    run = closed.runs[0]
    assert (run["run"], run["every"], run["model"], run["parameters"], run["norms"]) == ("a", 2, "Sequential", 58, 1)
    assert {"normscope", "torch", "numpy", "python"} == set(run["versions"])


def test_a_scope_says_how_far_it_is():
    model = model_of()
    scope = train(model, optimizer_of(model), steps=3)
    assert repr(scope) == "Scope(Sequential, 7 modules, 1 norms, closed, step 3, every 1, run in memory)"


def test_a_full_disk_does_not_stop_the_run(tmp_path, caplog):
    model = model_of()
    optimizer = optimizer_of(model)
    with ns.attach(model, optimizer, run=tmp_path / "a", every=1) as scope:
        for step in range(12):
            if step == 3:
                scope._session.store._connection.execute("PRAGMA query_only = ON")
            if step == 8:
                scope._session.store._connection.execute("PRAGMA query_only = OFF")
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
            assert len(ns.load(tmp_path / "a").steps) == (min(step + 1, 3) if step < 8 else step + 1)
    assert [r.message for r in caplog.records if "cannot write" in r.message] == [caplog.records[0].message]
    assert ns.load(tmp_path / "a").steps.tolist() == list(range(12))


def test_a_disk_that_stays_full_bounds_what_waits(tmp_path, monkeypatch):
    monkeypatch.setattr("normscope.scope.session._GIVE_UP_ROWS", 200)
    model = model_of()
    optimizer = optimizer_of(model)
    with ns.attach(model, optimizer, run=tmp_path / "a", every=1) as scope:
        scope._session.store._connection.execute("PRAGMA query_only = ON")
        for _ in range(300):
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
            assert scope._session.store.waiting < 1000
    assert len(ns.load(tmp_path / "a").steps) == 0


def test_a_compiled_model_is_watched_under_the_users_names():
    torch._dynamo.reset()
    model = model_of()
    compiled = torch.compile(model, backend="eager")
    optimizer = optimizer_of(model)
    with ns.attach(compiled, optimizer, every=1) as scope:
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    assert "0/output" in set(scope.record().sites["site"])


def test_a_watched_model_saves_and_copies_as_ever():
    model = model_of()
    with ns.attach(model, optimizer_of(model)):
        state = copy.deepcopy(model).state_dict()
        torch.save(model.state_dict(), io.BytesIO())
    assert list(state) == list(model_of().state_dict())
