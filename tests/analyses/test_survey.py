"""Every figure that the survey's catalog names has an id here."""

import re

from analyses.survey import FIGURES
from normscope.core.survey import works


def test_every_figure_of_the_catalog_is_mapped():
    names = {name for work in works() for name in work.provides if name.startswith("figure:")}
    assert set(FIGURES) == names
    assert list(FIGURES) == sorted(FIGURES)


def test_ids_are_written_as_ids():
    assert all(ids for ids in FIGURES.values())
    assert all(re.fullmatch(r"(SC|SI|CO|ST|RE|RB|AS|AP)-\d+", id) for ids in FIGURES.values() for id in ids)
