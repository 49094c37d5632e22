"""The driver: what it writes, what it caches, what it says of errors; and the gallery."""

import json
import re

import pandas as pd
import pytest

import analyses
from analyses.__main__ import main
from analyses.driver import produce, units, write
from analyses.gallery import DATA, data, write_gallery

CHEAP = ("SC-1", "SI-11")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    assert main(["run", *CHEAP, "--fast", "--jobs", "2", "--out", str(folder)]) == 0
    return folder


def test_a_run_writes_a_folder_a_figure(out):
    for id in CHEAP:
        script = analyses.SCRIPTS[id]
        assert sorted(p.name for p in (out / id).iterdir()) == [
            "claims.json",
            "data.csv",
            "figure.png",
            "provenance.json",
        ]
        frame = pd.read_csv(out / id / "data.csv")
        assert tuple(frame.columns) == ("seed", *script.COLUMNS)
        assert sorted(frame["seed"].unique()) == [0, 1, 2]
        content = json.loads((out / id / "claims.json").read_text())
        names = ["statement", "source", "statistic", "expected", "tolerance", "measured", "spread", "seeds", "verdict"]
        assert [list(claim)[:9] for claim in content["claims"]] == [names] * len(content["claims"])
        assert {claim["seeds"] for claim in content["claims"]} == {3}
        provenance = json.loads((out / id / "provenance.json").read_text())
        assert provenance["fast"]
        assert provenance["threads"] == 1
        assert provenance["seeds"] == [0, 1, 2]
        assert provenance["versions"]["torch"]
        assert provenance["setting"]
        assert provenance["cpu_seconds"] >= 0.0


def test_what_is_cached_is_not_computed_again(out, monkeypatch):
    monkeypatch.setattr("analyses.driver._computed", lambda lacking, *_: iter(pytest.fail("computes") for _ in lacking))
    before = (out / "SC-1" / "claims.json").read_text()
    (out / "SC-1" / "claims.json").unlink()
    assert not produce([analyses.SCRIPTS["SC-1"]], out, fast=True, jobs=1, seeds=3, progress=False)
    assert (out / "SC-1" / "claims.json").read_text() == before


def test_an_interrupted_run_resumes_with_the_seeds_that_it_lacks(out, monkeypatch):
    script = analyses.SCRIPTS["SC-1"]
    found = []
    monkeypatch.setattr(
        "analyses.driver._computed", lambda lacking, *_: iter([(u, None) for u in found.extend(lacking) or ()])
    )
    produce([script], out, fast=True, jobs=1, seeds=4, progress=False)
    assert [unit.seed for unit in found] == [3]
    found.clear()
    produce([script], out, fast=False, jobs=1, seeds=2, progress=False)
    assert [unit.seed for unit in found] == [0, 1], "another setting is another result"


def test_a_failure_is_named_and_stops_no_other_figure(out, monkeypatch, tmp_path):
    script = analyses.SCRIPTS["SC-1"]
    (tmp_path / ".cache").symlink_to(out / ".cache")
    monkeypatch.setattr(script, "draw", lambda frame, canvas: 1 / 0)
    scripts = [script, analyses.SCRIPTS["SI-11"]]
    failures = produce(scripts, tmp_path, fast=True, jobs=1, seeds=3, progress=False)
    assert failures == ["SC-1, while judging or drawing: ZeroDivisionError: division by zero"]
    assert (tmp_path / "SI-11" / "figure.png").exists()


def test_equal_seeds_give_equal_numbers(out, tmp_path):
    assert not produce([analyses.SCRIPTS["SC-1"]], tmp_path, fast=True, jobs=1, seeds=3, progress=False)
    assert (tmp_path / "SC-1" / "data.csv").read_bytes() == (out / "SC-1" / "data.csv").read_bytes()


def test_exact_identities_hold_in_the_fast_setting(out):
    for id in CHEAP:
        claims = json.loads((out / id / "claims.json").read_text())["claims"]
        assert {claim["verdict"] for claim in claims} == {"reproduced"}, id


def test_an_unknown_id_is_named_with_the_closest(capsys):
    assert main(["run", "SI-111"]) == 1
    assert re.search(r"id='SI-111' is unknown; did you mean 'SI-11'", capsys.readouterr().err)


def test_the_gallery_shows_what_lies_there(out):
    text = write_gallery(out).read_text()
    assert "### SC-1. " in text
    assert "### SI-11. " in text
    assert "### SI-1. " not in text
    assert '<img src="SC-1/figure.png"' in text
    assert "https://arxiv.org/abs/1803.01814" in text
    claims = json.loads((out / "SI-11" / "claims.json").read_text())["claims"]
    for claim in claims:
        assert claim["statement"] in text


def test_the_data_of_the_package_are_those_of_the_committed_reports(out):
    committed = DATA.read_text(encoding="utf-8")
    assert committed == data(DATA.parents[3] / "reports"), "write them anew: python -m analyses gallery"
    write_gallery(out)
    assert DATA.read_text(encoding="utf-8") == committed, "other reports leave them alone"


def test_list_shows_titles_and_verdicts(out, capsys):
    assert main(["list", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "SC-1 " in line).endswith(": 4 reproduced")
    assert [line for line in lines if line.strip().startswith("SI-1 ")]


def test_list_tells_what_is_stale(out, tmp_path, capsys):
    (tmp_path / "SC-1").mkdir()
    for name in ("claims.json", "provenance.json"):
        text = (out / "SC-1" / name).read_text()
        (tmp_path / "SC-1" / name).write_text(re.sub(r'"key": "\w+"', '"key": "0"', text))
    assert main(["list", "--out", str(tmp_path)]) == 0
    stale = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "stale" in line]
    assert stale == ["SC-1"]


def test_units_differ_by_setting(tmp_path):
    script = analyses.SCRIPTS["SC-1"]
    fast, full = (units(script, fast=fast, seeds=1)[0] for fast in (True, False))
    assert fast.key != full.key
    with pytest.raises(FileNotFoundError):
        write(script, (full,), tmp_path, fast=False)
