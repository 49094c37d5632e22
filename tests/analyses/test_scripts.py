"""Every script has the declared names, and its claims can be read."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest

import analyses
from analyses.claim import VERDICTS
from analyses.script import Script
from analyses.version import code_version
from normscope.core.source import cite

REPORTS = Path(analyses.__file__).parent.parent / "reports"
SCRIPTS = list(analyses.SCRIPTS.values())
REPORTED = [script for script in SCRIPTS if (REPORTS / script.ID / "claims.json").exists()]
FUNCTIONS = {"setting": ["fast"], "run": ["setting", "seed"], "claims": ["frame"], "draw": ["frame", "canvas"]}
NAMES = [name for name in vars(Script) if name.isupper()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.ID)
def test_a_script_has_the_declared_names(script):
    for name in NAMES:
        assert getattr(script, name), name
    for name, parameters in FUNCTIONS.items():
        assert list(inspect.signature(getattr(script, name)).parameters) == parameters
    stem = script.ID.replace("-", "_").lower().split("_")
    assert Path(script.__file__).name.startswith(f"{stem[0]}_{int(stem[1]):02d}_")
    assert script.__doc__.startswith(f"{script.ID}: ")
    assert not script.TITLE.endswith(".")
    assert script.CAPTION.endswith(".")
    for key in script.SOURCES:
        assert cite(key).title
    for fast in (False, True):
        assert dataclasses.is_dataclass(script.setting(fast))
        hash(script.setting(fast))


def test_every_file_of_a_chapter_that_is_named_as_a_figure_is_in_its_table():
    files = {p for p in Path(analyses.__file__).parent.glob("*/*_[0-9][0-9]_*.py")}
    assert {Path(script.__file__) for script in SCRIPTS} == files
    assert len(SCRIPTS) == sum(map(len, analyses.CHAPTERS.values())), "an id is used twice"


@pytest.mark.parametrize("script", REPORTED, ids=lambda script: script.ID)
def test_a_committed_report_is_whole_and_its_claims_are_judged(script):
    folder = REPORTS / script.ID
    content = json.loads((folder / "claims.json").read_text())
    assert content["id"] == script.ID
    assert content["claims"]
    for claim in content["claims"]:
        assert claim["verdict"] in VERDICTS
        assert claim["seeds"] >= 3
        assert claim["statement"].endswith(".")
        assert cite(claim["source"].split(",")[0]).title
        assert bool(claim["reason"]) == (claim["verdict"] != "reproduced"), claim["statement"]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert not provenance["fast"]
    assert (folder / "figure.png").stat().st_size < 250_000
    assert (folder / "data.csv").stat().st_size < 400_000
    header = (folder / "data.csv").read_text().splitlines()[0]
    assert header == ",".join(("seed", *script.COLUMNS))


def test_the_code_version_knows_captions_from_computation(tmp_path):
    text = (
        '"""SI-0: a."""\nfrom normscope import workbench\nCAPTION = "a"\nRATE = 1\ndef draw(frame, canvas):\n    pass\n'
    )

    def version(changed):
        path = tmp_path / "script.py"
        path.write_text(changed)
        return code_version(path)

    assert version(text) == version(text.replace('CAPTION = "a"', 'CAPTION = "b"').replace("    pass", "    return"))
    assert version(text) != version(text.replace("RATE = 1", "RATE = 2"))
    assert version(text) != version(text.replace("import workbench", "import norms"))
