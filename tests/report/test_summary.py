"""What the page and its Markdown twin say alike."""

from normscope.core.finding import Finding, Verdict
from normscope.core.store import Store
from normscope.report.summary import events, groups, passed, provenance, runs
from tests.report.records import Run


def finding(name, verdict, site="", step=None, sites=()):
    return Finding(name, verdict, "m", run="a", site=site, step=step, sites=sites)


def test_findings_of_one_id_and_verdict_are_one_group():
    found = groups([
        finding("x.a", Verdict.NOTE, "n/output"),
        finding("x.b", Verdict.FAILURE, "late/output", 9),
        finding("x.b", Verdict.FAILURE, "early/output", 3, ("early/output", "more/output")),
        finding("x.b", Verdict.WARNING, "w/output"),
        finding("x.c", Verdict.OK),
    ])
    assert [(g.first.id, g.first.verdict.value, len(g.rest)) for g in found] == [
        ("x.b", "failure", 1),
        ("x.b", "warning", 0),
        ("x.a", "note", 0),
    ]
    assert found[0].sites == ("early/output", "more/output", "late/output")


def test_what_is_fine_is_listed_by_id():
    assert [
        f.id for f in passed([finding("x.b", Verdict.OK), finding("x.a", Verdict.OK), finding("x.c", Verdict.NOTE)])
    ] == ["x.a", "x.b"]


def test_a_run_is_told_in_phrases():
    assert runs(Run(6, 5).record()) == [
        ("resnet", ["ResNet", "41 steps, 5 sampled", "272,474 parameters", "2 normalization layers (batch)"])
    ]


def test_provenance_leaves_out_what_the_header_says_and_what_is_empty():
    run = {
        "run": "a",
        "model": "M",
        "created": 0,
        "versions": {"torch": "2", "numpy": "3"},
        "seed": 12345,
        "revision": "",
        "problem": True,
    }
    assert provenance(run) == [
        ("created", "1970-01-01 00:00 UTC"),
        ("versions", "torch 2, numpy 3"),
        ("seed", "12345"),
        ("problem", "yes"),
    ]


def test_equal_events_are_told_once():
    store = Store(None, "a", {})
    for step in (7, 3, 5):
        store.event(step, "probe-failed", "m", "it broke")
    store.event(4, "note", "", "hello")
    store.commit()
    assert events(store.record()) == ([("3, 3 times", "probe-failed", "m", "it broke"), ("4", "note", "", "hello")], 0)
