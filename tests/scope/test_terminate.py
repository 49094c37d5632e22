"""A run that gets SIGTERM is closed first, and ends as it would have; whoever handles the signal is left to it."""

import signal
import subprocess
import sys
import textwrap
from weakref import WeakSet

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.metrics import tables
from normscope.scope import terminate

SCRIPT = """
import sys, torch
import normscope as ns
torch.set_num_threads(1)
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
scope = ns.attach(model, optimizer, run=sys.argv[1], every=1000, probes=("parameters", "flight"))
for step in range(100_000):
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    if step == 150:
        print("ready", flush=True)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As in a process of its own: scopes that other tests left open do not count."""
    monkeypatch.setattr(terminate, "_OPEN", WeakSet())
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_last_steps_are_written_and_the_process_ends(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM
    record = ns.load(tmp_path / "run")
    steps = tables.table(record, "norm", slot="*", role="update", phase="flight").index
    assert steps[-1] >= 150
    assert steps[-1] >= tables.context(record).index[-1] - 1
    assert record.runs[0].get("closed")


def attached(folder):
    model = nn.Linear(3, 2)
    return ns.attach(model, torch.optim.SGD(model.parameters(), 0.1), run=folder)


def test_the_handler_goes_with_the_last_scope(tmp_path):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    first, second = attached(tmp_path / "a"), attached(tmp_path / "b")
    first.close()
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    second.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_the_user_stays(tmp_path):
    def mine(number, frame):
        del number, frame

    signal.signal(signal.SIGTERM, mine)
    with attached(tmp_path / "a"):
        assert signal.getsignal(signal.SIGTERM) is mine
    assert signal.getsignal(signal.SIGTERM) is mine


def test_one_that_comes_later_replaces_it_for_good(tmp_path):
    def mine(number, frame):
        del number, frame

    with attached(tmp_path / "a"):
        signal.signal(signal.SIGTERM, mine)
    assert signal.getsignal(signal.SIGTERM) is mine
