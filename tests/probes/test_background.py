import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from normscope.probes import covariance, factors
from normscope.probes.background import Background
from normscope.probes.factors import Factors


@pytest.fixture
def threads():
    """Those of normscope that run now, and did not before the test: a scope that another left open has its own."""

    def running():
        return {t for t in threading.enumerate() if t.name.startswith("normscope")}

    before = running()
    return lambda: running() - before


def test_jobs_come_back_in_order_and_the_thread_ends(threads):
    background = Background()
    for i in range(20):
        background.submit((str(i), ""), lambda i=i: i * i)
    background.settle()
    assert [(key[0], future.result()) for key, future in background.finished()] == [(str(i), i * i) for i in range(20)]
    assert background.finished() == []
    assert not threads()
    background.submit(("again", ""), lambda: 1)
    background.settle()
    assert len(background.finished()) == 1


def test_the_same_key_again_waits_for_the_last_one():
    background, done = Background(), []
    for i in range(5):
        background.submit(("a", ""), lambda i=i: (time.sleep(0.02), done.append(i)))
        assert len(done) >= i
    background.settle()
    assert done == list(range(5))


def test_an_error_stays_with_its_job():
    background = Background()
    background.submit(("a", ""), lambda: 1 / 0)
    background.submit(("b", ""), lambda: 2)
    background.settle()
    (_, first), (_, second) = background.finished()
    assert isinstance(first.exception(), ZeroDivisionError)
    assert second.result() == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_no_job_runs_at_a_fork_and_the_child_is_free(threads):
    background, running = Background(), []

    def job():
        running.append(1)
        time.sleep(0.2)
        running.pop()

    background.submit(("a", ""), job)
    child = os.fork()
    if child == 0:
        background.settle()
        os._exit(0 if not running and not threads() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not running


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_another_thread_may_fork_while_jobs_are_submitted():
    background, codes, running = Background(), [], []

    def job():
        running.append(1)
        time.sleep(0.0005)
        running.pop()

    def fork():
        for _ in range(50):
            child = os.fork()
            if child == 0:
                os._exit(len(running))
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    other = threading.Thread(target=fork)
    other.start()
    submitted = 0
    while other.is_alive():
        background.submit(submitted, job)
        submitted += 1
    other.join()
    background.settle()
    assert len(background.finished()) == submitted
    assert codes == [0] * 50  # no job ran at any fork


LATE = """
import atexit
from normscope.probes.background import Background

background = Background()

def late():
    background.submit("a", lambda: print("ran"))
    background.submit("b", lambda: 1 / 0)
    background.settle()
    (_, first), (_, second) = background.finished()
    print(first.result(), second.exception())

atexit.register(late)
background.submit("first", int)
background.settle()
background.finished()
"""


def test_at_the_end_of_the_interpreter_a_job_runs_at_once():
    found = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=100, check=True)
    assert (found.stdout.split("\n"), found.stderr) == (["ran", "None division by zero", ""], "")


def state(seed):
    return covariance.observe(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)), -1).numpy()


def test_the_rows_of_a_step_come_together_and_one_that_fails_hides_none(monkeypatch):
    spectra, reached, release, failures, begun = covariance.spectra, threading.Event(), threading.Event(), [], []

    def slow(values, factor):
        if (values == 7).all():
            raise np.linalg.LinAlgError("no convergence")
        begun.append(factor)
        if len(begun) == 2:
            reached.set()
            release.wait(30)
        return spectra(values, factor)

    monkeypatch.setattr(covariance, "spectra", slow)
    taken = Factors(1, mean=True, correlations=False)
    bad = np.full_like(state(0), 7)
    taken.submit(
        3, [("a/input", "value", state(0)), ("b/input", "value", bad), ("c/input", "value", state(1))], 8.0, 1.0
    )
    assert reached.wait(30)
    taken.begin(1)
    assert taken.collect(lambda *_: None, settle=False) == []
    release.set()
    rows = taken.collect(lambda site, error: failures.append((site, str(error))), settle=True)
    assert [(step, row.site) for step, row in rows] == [(3, "a/input"), (3, "c/input")]
    assert failures == [("b/input", "no convergence")]


def test_a_step_gets_no_row_of_its_own_however_fast_it_is():
    taken = Factors(1, mean=True, correlations=False)
    taken.begin(0)
    taken.submit(0, [("a/input", "value", state(0))], 8.0, 1.0)
    taken._jobs.settle()
    assert taken.collect(lambda *_: None, settle=False) == []
    taken.begin(1)
    assert [step for step, _ in taken.collect(lambda *_: None, settle=False)] == [0]


def test_what_waits_for_the_end_is_bounded(monkeypatch):
    monkeypatch.setattr(factors, "MOST_LAST", 3)
    monkeypatch.setattr(factors, "keeps_arrays", lambda _: False)
    taken = Factors(1, mean=True, correlations=False)
    for step in range(10):
        taken.submit(step, [(f"a#{step % 5}/input", "value", state(step))], 8.0, 1.0)
    assert len(taken.collect(lambda *_: None, settle=True)) == 10
    assert [step for step, _ in taken.last()] == [7, 8, 9]
    assert taken.last() == []
