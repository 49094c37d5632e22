"""Every script has the declared names, and its claims can be read."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest

import analyses
from analyses.claim import VERDICTS
from analyses.script import Script
from analyses.version import code_version, reached
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


TOLD = '''"""SI-0: a."""
from normscope import workbench
CAPTION = "a"
RATE = 1
def setting(fast):
    return RATE
def run(setting, seed):
    """Return."""
    return workbench.mnist()
def claims(frame):
    return helper(frame)
def helper(frame: object):
    return frame
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('CAPTION = "a"', 'CAPTION = "b"', True),
        ("return helper(frame)", "return 1", True),
        ("    return frame", "    return 2", True),
        ("Return.", "Return a frame.", True),
        ("(setting, seed)", "(setting: int, seed: int) -> object", True),
        ("RATE = 1", "RATE = 2", False),
        ("import workbench", "import norms as workbench", False),
        ("workbench.mnist", "workbench.text", False),
        ("return RATE", "return helper(RATE)", False),
    ],
)
def test_the_code_version_knows_what_computes(tmp_path, old, new, same):
    assert old in TOLD
    versions = []
    for name, text in (("before", TOLD), ("after", TOLD.replace(old, new))):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        versions.append(code_version(path))
    assert (versions[0] == versions[1]) == same


def test_the_code_version_follows_names_not_files():
    found = reached(Path(analyses.SCRIPTS["ST-2"].__file__))
    names = {(path.relative_to(REPORTS.parent).as_posix(), name) for path, name in found}
    assert ("normscope/probes/disturbance.py", "snd") in names, "through the lazy public face"
    assert ("normscope/norms/operation.py", "Standardize") in names, "through what a package imports"
    assert not {path for path, _ in names if path.startswith(("normscope/scope", "normscope/report"))}
    assert ("analyses/stochasticity/st_02_batch_size.py", "draw") not in names
