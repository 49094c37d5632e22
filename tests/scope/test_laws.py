"""The laws of an attachment on every awkward model."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import normscope as ns
from tests import checks
from tests.awkward.base import CaseError
from tests.cases import CASES

BY_NAME = {case.name: case for case in CASES}
NAMES = list(BY_NAME)
SOME = (
    "in-place ReLU after a norm",
    "GRU cell in a loop",
    "channels last",
    "checkpointing",
    "gradient accumulation",
    "evaluation with gradients",
)
CALM = (  # cases whose own step does not wait
    *SOME,
    "LSTM",
    "multi-head attention",
    "bf16 autocast",
    "frozen batch normalization",
    "no normalization",
    "dict output",
    "diverged run",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("every", [1, 3])
def test_training_is_bit_identical(name, every):
    checks.check_untouched(BY_NAME[name], every)


@pytest.mark.parametrize("name", NAMES)
def test_sites_are_those_of_the_model(name):
    checks.check_sites(BY_NAME[name])


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("in-place ReLU after a norm", 200),
        ("checkpointing", 60),
        ("gradient accumulation", 60),
        ("evaluation with gradients", 60),
    ],
)
def test_state_does_not_grow_with_steps(name, steps):
    checks.check_bounded(BY_NAME[name], steps)


@pytest.mark.parametrize("name", CALM)
def test_hooks_do_not_wait_for_the_device(name):
    checks.check_never_waits(BY_NAME[name])


def test_the_laws_see_a_changed_bit_and_a_left_hook():
    case = BY_NAME["no normalization"]
    plain, other = (checks.train(case, None).state for _ in range(2))
    assert plain == other
    job = case.build()
    before = checks.state_of(job)
    with torch.no_grad():
        job.model.weight[0, 0] = torch.nextafter(job.model.weight[0, 0], torch.tensor(9.0))
    after = checks.state_of(job)
    assert [name for name in before if before[name] != after[name]] == ["parameter weight"]
    counts = checks.hook_counts(job)
    job.model.register_forward_hook(print)
    assert checks.hooks_added(counts, checks.hook_counts(job)) == {"._forward_hooks": 1}


def test_the_law_of_waiting_sees_an_item():
    with checks.waits() as callers:
        torch.ones(1).item()
    assert callers == ["test_the_law_of_waiting_sees_an_item: item"]


def test_two_scopes_at_once_leave_training_alone():
    case = BY_NAME["in-place ReLU after a norm"]
    plain = checks.train(case, None).state
    checks.seed()
    job = case.build()
    with ns.attach(job.model, job.optimizers, every=1) as one, ns.attach(job.model, job.optimizers, every=2) as two:
        for _ in range(case.steps):
            job.step()
    assert {k: v for k, v in plain.items() if k != "hooks added"} == checks.state_of(job)
    assert len(one.record().steps) == 2 * len(two.record().steps) == 4


def test_an_error_of_the_user_passes_through_and_detaches():
    case = BY_NAME["module that raises once"]
    job = case.build()
    before = checks.hook_counts(job)
    scope = ns.attach(job.model, job.optimizers, every=1)

    def train():
        with scope:
            for _ in range(9):
                job.step()

    with pytest.raises(CaseError, match="on purpose"):
        train()
    assert checks.hooks_added(before, checks.hook_counts(job)) == {}
    assert "closed" in repr(scope)
    assert len(scope.record().steps) == 3


def test_copies_and_pickles_of_a_watched_model_report_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ns.attach(model, optimizer, every=1) as scope:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        for other in others:
            other(torch.randn(4, 3)).sum().backward()
        assert set(model.state_dict()) == set(others[0].state_dict())
        copy.deepcopy(optimizer)
    assert len(scope.record().sites) == 0


def test_a_failing_probe_is_switched_off_and_training_goes_on(monkeypatch):
    def broken(view):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("normscope.probes.moments.observe", broken)
    case = BY_NAME["in-place ReLU after a norm"]
    plain, watched = checks.train(case, None), checks.train(case, 1)
    assert plain.state == watched.state
    record = watched.scope.record()
    failed = record.events[record.events["kind"] == "probe-failed"]
    assert "broken on purpose" in " ".join(failed["message"])
    assert len(failed) == len(set(failed["message"].str.partition(":")[0]))  # once a probe
    assert len(record.steps) == case.steps  # the other probes went on
    assert "max" in {stat for block in record.blocks for stat in block.stats}


def test_closing_twice_and_forgetting_to_close(tmp_path):
    program = (
        "import torch, normscope as ns\n"
        "model = torch.nn.Linear(2, 2)\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        f"scope = ns.attach(model, optimizer, run={str(tmp_path / 'a')!r}, every=1)\n"
        "for _ in range(3):\n"
        "    model(torch.ones(4, 2)).sum().backward(); optimizer.step()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True)
    assert len(ns.load(tmp_path / "a").steps) == 3
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["record.sqlite"]
    model = nn.Linear(2, 2)
    scope = ns.attach(model, torch.optim.SGD(model.parameters(), 0.1))
    scope.close()
    scope.close()
    scope.step(loss=1.0)
    assert len(scope.record().context) == 0
