"""A run that goes on from a checkpoint: one record, steps counted on, nothing of before lost."""

import copy
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.errors import ArgumentError, StoreError

KEYS = ["step", "site", "phase", "role", "stat"]


def job(width=4, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def train(model, optimizer, steps, scope=None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        if scope:
            scope.step(loss=loss)


def segment(folder, steps, state=None, every=3, **settings):
    """Train, attached; go on from a state if there is one. Returns the state at the end."""
    model, optimizer = job()
    if state:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        torch.set_rng_state(state[2])
    with ns.attach(model, optimizer, run=folder, every=every, resume=True, **settings) as scope:
        train(model, optimizer, steps, scope)
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))


def test_a_resumed_run_is_recorded_as_one_that_never_stopped(tmp_path):
    probes = ("moments", "tails", "parameters", "normalization")  # eigenvalues are drawn by another generator
    segment(tmp_path / "whole", 20, probes=probes)
    state = segment(tmp_path / "parts", 7, probes=probes)
    state = segment(tmp_path / "parts", 4, state, probes=probes)
    segment(tmp_path / "parts", 9, state, probes=probes)
    whole, parts = ns.load(tmp_path / "whole"), ns.load(tmp_path / "parts")
    assert parts.steps.tolist() == [0, 3, 6, 9, 12, 15, 18]
    assert parts.context.drop(columns="run").equals(whole.context.drop(columns="run"))
    one, two = (record.frame().sort_values(KEYS, ignore_index=True) for record in (whole, parts))
    first = (two["stat"] == "change") & two["step"].isin([9, 12])  # against the sample before, which is of another life
    assert first.sum() == two["value"][first].isna().sum() == 2
    assert one[KEYS].equals(two[KEYS])
    assert one["value"][~first].equals(two["value"][~first])
    assert parts.sites.drop(columns="run").equals(whole.sites.drop(columns="run"))


def test_the_record_of_before_stays_and_says_where_it_was_resumed(tmp_path):
    state = segment(tmp_path / "a", 5, every=1)
    before = ns.load(tmp_path / "a")
    segment(tmp_path / "a", 5, state, every=2)
    after = ns.load(tmp_path / "a")
    old, new = (record.frame().sort_values(KEYS, ignore_index=True) for record in (before, after))
    assert new[new["step"] < 5].astype(str).equals(old.astype(str))
    assert after.steps.tolist() == [0, 1, 2, 3, 4, 6, 8]
    assert after.context["step"].unique().tolist() == list(range(10))
    run = after.runs[0]
    assert run["created"] == before.runs[0]["created"]
    assert run["closed"] > before.runs[0]["closed"]
    assert [(part["step"], part["every"]) for part in run["segments"]] == [(0, 1), (5, 2)]
    assert run["segments"][0]["closed"] == before.runs[0]["closed"]
    resumed = after.events[after.events["kind"] == "resumed"]
    assert resumed[["step", "message"]].values.tolist() == [[5, "resumed: recorded before are 5 steps"]]
    assert not [f for f in ns.diagnose(after) if "failed on this record" in f.message]


def test_a_killed_run_goes_on(tmp_path):
    program = (
        "import os, signal, sys; sys.path.insert(0, os.getcwd())\n"
        "from tests.scope.test_resume import *\n"
        f"model, optimizer = job(); scope = ns.attach(model, optimizer, run={str(tmp_path / 'a')!r}, every=2)\n"
        "train(model, optimizer, 6, scope); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=120, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = ns.load(tmp_path / "a")
    assert before.context["step"].unique().tolist() == [0, 1, 2, 3, 4]
    assert "closed" not in before.runs[0]
    segment(tmp_path / "a", 4, every=2)
    after = ns.load(tmp_path / "a")
    assert after.context["step"].unique().tolist() == list(range(9))
    assert after.context.head(5).equals(before.context)
    assert os.listdir(tmp_path / "a") == ["record.sqlite"]


def test_a_folder_that_was_moved_keeps_the_name_of_the_run(tmp_path):
    segment(tmp_path / "a", 3)
    (tmp_path / "a").rename(tmp_path / "b")
    segment(tmp_path / "b", 3)
    assert ns.load(tmp_path / "b").names == ("a",)
    assert ns.load(tmp_path / "b").context["step"].nunique() == 6


def test_resume_begins_a_run_where_there_is_none(tmp_path):
    segment(tmp_path / "new", 3)
    record = ns.load(tmp_path / "new")
    assert record.context["step"].unique().tolist() == [0, 1, 2]
    assert "segments" not in record.runs[0]


def widened():
    return job(width=5)


def longer():
    model, _ = job()
    model.append(nn.Linear(2, 2))
    return model, torch.optim.SGD(model.parameters(), 0.1)


def shorter():
    model, _ = job()
    del model[3]
    return model, torch.optim.SGD(model.parameters(), 0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (widened, r"run 'a' is of another model: 0/weight has shape \[5, 4\], in the run \[4, 4\]; build the model"),
        (longer, "another model: it has 44 parameters, the run 38"),
        (shorter, r"another model: it has no 3/weight, which in the run has shape \[2, 4\]"),
    ],
)
def test_another_model_is_refused_and_the_run_stays_as_it_is(make, message, tmp_path):
    segment(tmp_path / "a", 3)
    before = (tmp_path / "a" / "record.sqlite").read_bytes()
    model, optimizer = make()
    with pytest.raises(ArgumentError, match=message):
        ns.attach(model, optimizer, run=tmp_path / "a", resume=True)
    assert (tmp_path / "a" / "record.sqlite").read_bytes() == before
    assert not any("_hooks" in key and value for module in model.modules() for key, value in vars(module).items())


def test_a_run_that_is_still_written_is_not_resumed(tmp_path):
    model, optimizer = job()
    with ns.attach(model, optimizer, run=tmp_path / "a", every=1) as scope:
        train(model, optimizer, 2, scope)
        with pytest.raises(
            StoreError, match=r"cannot be resumed .*(locked|writes it).*; close the process or the scope"
        ):
            ns.attach(model, optimizer, run=tmp_path / "a", resume=True)
        train(model, optimizer, 2, scope)
    assert ns.load(tmp_path / "a").steps.tolist() == [0, 1, 2, 3]


def test_a_reader_delays_what_is_resumed_by_a_moment(tmp_path):
    segment(tmp_path / "a", 3, every=1)
    with closing(sqlite3.connect(tmp_path / "a" / "record.sqlite")) as made:
        made.execute("PRAGMA journal_mode = WAL")  # as a killed run leaves it
        reader = sqlite3.connect(tmp_path / "a" / "record.sqlite", check_same_thread=False)
        assert reader.execute("SELECT count(*) FROM steps").fetchone() == (3,)
    timer = threading.Timer(0.5, reader.close)
    timer.start()
    segment(tmp_path / "a", 3, every=1)
    timer.join()
    assert ns.load(tmp_path / "a").steps.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_is_no_run_is_not_resumed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "record.sqlite").write_bytes(b"no database at all, but long enough" * 40)
    with pytest.raises(StoreError, match="cannot be resumed, it is damaged"):
        segment(tmp_path / "a", 1)


@pytest.mark.parametrize(("run", "resume"), [(None, True), ("a", 1), ("a", "yes")])
def test_resume_is_a_yes_with_a_folder(run, resume, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=r"resume=.* must be True, with run= the folder"):
        ns.attach(*job(), run=run, resume=resume)


def test_two_who_resume_at_once_do_not_mix(tmp_path):
    segment(tmp_path / "a", 3)
    program = (
        "import os, sys; sys.path.insert(0, os.getcwd())\n"
        "from tests.scope.test_resume import *\n"
        f"segment({str(tmp_path / 'a')!r}, 200, every=1)\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) for _ in range(2)]
    codes = [process.wait(120) for process in both]
    added = ns.load(tmp_path / "a").context["step"].nunique() - 3
    for process in both:
        process.stderr.close()
    assert added == 200 * codes.count(0)
