"""A run that is killed at any moment keeps every step that was acknowledged."""

import os
import random
import signal
import time

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.cli import main
from normscope.core.reading import load
from normscope.core.store import Store
from tests.core.test_store import write

KILLS = int(os.environ.get("NORMSCOPE_KILLS", "10"))  # 100 by hand
REPORTS = 3 if KILLS == 10 else KILLS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def train(folder, report, steps=100_000):
    """Train until killed; report the number of each sampled step that has been written."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scope = ns.attach(model, optimizer, run=folder, every=2, resume=folder is not None)
    for step in range(steps):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        if step % 2 == 0:
            report(step)
    scope.close()


def store_only(folder, report):
    """Write until killed, as fast as possible."""
    store = Store(folder, "a", {})
    for step in range(100_000):
        write(store, 1, step)
        report(step)


def killed(run, folder, delay):
    """Run in a forked child, kill it after a delay that starts at its first report, and return the last report."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            run(folder, lambda step: os.write(writing, b"%d\n" % step))
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        first = pipe.readline()
        assert first, "the child died before its first step"
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        rest = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return int((first + rest).split(b"\n")[-2])


def by_turns(block):
    """Tell whether a layer has its turn at few steps only, as for its second moments."""
    return "moment.max" in block.stats


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("run", [train, store_only])
def test_every_acknowledged_step_survives(tmp_path, run):
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    train(None, print, steps=1)  # what torch imports late is imported once, not in every child
    moments = random.Random(0)
    counts = []
    for number in range(KILLS):
        folder = tmp_path / str(number)
        last = killed(run, folder, moments.uniform(0, 0.15))
        record = load(folder)
        steps = record.context["step"].unique()
        acknowledged = set(range(0, last + 1, 2 if run is train else 1))
        assert acknowledged <= set(steps)
        assert acknowledged <= set(record.steps)
        held = {}  # by site: which statistics there are differs between the steps that keep arrays and the others
        for block in record.blocks:
            if block.role == "value" and not by_turns(block):
                held.setdefault((block.site, block.phase), {0}).update(block.steps)
        assert held
        assert all(acknowledged <= steps for steps in held.values())
        counts.append(last)
        if run is train:
            assert number >= REPORTS or main(["report", str(folder)]) == 0
            train(folder, lambda step: None, steps=4)
            after = load(folder)
            assert after.context["step"].unique().tolist() == [*steps, *range(len(steps), len(steps) + 4)]
            assert "closed" in after.runs[0]
    print(f"{KILLS} kills after {min(counts)} to {max(counts)} steps")
    assert len(set(counts)) > min(KILLS, 20) // 4  # they were killed at different moments


def test_a_killed_run_is_read_without_its_shared_memory_file(tmp_path):
    last = killed(store_only, tmp_path / "a", 0.05)
    (tmp_path / "a" / "record.sqlite-shm").unlink()
    assert load(tmp_path / "a").context["step"].max() >= last
