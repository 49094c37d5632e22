import os
import threading
import time

import pytest

from normscope.probes.background import Background


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("normscope")]


def test_jobs_come_back_in_order_and_the_thread_ends():
    background = Background()
    assert threads() == []
    for i in range(20):
        background.submit((str(i), ""), lambda i=i: i * i)
    background.settle()
    assert [(key[0], future.result()) for key, future in background.finished()] == [(str(i), i * i) for i in range(20)]
    assert background.finished() == []
    assert threads() == []
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
def test_no_job_runs_at_a_fork_and_the_child_is_free():
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
