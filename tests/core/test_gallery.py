"""The gallery as data: whole, resolvable, and covering the survey's catalog."""

import pytest

from normscope.core.errors import ArgumentError
from normscope.core.gallery import VERDICTS, named, of_work, reproduction, reproductions
from normscope.core.source import cite
from normscope.core.survey import works

NAMES = sorted({name for work in works() for name in work.provides if name.startswith("figure:")})


def test_every_figure_has_claims_with_a_source_and_a_verdict():
    assert len({item.id for item in reproductions()}) == len(reproductions()) > 70
    for item in reproductions():
        assert item.claims
        assert {claim.verdict for claim in item.claims} <= set(VERDICTS)
        assert all(cite(key).title for key in item.sources)
        assert all(cite(claim.source.partition(",")[0]).title for claim in item.claims)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_of_the_catalog_is_regenerated(name):
    asked = [work for work in works() if name in work.provides]
    for item in named(name):
        assert all(item in of_work(work) for work in asked)


def test_a_work_has_the_figures_that_name_it_as_source():
    assert [item.id for item in of_work(works()[132])][:2] == ["CO-8", "CO-9"], "by the catalog's name and by short key"
    assert [item.id for item in of_work(works()[244])] == ["AS-1", "AS-2"], "the catalog asks for no figure"
    assert of_work(works()[1]) == ()


def test_what_is_unknown_is_named_with_the_closest():
    with pytest.raises(ArgumentError, match=r"id='CO-24' is unknown; did you mean"):
        reproduction("CO-24")
    with pytest.raises(ArgumentError, match=r"did you mean 'figure:rank-collapse'"):
        named("rank-colapse")
