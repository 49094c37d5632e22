"""Explanations: every registered finding has a complete one, and a name that is not known leads to the closest."""

import pytest

from normscope.core.errors import ArgumentError
from normscope.core.source import cite
from normscope.diagnostics import DIAGNOSTICS, gap, id_of
from normscope.diagnostics.explanation import COMPARED, GAP, SUBJECTS, explain, explanations
from normscope.diagnostics.rule import Rule

ALL = explanations()


def test_every_diagnostic_is_explained_in_its_order():
    assert [name for name in ALL if name not in GAP] == [id_of(judge) for judge in DIAGNOSTICS]
    assert {rule.id for rule in vars(gap).values() if isinstance(rule, Rule)} == {*GAP}
    assert set(COMPARED) == set(ALL)
    assert list(SUBJECTS) == list(dict.fromkeys(name.partition(".")[0] for name in ALL))


@pytest.mark.parametrize("name", ALL)
def test_an_explanation_is_complete(name):
    item = explain(name)
    assert item.id == name
    assert item.what.startswith(("whether ", "which "))
    assert item.what.endswith(".")
    assert item.cause.endswith(".")
    assert item.remedy.endswith(".")
    assert item.compared
    assert item.threshold is not None
    assert item.origin.startswith(("identity: ", "measured: ")) or "https://" in item.origin
    assert cite(item.source.key) == item.source


def test_the_subject_may_be_left_out():
    assert explain("dead-units") == explain("propagation.dead-units")


CALLS = {
    "dead-unit": "id='dead-unit' is unknown; did you mean 'propagation.dead-units'? `normscope findings` lists all",
    "eps": "id='eps' is unknown; did you mean 'structure.eps' or 'optimizer.eps'? ",
    "scale.gain-decy": "did you mean 'scale.gain-decay'",
    "xyzzy": r"id='xyzzy' is unknown; `normscope findings` lists all \d+ with a line each\.",
}


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_id_names_the_closest(name):
    with pytest.raises(ArgumentError, match=CALLS[name].replace("?", r"\?")):
        explain(name)
