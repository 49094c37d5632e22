"""The trigger: what fires, what is kept, what may be forgotten."""

import numpy as np
import pytest

from normscope.core.robust import MIN_HISTORY, robust_z
from normscope.core.schedule import RING
from normscope.scope.trigger import AFTER, MOST, Trigger


def kept(losses, norms=None, every=10):
    """Return the steps that are never forgotten."""
    trigger, left = Trigger(0), set()
    for step, loss in enumerate(losses):
        trigger.see(step, loss, None if norms is None else norms[step])
        left.add(step)
        if step % every == 0:
            for first, last in trigger.passed(step):
                assert set(range(first, last + 1)) <= left
                left -= set(range(first, last + 1))
    return left


def noisy(n, seed=0):
    return np.exp(0.1 * np.random.default_rng(seed).standard_normal(n))


def test_the_last_steps_are_kept():
    assert kept(noisy(2001)) == set(range(2001 - RING, 2001))


@pytest.mark.parametrize("value", [5.0, float("nan"), float("inf")])
@pytest.mark.parametrize("of", ["loss", "norm"])
def test_what_fires_is_kept(value, of):
    series, quiet = noisy(2001), noisy(2001, 1)
    series[700] = value
    found = kept(series, quiet) if of == "loss" else kept(quiet, series)
    assert found == set(range(700 - RING + 1, 700 + AFTER + 1)) | set(range(2001 - RING, 2001))


def test_a_run_that_stays_broken_fires_now_and_then_only():
    losses = noisy(5000)
    losses[100:] = float("nan")
    assert len(kept(losses)) <= MOST * (RING + AFTER) + RING


def test_the_first_steps_do_not_fire():
    losses = noisy(1200)
    losses[MIN_HISTORY - 1] = 100.0
    assert kept(losses) == set(range(1190 - RING + 1, 1200))


def test_nothing_known_keeps_the_last_steps():
    assert kept([None] * 901) == set(range(901 - RING, 901))


def test_robust_z_is_the_standard_score_of_a_gaussian():
    values = np.random.default_rng(0).standard_normal(100_001)
    assert robust_z(3.0, values) == pytest.approx(3.0, abs=0.05)
