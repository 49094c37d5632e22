"""compare: trials run alike, kept, resumed and laid side by side; the user's program is left as it was."""

import functools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.scope.identity import described

CALLS = []


def net(norm):
    return nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 2))


def make_bn():
    return net(nn.BatchNorm1d)


def make_ln():
    return net(nn.LayerNorm)


def make_broken():
    return nn.Sequential(nn.Linear(3, 2))


def data():
    x = torch.randn(8, 16, 4)
    return x, (x.sum(-1) > 0).long()


def fit(model, attach, lr=0.1, seed=0):
    batches = data()
    CALLS.append((type(model[1]).__name__, lr, seed, batches[0].sum().item(), torch.get_rng_state().sum().item()))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with attach(model, optimizer) as scope:
        for x, y in zip(*batches, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scope.step(loss=loss)
    return {"accuracy": (model(batches[0][0]).argmax(-1) == batches[1][0]).float().mean(), "last": loss}


QUICK = {"probes": "parameters", "every": 4, "progress": False}
MAKERS = {"bn": make_bn, "ln": make_ln}


@pytest.fixture(autouse=True)
def fresh():
    CALLS.clear()


def test_the_contract_in_one_line():
    found = ns.compare({"bn": make_bn, "mine": lambda: net(nn.LayerNorm)}, fit=fit, seeds=1, **QUICK)
    assert found.entries == ("bn", "mine")
    assert found.select == "accuracy"
    assert {trial.rate for trial in found.trials} == {0.0316, 0.1, 0.316}
    assert "Comparison of 2 entries, 6 runs, 1 seeds" in repr(found)


def test_a_fit_that_takes_neither_rate_nor_seed():
    calls = []

    def own(model, attach):
        calls.append(model)
        return {"loss": 1.0}

    found = ns.compare({"bn": make_bn}, fit=own, seeds=2, **QUICK)
    assert len(calls) == 2
    assert all(np.isnan(trial.rate) for trial in found.trials)
    assert any("fit did not call attach" in note for note in found.notes)
    assert found.summary().iloc[0]["mean"] == 1.0


def test_makers_and_fit_are_given_what_their_signature_names():
    got = []

    def make(seed):
        got.append(seed)
        return make_bn()

    def own(model, attach, *, learning_rate):
        got.append(learning_rate)
        return {"loss": learning_rate}

    ns.compare({"bn": make}, fit=own, seeds=[7], learning_rates=[0.5, 0.25], check=False, **QUICK)
    assert got == [7, 0.25, 7, 0.5]


def test_all_entries_see_the_same_data_and_random_numbers():
    ns.compare(MAKERS, fit=fit, seeds=2, learning_rates=0.1, **QUICK)
    drawn = {(seed, *rest) for _, _, seed, *rest in CALLS}
    assert len(CALLS) == 4
    assert len(drawn) == 2
    assert len({values for _, *values in map(tuple, drawn) for values in [tuple(values)]}) == 2


def test_the_random_states_of_the_program_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    ns.compare({"bn": make_bn}, fit=fit, seeds=1, learning_rates=0.1, **QUICK)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_a_run_is_what_it_would_be_without_compare():
    (trial,) = ns.compare({"bn": make_bn}, fit=fit, seeds=1, learning_rates=0.1, **QUICK).trials
    torch.manual_seed(0)
    model = make_bn()
    torch.manual_seed(0)
    expected = fit(model, functools.partial(ns.attach, probes="parameters"), seed=0)
    assert trial.metrics == {name: float(torch.as_tensor(value).detach()) for name, value in expected.items()}


def test_what_is_measured_of_a_run():
    (trial,) = ns.compare({"bn": make_bn}, fit=fit, seeds=1, learning_rates=0.1, **QUICK).trials
    losses = dict(trial.curve)
    assert list(losses) == list(range(8))
    assert trial.measured["initial_loss"] == pytest.approx(losses[0.0], rel=1e-6)
    assert trial.measured["final_loss"] == pytest.approx(trial.metrics["last"], rel=1e-6)
    assert trial.measured["throughput"] > 1
    assert trial.measured["failures"] == 0
    assert np.isnan(trial.measured["sharpness"])


def test_curvature_at_the_end_is_that_of_the_trained_model():
    kept = []

    def own(model, attach, lr):
        torch.manual_seed(0)
        x, y = torch.randn(64, 4), torch.arange(64) % 2
        problem = ns.Problem(model, nn.functional.cross_entropy, [(x, y)])
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        with attach(model, optimizer, problem=problem, probes=("parameters", "curvature")):
            for _ in range(4):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        kept.append(problem)
        return {"loss": 0.0}

    settings = {"seeds": 1, "learning_rates": 0.1, "progress": False, "every": 1}
    (trial,) = ns.compare({"ln": make_ln}, fit=own, **settings).trials
    exact = ns.eigenpairs(kept[0].on([(kept[0].batches[0][0][:64], kept[0].batches[0][1][:64])]), k=1).values[0]
    assert trial.measured["sharpness"] == pytest.approx(float(exact), rel=0.02)


def test_saved_activations_are_counted_in_bytes():
    def plain():
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    (trial,) = ns.compare({"plain": plain}, fit=fit, seeds=1, learning_rates=0.1, **QUICK).trials
    # in float32: the input, a slice of a storage of 8 x 16 x 4, and tanh's output, which is the second layer's input
    assert trial.measured["memory"] == 4 * (8 * 16 * 4 + 16 * 8)


def test_an_entry_that_fails_does_not_lose_the_others():
    found = ns.compare({"bn": make_bn, "broken": make_broken}, fit=fit, seeds=2, learning_rates=0.1, **QUICK)
    assert [trial.entry for trial in found.failed] == ["broken"] * 2
    assert "broken failed in 2 of 2 runs: IndexError: index 1 is out of range" in found.table()
    assert found.summary().set_index("entry").loc["bn", "n"].max() == 2


def test_where_every_run_fails_the_reasons_are_raised():
    with pytest.raises(
        ns.NormscopeError, match=r"every run has failed. broken: IndexError: index 1 .*\(container.py, line"
    ):
        ns.compare({"broken": make_broken}, fit=fit, seeds=2, learning_rates=0.1, **QUICK)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"fit returned None; it must return \{metric: value\}"),
        ({}, r"fit returned \{\}; it must return \{metric: value\} with at least one"),
        ({"loss": "low"}, r"fit returned \{'loss': 'low'\}; every value must be a number"),
    ],
)
def test_what_fit_returned_is_told(returned, message):
    with pytest.raises(ns.NormscopeError, match=message):
        ns.compare({"bn": make_bn}, fit=lambda model, attach: returned, seeds=1, **QUICK)


def test_attach_refuses_a_run_and_a_second_call():
    def with_run(model, attach):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), run="mine")

    def twice(model, attach):
        for _ in range(2):
            attach(model, torch.optim.SGD(model.parameters(), lr=0.1))

    for function, message in (
        (with_run, "run='mine': compare chooses"),
        (twice, "attach was called twice in one call"),
    ):
        with pytest.raises(ns.NormscopeError, match=message):
            ns.compare({"bn": make_bn}, fit=function, seeds=1, **QUICK)


def test_what_is_done_is_not_done_again_and_more_seeds_are_added(tmp_path):
    settings = {"fit": fit, "learning_rates": 0.1, "out": tmp_path, **QUICK}
    first = ns.compare(MAKERS, seeds=1, **settings)
    assert len(CALLS) == 2
    more = ns.compare(MAKERS | {"again": make_bn}, seeds=2, **settings)
    assert len(CALLS) == 6
    kept = [trial for trial in more.trials if trial.seed == 0 and trial.entry != "again"]
    assert list(map(repr, kept)) == list(map(repr, first.trials))
    record = ns.load(tmp_path / "ln" / "lr-0.1" / "seed-1")
    assert record.context["step"].nunique() == 8
    assert repr(ns.Comparison.read(tmp_path)) == repr(more)


LATE = []


def make_late():
    if not LATE:
        raise ValueError("not yet")
    return make_bn()


def test_what_failed_is_tried_again(tmp_path):
    settings = {"fit": fit, "seeds": 1, "learning_rates": 0.1, "out": tmp_path, "check": False, **QUICK}
    makers = {"bn": make_bn, "late": make_late}
    assert ns.compare(makers, **settings).failed[0].reason.startswith("ValueError: not yet (test_compare.py, line")
    LATE.append(True)
    assert ns.compare(makers, **settings).failed == ()
    assert len(CALLS) == 2


def test_a_changed_setting_is_refused_and_named(tmp_path):
    settings = {"seeds": 1, "learning_rates": 0.1, "out": tmp_path, **QUICK}
    ns.compare({"bn": make_bn}, fit=fit, **settings)
    with pytest.raises(ns.StoreError, match=r"holds a run of another setting: make changed since \(bn, seed 0\)"):
        ns.compare({"bn": make_ln}, fit=fit, **settings)
    with pytest.raises(ns.StoreError, match="every changed since"):
        ns.compare({"bn": make_bn}, fit=fit, **settings | {"every": 5})
    with pytest.raises(ns.StoreError, match="fit changed since"):
        ns.compare({"bn": make_bn}, fit=lambda model, attach, lr: {"loss": lr}, **settings)


SCRIPT = """
import os, signal, sys
import torch
sys.path.insert(0, {root!r})
import normscope as ns
from tests.scope import test_compare as t

def fit(model, attach, lr=0.1, seed=0):
    with open("calls", "a") as file:
        print(seed, file=file)
    def held(*args, **options):
        scope = attach(*args, **options)
        if seed == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return scope
    return t.fit(model, held, lr, seed)

found = ns.compare({{"bn": t.make_bn}}, fit=fit, seeds=4, learning_rates=0.1, out="runs", **t.QUICK)
print(len(found.trials), len(found.failed))
"""


def test_it_goes_on_after_a_kill(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(Path(ns.__file__).parents[1])))
    runs = [
        subprocess.run([sys.executable, "script.py", at], cwd=tmp_path, capture_output=True, text=True, timeout=250)
        for at in ("2", "-1")
    ]
    assert runs[0].returncode == -9
    assert runs[1].stdout.split() == ["4", "0"], runs[1].stderr
    assert (tmp_path / "calls").read_text().split() == ["0", "1", "2", "2", "3"]
    assert not list(tmp_path.rglob("*.part"))


def test_several_processes_give_what_one_gives():
    settings = {"fit": fit, "seeds": 2, "learning_rates": 0.1, **QUICK}
    one, two = ns.compare(MAKERS, **settings), ns.compare(MAKERS, jobs=2, **settings)
    assert [trial.metrics for trial in two.trials] == [trial.metrics for trial in one.trials]


def test_with_several_processes_a_lambda_is_refused_by_name():
    with pytest.raises(ns.ArgumentError, match=r"makers\['mine'\]=.* cannot go to another process with jobs=2"):
        ns.compare({"mine": lambda: make_bn()}, fit=fit, jobs=2, **QUICK)
    with pytest.raises(
        ns.ArgumentError, match=r"fit=.* cannot go to another process with jobs=2 .*; define it at the top"
    ):
        ns.compare(MAKERS, fit=lambda model, attach: {}, jobs=2, **QUICK)


class Leaky(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def test_layers_of_ones_own_are_checked_where_others_have_norms():
    found = ns.compare(
        {"bn": make_bn, "mine": lambda: net(lambda _: Leaky())}, fit=fit, seeds=1, learning_rates=0.1, **QUICK
    )
    ((entry, kind, rows),) = found.checks
    assert (entry, kind) == ("mine", "Leaky")
    assert [law for law, verdict, _ in rows if verdict == "fail"] == ["alone"]
    assert "mine: Leaky fails the check of alone." in found.notes


BAD = {
    "makers=3": {"makers": 3},
    "makers={}": {"makers": {}},
    r"makers\['bn'\] is a model; it must be a function that makes a new model": {"makers": {"bn": nn.Linear(2, 2)}},
    "the name 3 must be a text": {"makers": {3: make_bn}},
    "fit=3 must be callable as fit": {"fit": 3},
    "seeds=0 must be how many": {"seeds": 0},
    r"seeds=\[1, 1\] must be": {"seeds": [1, 1]},
    "seeds='3' must be": {"seeds": "3"},
    r"learning_rates=\[0.1, -1\] must be different numbers above 0, as": {"learning_rates": [0.1, -1]},
    r"learning_rates=\[\] must be": {"learning_rates": []},
    "learning_rates='0.1' must be": {"learning_rates": "0.1"},
    "learning_rates=0.1 cannot reach fit: give it an argument lr": {
        "learning_rates": 0.1,
        "fit": lambda model, attach: {},
    },
    "fit takes lr without a default": {"fit": lambda model, attach, lr: {}},
    "jobs=0 must be a number of processes": {"jobs": 0},
    "out=3 must be a folder for the runs": {"out": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_that_cannot_work_are_named_before_anything_runs(message):
    with pytest.raises(ns.ArgumentError, match=message):
        ns.compare(**{"makers": MAKERS, "fit": fit, "progress": False} | BAD[message])
    assert CALLS == []


def test_a_text_that_identifies_a_function():
    def made(n):
        return lambda: n

    assert described(made(1)) == described(made(1)) != described(made(2))
    assert described(functools.partial(net, nn.LayerNorm)) != described(functools.partial(net, nn.BatchNorm1d))
    assert described(Leaky()) == described(Leaky())
    assert described(nn.Linear(2, 2)) != described(nn.Linear(2, 2))
    assert described(10) == "10"
    assert described(None) == "None"
    json.dumps(described({"a": [1, {2}]}))
