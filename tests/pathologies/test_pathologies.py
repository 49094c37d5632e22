"""The diagnostics against runs with known defects and healthy runs, from their records; a few are trained anew."""

from fnmatch import fnmatchcase

import pytest

import normscope as ns
from normscope.metrics import spikes
from tests.pathologies import BROKEN, CALM, CASES, HEALTHY, SPIKES, records
from tests.pathologies.__main__ import fresh
from tests.pathologies.score import MOST_BEFORE, judge, summary

TRAINED = ("dead-relus", "momentum-small", "always-clipped-mlp", "too-sharp", "healthy-mlp")
SEEN = {}


def result_of(case):
    if case.name not in SEEN:
        SEEN[case.name] = judge(case, ns.diagnose(records.load(records.path_of(case.name))))
    return SEEN[case.name]


def test_there_are_enough_runs_and_their_names_are_their_own():
    assert len(BROKEN) >= 40
    assert len(HEALTHY) >= 15
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.family for case in BROKEN} == {"cnn", "mlp", "transformer"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_records_are_small(case):
    assert records.path_of(case.name).stat().st_size <= records.LARGEST


@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.name)
def test_a_healthy_run_gets_no_warning(case):
    assert result_of(case).alarms == ()


def test_defects_are_found_at_their_place():
    score = summary([result_of(case) for case in CASES])
    assert score["recall"] >= 0.95, [r for r in score["cases"] if not r["ok"]]
    assert score["false_alarms"] == 0


def test_spikes_are_told_with_their_cause_and_where_they_began():
    right = 0
    for case in SPIKES:
        told = [f for f in ns.diagnose(records.load(records.path_of(case.name))) if f.id.startswith("spikes.")]
        first = told[0].site if told else ""
        right += [f.id for f in told] == list(case.expect) and (not case.at or fnmatchcase(first, case.at[0]))
    assert len(SPIKES) >= 12
    assert right == len(SPIKES)


def test_calm_runs_have_no_spike():
    assert len(CALM) >= 8
    for case in HEALTHY:
        assert spikes.spikes(records.load(records.path_of(case.name))) == ()


def test_what_follows_stands_below_its_cause():
    case = next(case for case in BROKEN if case.name == "dead-relus")
    findings = ns.diagnose(records.load(records.path_of(case.name)))
    following = [f for f in findings if f.follows]
    assert following
    ids = [f.id for f in findings]
    assert all(ids.index(f.follows) < ids.index(f.id) for f in following)
    assert all(f.follows in f.cause and f.follows in f.remedy for f in following)


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_that_is_trained_anew_is_judged_alike(name):
    case = next(case for case in CASES if case.name == name)
    before, now = result_of(case), judge(case, ns.diagnose(fresh(case)))
    assert now.ok == before.ok
    assert now.alarms == before.alarms


def test_a_record_is_kept_but_for_its_last_digits(tmp_path):
    case = next(case for case in BROKEN if case.name == "momentum-small")
    record = records.load(records.path_of(case.name))
    records.save(record, tmp_path / "again.xz")
    again = records.load(tmp_path / "again.xz")
    assert again.frame().equals(record.frame())
    assert [(f.id, f.verdict) for f in ns.diagnose(again)] == [(f.id, f.verdict) for f in ns.diagnose(record)]


def test_the_score_counts_right_ids_at_right_sites_high_enough():
    case = next(case for case in BROKEN if case.name == "gain-zero")
    findings = ns.diagnose(records.load(records.path_of(case.name)))
    right = next(f for f in findings if f.id in case.expect)
    assert any(fnmatchcase(site, glob) for site in right.sites for glob in case.at)
    others = [f for f in findings if f.id != right.id]
    assert not judge(case, others).ok
    notes = [f for f in others if f.verdict.value != "ok"][:1] * (MOST_BEFORE + 1)
    assert judge(case, [*notes, right]).rank == MOST_BEFORE + 1
    assert not judge(case, [*notes, right]).ok
