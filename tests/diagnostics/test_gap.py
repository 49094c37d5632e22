"""Verdicts on a gap: each fires on measurements made for it and is silent on those of a model that is well."""

import re

import numpy as np
import pytest

from normscope.core.finding import Verdict
from normscope.diagnostics import gap
from normscope.metrics.gap import BATCH, GIVEN, RUNNING, TARGET, TRAINING, Measured
from tests.metrics.test_gap import measurements

FAILURE, WARNING, UNDECIDED, NOTE, OK = Verdict
N = 2000


def right(accuracy):
    """Which samples are right: the first so many, so that differences are paired as those of one model are."""
    parts = (np.arange(N) < round(accuracy * N)).astype(float)
    return Measured(parts.mean(), parts)


def of(rows, alone=None, edit=None, **options):
    rows = {RUNNING: 0.9, BATCH: 0.9, TRAINING: 0.9, TARGET: 0.9} | rows
    measured = {name: right(value) for name, value in rows.items() if value is not None}
    m = measurements(
        measured, {name: right(value) for name, value in (alone or {"a": 0.9, "b": 0.9}).items()}, **options
    )
    for (path, column), value in (edit or {}).items():
        m.norms[column] = m.norms[column].astype(object)
        m.norms.loc[path, column] = value
    return m


def verdicts(m):
    return {finding.id.removeprefix("mismatch."): finding for finding in gap.judge(m)}


WELL = {"stored-statistics": OK, "target-shift": OK, "batch-statistics": OK, "served-in-training-mode": OK}


def test_a_model_that_is_well_is_left_in_peace():
    found = verdicts(of({TRAINING: 0.902, TARGET: 0.903, BATCH: 0.85}))
    assert {name: finding.verdict for name, finding in found.items()} == WELL | {"norm-cost": OK}
    assert not any(finding.remedy for finding in found.values())


CASES = {
    "stale": (
        of({TRAINING: 0.95, TARGET: 0.95, BATCH: 0.95}),
        "stored-statistics",
        WARNING,
        "recalibrate.model, train",
    ),
    "stale and large": (of({RUNNING: 0.1}), "stored-statistics", FAILURE, "recalibrate.model, train"),
    "shifted": (of({TARGET: 0.95}), "target-shift", WARNING, "recalibrate.model, target"),
    "shifted, nothing else known": (of({TARGET: 0.95, TRAINING: None}), "target-shift", WARNING, "target_batches"),
    "no target": (of({TARGET: None}, data="training"), "target-shift", UNDECIDED, "Pass target_batches"),
    "no training data": (of({TRAINING: None}), "stored-statistics", UNDECIDED, "Pass train_batches"),
    "far away, to no avail": (
        of({TARGET: 0.88}, edit={("a", "beyond"): 1.0, ("b", "beyond"): 0.9, ("a", "kl"): 2.0}),
        "target-shift",
        NOTE,
        "Do not recalibrate",
    ),
    "one norm": (of({RUNNING: 0.5}, {"a": 0.55, "b": 0.9}), "norm-cost", FAILURE, "recalibrate.model"),
    "one norm alone": (of({}, {"a": 0.9, "b": 0.95}), "norm-cost", WARNING, "only='b'"),
    "in training mode": (of({GIVEN: 0.7}, training=("a", "b")), "served-in-training-mode", WARNING, r"model\.eval\(\)"),
    "in training mode, no matter": (of({GIVEN: 0.9}, training=("a",)), "served-in-training-mode", NOTE, "hides this"),
    "batches by class": (of({BATCH: 0.99}), "batch-statistics", NOTE, "Shuffle"),
    "one-sample batches": (
        of({BATCH: None}, missing={BATCH: "one sample"}),
        "batch-statistics",
        UNDECIDED,
        "two samples",
    ),
    "never updated, to no avail": (
        of({}, edit={("b", "kl_train"): 0.7, ("b", "initial"): True}),
        "stored-statistics",
        NOTE,
        "recalibrate.model, train",
    ),
    "training data unlike those of the training": (
        of({TRAINING: 0.7}, edit={("b", "kl_train"): 0.7}),
        "stored-statistics",
        NOTE,
        "Keep the stored statistics",
    ),
    "broken": (of({}, edit={("b", "broken"): 3}), "broken-statistics", FAILURE, "takes the statistics anew"),
    "frozen": (of({}, frozen={"c": "FrozenBatchNorm2d"}), "frozen-norms", UNDECIDED, "nn.BatchNorm2d"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_fires_on_what_it_is_for(name):
    m, which, verdict, remedy = CASES[name]
    found = verdicts(m)
    assert found[which].verdict is verdict
    assert re.search(remedy, found[which].remedy)
    others = {other: finding.verdict for other, finding in found.items() if other != which}
    if name not in ("stale and large", "one norm", "shifted, nothing else known"):
        assert set(others.values()) <= {OK}


def test_the_norm_that_costs_most_is_named_and_the_paired_error_decides():
    found = verdicts(of({RUNNING: 0.5}, {"a": 0.55, "b": 0.9, "c": 0.5}))["norm-cost"]
    assert found.sites == ("b", "a")
    assert found.evidence["recovered"] == pytest.approx(0.4)
    assert found.evidence["standard_error"] == pytest.approx(np.sqrt(0.4 * 0.6 / (N - 1)))


def test_stale_statistics_of_many_norms_without_one_to_blame_have_no_site():
    found = verdicts(of({TRAINING: 0.95, TARGET: 0.95}))["stored-statistics"]
    assert found.sites == ()


@pytest.mark.parametrize("parts", [1, 0])
def test_one_part_or_numbers_that_are_not_finite_decide_nothing(parts):
    values = [np.array([0.5]), np.array([0.9])] if parts else [np.array([0.5, 0.5]), np.array([0.9, np.nan])]
    rows = [Measured(v.mean(), v) for v in values]
    m = measurements({RUNNING: rows[0], BATCH: rows[0], TRAINING: rows[1], TARGET: rows[1]}, {"a": rows[1]})
    found = verdicts(m)
    assert found["stored-statistics"].verdict is found["norm-cost"].verdict is UNDECIDED
    assert "too few samples" in found["norm-cost"].message or "metric is not finite" in found["norm-cost"].message


def test_a_lower_loss_is_a_gain():
    found = verdicts(of({RUNNING: 0.9, TRAINING: 0.5, TARGET: 0.5, BATCH: 0.5}, {"a": 0.5}, sign=-1.0))
    assert found["stored-statistics"].verdict is FAILURE
    assert found["stored-statistics"].evidence["recovered"] == pytest.approx(0.4)


NORM = {"initial": False, "updates": 1000.0, "momentum": 0.1, "beyond": 1.0, "kl_train": float("nan")}
REASONS = {
    "new": ({"initial": True}, "those of a new layer", "running_mean"),
    "converted": ({"updates": 0.0, "kl_train": 0.001}, "other data, or a preprocessing", "as it is served"),
    "fast": ({"momentum": 0.99}, "only the last batch counts", "momentum=0.01"),
    "slow": ({"momentum": 0.001, "updates": 100.0}, "still holds 90% of its initial value", "larger momentum"),
    "trails": ({"beyond": 0.0}, "trails the weights", "small learning rate"),
    "other data": ({"kl_train": 0.001}, "other data, or a preprocessing that differs", "as it is served"),
    "overwritten": ({"kl_train": 2.0}, "buffers overwritten. Training data lie 2 nats", "on training data"),
    "unknown": ({}, "other data, or a preprocessing that differs; or weights changed", "as it is served"),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_cause_follows_from_what_is_known_of_the_norm(name):
    known, cause, remedy = REASONS[name]
    told = gap.reason(NORM | known)
    assert cause in told[0]
    assert remedy in told[1]
