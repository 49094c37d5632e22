"""The frames of a comparison, from trials written down by hand."""

import math

import numpy as np
import pytest

from normscope.metrics import comparison, trial
from normscope.metrics.trial import Trial

MIB = 2**20


def one(entry, rate, seed, loss, final=None, speed=10.0, reason=""):
    measured = {
        "initial_loss": 2.0,
        "final_loss": loss if final is None else final,
        "throughput": speed,
        "memory": 3.0 * MIB,
        "failures": 0.0,
    }
    return Trial(entry, rate, seed, reason, {} if reason else {"test_loss": loss}, {} if reason else measured)


GRID = [
    one("bn", 0.1, 0, 0.50),
    one("bn", 0.1, 1, 0.60),
    one("bn", 1.0, 0, 0.20),
    one("bn", 1.0, 1, 0.30),
    one("mine", 0.1, 0, 0.40, speed=5.0),
    one("mine", 0.1, 1, 0.49, speed=5.0),
    one("mine", 1.0, 0, 0.10, speed=20.0),
    one("mine", 1.0, 1, math.inf, speed=20.0),
]


def row(entry, quantity, trials=GRID, higher=None):
    found = comparison.summary(trials, ("bn", "mine"), "test_loss", higher)
    return found[(found["entry"] == entry) & (found["quantity"] == quantity)].iloc[0]


def test_the_learning_rate_is_the_best_mean_and_none_that_diverged():
    assert comparison.best_rates(GRID, "test_loss", None) == {"bn": 1.0, "mine": 0.1}
    assert comparison.best_rates(GRID, "test_loss", ["test_loss"]) == {"bn": 0.1, "mine": 0.1}


def test_a_rate_at_which_a_run_failed_is_worse_than_any_without():
    trials = [one("bn", 0.1, 0, 9.0), one("bn", 1.0, 0, 0.1, reason="ValueError: no")]
    assert comparison.best_rates(trials, "test_loss", None) == {"bn": 0.1}


def test_a_rate_of_its_own_is_not_a_number():
    trials = [Trial("bn", math.nan, seed, metrics={"accuracy": 0.5 + seed / 10}) for seed in (0, 1)]
    rates = comparison.best_rates(trials, "accuracy", None)
    assert math.isnan(rates["bn"])
    assert comparison.summary(trials, ("bn",), "accuracy", None).iloc[0]["mean"] == pytest.approx(0.55)


def test_differences_are_paired_by_seed():
    found = row("mine", "test_loss")
    assert found["difference"] == pytest.approx(((0.40 - 0.20) + (0.49 - 0.30)) / 2)
    assert found["separated"]
    assert row("bn", "test_loss")["best"]
    assert np.isnan(row("bn", "test_loss")["difference"])


def test_speed_is_a_ratio_to_the_first_entry_in_the_trial_beside():
    # 0.5 at one rate and 2 at the other, median 1.25
    assert row("mine", "speed")["mean"] == pytest.approx(1.25)
    assert row("bn", "speed")["mean"] == 1.0


def test_memory_is_in_mebibytes():
    assert row("bn", "memory")["mean"] == 3.0


def test_sensitivity_of_each_seed_is_that_over_its_grid():
    # bn: (0.3 + 0) / 2 for either seed; mine: 0.3 / 2 and, as what diverged counts as 2.0, (2.0 - 0.49) / 2
    assert row("bn", "sensitivity")["mean"] == pytest.approx(0.15)
    assert row("mine", "sensitivity")["mean"] == pytest.approx((0.15 + 0.755) / 2)


def test_frame_holds_every_number_of_every_run_that_was_done():
    found = comparison.tidy([*GRID, one("bn", 3.0, 0, 0.0, reason="ValueError: no")])
    assert len(found) == len(GRID) * 6
    assert list(found.columns) == ["entry", "learning_rate", "seed", "quantity", "value"]


@pytest.mark.parametrize(
    ("metric", "higher", "expected", "clear"),
    [
        ("test_accuracy", None, True, True),
        ("accuracy loss", None, False, True),
        ("foo", None, False, False),
        ("foo", ["foo"], True, True),
        ("accuracy", [], False, True),
    ],
)
def test_which_direction_is_better(metric, higher, expected, clear):
    assert comparison.more_is_better(metric, higher) == expected
    assert comparison.is_clear(metric, higher) == clear


def test_a_trial_survives_strict_json(tmp_path):
    made = Trial(
        'b"n',
        math.nan,
        3,
        metrics={"loss": math.inf},
        measured={"kappa": math.nan},
        curve=((0.0, 2.0), (1.0, math.inf)),
        profile=(("fc/input", 3.0),),
        findings=(("scale.decay", "warning", "text"),),
        notes=("note",),
        setting={"fit": "fit 12"},
    )
    trial.write(made, tmp_path / "new")
    assert repr(trial.read(tmp_path / "new")) == repr(made)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["result.json"]


def test_a_damaged_result_is_told(tmp_path):
    (tmp_path / trial.FILE_NAME).write_text('{"entry": ')
    with pytest.raises(OSError, match=r"result.json is damaged .* delete that folder"):
        trial.read(tmp_path)
    assert trial.read(tmp_path / "nowhere") is None
