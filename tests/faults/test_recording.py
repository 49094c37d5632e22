"""Faults while a run is recorded: training goes on, the user is told once, and what could be written is right."""

import contextlib
import logging
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.cli import main
from normscope.core.schedule import ARRAYS_PER_RUN, is_sampled, keeps_arrays
from normscope.core.store import FILE_NAME, Store
from tests.core.test_store import context


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def job():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    return model, torch.optim.SGD(model.parameters(), 0.1)


def train(model, optimizer, scope, steps, spoil=lambda step: None):
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        spoil(step)
        optimizer.step()
        scope.step(loss=loss)


def finite(model):
    return all(bool(p.isfinite().all()) for p in model.parameters())


# ---- the disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 kB, where this process may mount one."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", tmp_path], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_stops_no_training_and_is_told_once(small_disk, caplog):
    fill = small_disk / "others"
    model, optimizer = job()
    with ns.attach(model, optimizer, run=small_disk / "a", every=1) as scope:
        train(model, optimizer, scope, 3)
        before = ns.load(small_disk / "a").context["step"].nunique()
        with contextlib.suppress(OSError):  # until it is full
            fill.write_bytes(b"x" * 400_000)
        train(model, optimizer, scope, 20)
        warned = [r.getMessage() for r in caplog.records if "cannot write" in r.getMessage()]
        assert len(warned) == 1
        assert "rows wait to be written" in warned[0]
        assert ns.load(small_disk / "a").context["step"].nunique() >= before
        subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
        train(model, optimizer, scope, 2)
    assert finite(model)
    assert ns.load(small_disk / "a").context["step"].unique().tolist() == list(range(25))


def test_a_file_that_may_not_grow_stops_no_training(tmp_path):
    program = (
        "import resource, signal, sys; from tests.faults.test_recording import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "model, optimizer = job(); scope = ns.attach(model, optimizer, run=sys.argv[1], every=1)\n"
        "train(model, optimizer, scope, 3)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))\n"
        "train(model, optimizer, scope, 20)\n"
        "held = ns.load(sys.argv[1]).context['step'].nunique(); assert 3 <= held < 23, held\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "train(model, optimizer, scope, 2); scope.close()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot write") == 1
    assert ns.load(tmp_path / "a").context["step"].unique().tolist() == list(range(25))


@pytest.fixture
def read_only(tmp_path):
    """A folder in which nothing can be written, by root neither where it can be mounted so."""
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    mounted = False
    if os.geteuid() == 0:  # whom the mode does not stop
        command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder]
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
        if not mounted:
            pytest.skip("root writes everywhere, and may not mount a folder that it cannot")
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)
    folder.chmod(0o755)


def test_a_read_only_folder_is_refused_before_training(read_only):
    model, optimizer = job()
    with pytest.raises(ns.StoreError, match=r"run=.*closed.* cannot be (created|written) .*; choose"):
        ns.attach(model, optimizer, run=read_only / "a")
    assert not any("_hooks" in key and value for module in model.modules() for key, value in vars(module).items())


def test_a_report_into_a_read_only_folder_is_told_in_one_line(read_only, tmp_path, capsys):
    Store(tmp_path / "a", "a", {}).close()
    assert main(["report", str(tmp_path / "a"), "--out", str(read_only / "report.html")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line


def test_two_writers_of_one_run_are_told_apart(tmp_path):
    model, optimizer = job()
    with ns.attach(model, optimizer, run=tmp_path / "a", every=1) as scope:
        train(model, optimizer, scope, 2)
        for resume in (False, True):
            with pytest.raises(ns.StoreError, match=r"holds a run already|cannot be resumed"):
                ns.attach(*job(), run=tmp_path / "a", resume=resume)
        train(model, optimizer, scope, 2)
    assert ns.load(tmp_path / "a").context["step"].unique().tolist() == [0, 1, 2, 3]


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-1e9, -3600.0, 1e9])
def test_a_clock_that_jumps_changes_nothing_but_the_times_told(tmp_path, monkeypatch, jump, capsys):
    model, optimizer = job()
    clock = [time.time()]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    scope = ns.attach(model, optimizer, run=tmp_path / "a", every=1)
    train(model, optimizer, scope, 3)
    clock[0] += jump
    train(model, optimizer, scope, 3)
    scope.close()
    with ns.attach(model, optimizer, run=tmp_path / "a", every=1, resume=True) as again:
        train(model, optimizer, again, 2)
    record = ns.load(tmp_path / "a")
    assert record.context["step"].unique().tolist() == list(range(8))
    assert record.runs[0]["closed"] - record.runs[0]["created"] == pytest.approx(jump, abs=1)
    assert main(["report", str(tmp_path / "a")]) == 0
    assert main(["watch", "--once", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "8 steps" in shown
    assert not re.search(r"(?<!e)-\d+ (s|min|h)\b", shown)


# ---- numbers ---------------------------------------------------------------------------------------------------------

STORMS = ("weights", "gradients", "activations", "loss", "rate")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("storm", STORMS)
def test_a_storm_of_numbers_that_are_none_is_recorded_and_told(tmp_path, storm, bad, caplog):
    begin = 4
    model, optimizer = job()
    scope = ns.attach(model, optimizer, run=tmp_path / "a", every=1)
    for step in range(12):
        on = step >= begin
        inputs = torch.randn(8, 4)
        if on and storm == "activations":
            inputs[0, 0] = bad
        if on and storm == "rate":
            optimizer.param_groups[0]["lr"] = bad
        if on and storm == "weights":
            with torch.no_grad():
                model[0].weight[0, 0] = bad
        optimizer.zero_grad()
        loss = model(inputs).square().mean() * (bad if on and storm == "loss" else 1.0)
        loss.backward()
        if on and storm == "gradients":
            model[0].weight.grad[0, 0] = bad
        optimizer.step()
        scope.step(loss=loss)
    scope.close()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    record = ns.load(tmp_path / "a")
    assert record.context["step"].nunique() == 12
    rows = record.context.drop_duplicates("step").set_index("step")
    assert np.isfinite(rows.loc[: begin - 1, ["loss", "grad_norm", "lr"]].to_numpy()).all()
    findings = ns.diagnose(record)
    assert not [f for f in findings if "failed on this record" in f.message]
    told = [f for f in findings if f.id in ("run.diverged", "propagation.non-finite")]
    assert ns.Verdict.FAILURE in {f.verdict for f in told}
    first = begin + (storm in ("rate", "gradients"))  # these spoil what the next forward pass meets
    assert min(f.step for f in told if f.step is not None) in (begin, first)
    page = ns.write_report(record, findings, tmp_path / "a" / "report.html").read_text()
    assert "NaN" in page
    assert main(["watch", "--once", str(tmp_path / "a")]) == 0


# ---- size ------------------------------------------------------------------------------------------------------------


def test_a_million_steps_grow_by_their_samples_alone_and_arrays_not_at_all(tmp_path):
    """Write what the schedule asks for of a long run, at two lengths: every sample one row, at most 64 arrays."""
    sizes, every = {}, 10
    for steps in (100_000, 1_000_000):
        store, kept = Store(tmp_path / str(steps), "a", {}), 0
        store.site("m/output", {"module": "m", "slot": "output", "order": 0})
        for sampled, step in enumerate(range(0, steps, every)):
            assert is_sampled(step, every)
            store.scalars(step, "m/output", "train", "value", ("mean", "rms"), np.array([0.0, 1.0], "<f4"))
            if keeps_arrays(sampled):
                kept += 1
                store.array(step, "m/output", "train", "value", "rms", np.ones(64, "<f4"))
            store.step(context(step))
            if sampled % 1000 == 0:
                store.commit()
        store.commit()
        store.close()
        assert kept < ARRAYS_PER_RUN
        sizes[steps] = (tmp_path / str(steps) / FILE_NAME).stat().st_size
    grown = (sizes[1_000_000] - sizes[100_000]) / 90_000
    assert grown < 160  # bytes a sampled step with two values
    begin = time.monotonic()
    record = ns.load(tmp_path / "1000000")
    took = time.monotonic() - begin
    assert len(record.steps) == 100_000
    assert took < 30
    pages = []
    for steps in (100_000, 1_000_000):
        record = ns.load(tmp_path / str(steps))
        pages.append(ns.write_report(record, [], tmp_path / f"{steps}.html").stat().st_size)
    assert pages[1] < pages[0] + 50_000  # curves are thinned
    print(f"{sizes}, {grown:.0f} B a sample; loaded in {took:.1f} s; pages {pages}")


LAYERS = int(os.environ.get("NORMSCOPE_LAYERS", "600"))  # 10000 by hand: about 2 minutes and 1.3 GB


def test_time_and_size_grow_with_the_number_of_layers(tmp_path):
    times, sizes, pages = [], [], []
    for layers in (LAYERS // 3, LAYERS):
        parts = [part for _ in range(layers // 3) for part in (nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU())]
        model = nn.Sequential(*parts)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        folder = tmp_path / str(layers)
        begin = time.process_time()
        with ns.attach(model, optimizer, run=folder, every=1) as scope:
            train(model, optimizer, scope, 2)
        record = ns.load(folder)
        findings = ns.diagnose(record)
        pages.append(ns.write_report(record, findings, folder / "report.html").stat().st_size)
        times.append(time.process_time() - begin)
        sizes.append((folder / FILE_NAME).stat().st_size)
        assert not [f for f in findings if "failed on this record" in f.message]
        assert len(record.steps) == 2
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    print(f"{LAYERS} layers: {times} s, records {sizes}, pages {pages}, {most} MB")
    assert times[1] < 6 * times[0] + 2  # 9 times were they quadratic
    assert sizes[1] < 3.5 * sizes[0]
    assert pages[1] - pages[0] < 2500 * LAYERS


# ---- a signal --------------------------------------------------------------------------------------------------------


def test_an_interrupt_leaves_a_record_that_is_closed(tmp_path):
    model, optimizer = job()

    def interrupt(step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), ns.attach(model, optimizer, run=tmp_path / "a", every=1) as scope:
        train(model, optimizer, scope, 9, interrupt)
    assert "closed" in ns.load(tmp_path / "a").runs[0]
    assert sorted(path.name for path in Path(tmp_path / "a").iterdir()) == [FILE_NAME]
