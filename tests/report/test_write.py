"""The page and its twins on the disk."""

import json

import numpy as np
import pytest

from normscope.core.errors import StoreError
from normscope.core.finding import Finding, Verdict, worst_first
from normscope.core.illustration import illustrations
from normscope.report import write_report
from tests.report.records import Run, findings_of


@pytest.fixture(scope="module")
def record():
    return Run(6, 8).record()


def test_the_twins_lie_beside_the_page(record, tmp_path):
    path = write_report(record, findings_of(record), tmp_path / "new" / "page.html")
    assert path == tmp_path / "new" / "page.html"
    assert sorted(file.name for file in path.parent.iterdir()) == ["page.html", "page.json", "page.md"]
    text = path.read_text(encoding="utf-8")
    assert all(f'href="page.{kind}"' in text for kind in ("md", "json"))


def test_a_folder_takes_a_page_of_the_usual_name(record, tmp_path):
    assert write_report(record, [], tmp_path) == tmp_path / "report.html"


def test_the_json_is_the_public_form_worst_first(record, tmp_path):
    findings = findings_of(record)[::-1]
    path = write_report(record, findings, tmp_path)
    read = json.loads((path.parent / "findings.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    figures = [row.pop("figures") for row in read]
    assert read == [json.loads(json.dumps(f.as_dict())) for f in worst_first(findings)]
    assert figures == [[figure.id for figure in illustrations(row["id"])] for row in read]
    assert any(figures)
    assert list(read[0])[:5] == ["id", "verdict", "run", "site", "step"]


def test_numpy_numbers_and_nan_are_written_as_json(record, tmp_path):
    evidence = {"value": float("nan"), "count": np.int64(3), "list": [np.float32(0.5), float("inf")]}
    finding = Finding("a.b", Verdict.NOTE, "m", step=np.int64(7), evidence=evidence)
    path = write_report(record, [finding], tmp_path)
    [read] = json.loads((path.parent / "findings.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert read["evidence"] == {"value": "nan", "count": 3, "list": [0.5, "inf"]}
    assert read["step"] == 7


def test_a_place_that_cannot_be_written_is_named(record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"path='.*file/findings.json' cannot be written .*; choose a folder"):
        write_report(record, [], tmp_path / "file" / "report.html")


def test_only_the_last_folder_is_created(record, tmp_path):
    with pytest.raises(StoreError, match=r"no/such' lies in no folder: .*no does not exist; create that first"):
        write_report(record, [], tmp_path / "no" / "such" / "page.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["html", "md"])
def test_a_finding_names_the_figure_that_shows_its_effect(record, ending, tmp_path):
    finding = Finding("conditioning.rank-collapse", Verdict.WARNING, "The rank falls.")
    write_report(record, [finding], tmp_path)
    text = (tmp_path / f"report.{ending}").read_text(encoding="utf-8")
    assert "CO-16" in text
    assert "Batch normalization avoids the collapse of rank with depth" in text
    assert "without normalization the rank falls to 1 with depth" in text
    assert "normscope figures CO-16" in text
