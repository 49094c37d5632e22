import json
import pkgutil
import subprocess
import sys

import pytest

from normscope.core import survey


def _imports(path):
    try:
        return ":" in path and pkgutil.resolve_name(path) is not None
    except (AttributeError, ImportError):
        return False


def _faults(provided):
    """Return what is wrong with a table of provided names: keys not in the catalog, objects that do not import."""
    known = {name for work in survey.works() for name in work.provides}
    strange = [f"{name} is not in the catalog" for name in provided if name not in known]
    return strange + [f"{name}: {path} does not import" for name, path in provided.items() if not _imports(path)]


def test_every_provided_name_is_in_the_catalog_and_imports():
    assert _faults(survey.PROVIDED) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"layer:no-such": "json:dumps"},
        {"layer:batch": "no_such_package:thing"},
        {"layer:batch": "json:thing"},
        {"layer:batch": "json.dumps"},
    ],
)
def test_a_wrong_table_is_found_out(wrong):
    assert len(_faults(wrong)) == 1
    assert _faults({"layer:batch": "json:dumps"}) == []


def test_works_are_the_245_of_the_survey_in_order():
    works = survey.works()
    assert [work.id for work in works] == [f"S{n:03d}" for n in range(245)]
    assert {work.chapter for work in works} == {"methodology", "analysis", "application"}
    assert all(1989 < work.year < 2024 for work in works)
    assert all(work.title and work.section and work.provides for work in works)
    kinds = {name.partition(":")[0] for work in works for name in work.provides}
    assert kinds == {
        *("layer", "recovery", "weight", "optim", "regularizer"),
        *("population", "inference", "analysis", "figure", "app"),
    }


def test_a_title_with_commas_and_quotes_survives():
    work = survey.works()[79]
    assert (work.title, work.year) == ('Rethinking" Batch" in BatchNorm', 2021)
    assert work.paper == "https://arxiv.org/pdf/2105.07576.pdf"
    assert survey.works()[15].provides == ("layer:batch-group", "layer:ghost-batch")


def test_catalog_has_the_public_form(monkeypatch):
    monkeypatch.setattr(survey, "PROVIDED", {"layer:ghost-batch": "json:dumps"})
    catalog = survey.catalog()
    assert json.loads(json.dumps(catalog)) == catalog
    assert all(list(row) == ["id", "chapter", "section", "title", "year", "provides"] for row in catalog)
    assert catalog[15] == {
        "id": "S015",
        "chapter": "methodology",
        "section": "Normalizing Activations as Functions",
        "title": "Four Things Everyone Should Know to Improve Batch Normalization",
        "year": 2020,
        "provides": [
            {"name": "layer:batch-group", "object": None, "status": "planned"},
            {"name": "layer:ghost-batch", "object": "json:dumps", "status": "done"},
        ],
    }


def test_the_catalog_needs_neither_torch_nor_pandas():
    code = (
        "import sys; from normscope.core import survey; survey.catalog(); print({'torch', 'pandas'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
