"""normscope examine: a factory of the user's is found, called and looked at; what was wrong with it is named."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import normscope as ns
from normscope.cli import main
from normscope.cli.examine import ALWAYS
from normscope.scope.session import PROBES, SUBJECTS

SOURCE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    batches = ((torch.randn(32, 6), torch.randint(3, (32,))) for _ in range(20))
    return model, nn.functional.cross_entropy, batches

def pair():
    return make()[:2]

def number():
    return 3

def asks(size):
    return make()

def not_a_model():
    return 3, *make()[1:]

def one_batch():
    return *make()[:2], next(make()[2])

setting = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    package = tmp_path / "examined_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mod.py").write_text(SOURCE)
    (package / "broken.py").write_text("import a_module_that_is_not_there")
    (package / "empty.py").write_text("")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("examined_package")]:
        del sys.modules[name]


def test_it_ends_with_findings_and_paths(folder, capsys):
    before = list(sys.path)
    assert main(["examine", "examined_package.mod:make", "--out", "look"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\d+ ok", text)
    assert text.endswith("run     look\nreport  look/report.html\n")
    assert all((folder / "look" / name).exists() for name in ("report.html", "report.md", "findings.json"))
    record = ns.load("look")
    assert list(record.steps) == list(range(16))
    assert "1/output" in set(record.sites["site"])
    assert sys.path == before


def test_a_new_folder_is_taken_each_time_and_json_is_all_that_is_printed(folder, capsys):
    for _ in range(2):
        assert main(["examine", "examined_package.mod:make", "--batches", "2", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        run = f"runs/{found[0]['run']}"
        assert [item["id"] for item in found] == [finding.id for finding in ns.diagnose(ns.load(run))]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["examine-make", "examine-make-2"]
    assert len(ns.load("runs/examine-make").steps) == 2


def test_as_a_program_it_finds_modules_of_the_current_folder(folder):
    env = os.environ | {"PYTHONPATH": str(Path(ns.__file__).parents[1])}
    command = [sys.executable, "-m", "normscope", "examine", "examined_package.mod:make", "--batches", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert "runs/examine-make" in done.stdout


USAGE = {
    "make": "factory='make' must be MODULE:NAME, as pkg.mod:factory: an importable module, a colon, a function",
    ":make": "factory=':make' must be MODULE:NAME",
    "pkg:": "factory='pkg:' must be MODULE:NAME",
    "pkg/mod.py:make": "for the file pkg/mod.py write pkg.mod:make",
    "pkg.mod.py": "must be MODULE:NAME",
}


@pytest.mark.parametrize("text", USAGE)
def test_what_is_no_reference_is_wrong_usage(text, capsys):
    assert main(["examine", text]) == 2
    assert USAGE[text] in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "17", "many"])
def test_a_number_of_batches_that_cannot_be_is_wrong_usage(count, capsys):
    assert main(["examine", "examined_package.mod:make", "--batches", count]) == 2
    assert "--batches" in capsys.readouterr().err


FAILURES = {
    "nowhere:make": "there is no module 'nowhere' in .* or among the installed packages; run the command in the",
    "examined_package.nowhere:make": r"there is no module 'examined_package\.nowhere' in",
    "examined_package.broken:make": "cannot be imported: ModuleNotFoundError: No module named "
    r"'a_module_that_is_not_there' \(.*broken\.py, line 1\)",
    "examined_package.mod:mak": r"mod:mak' is unknown; did you mean 'examined_package.mod:make'",
    "examined_package.empty:make": r"Options: none\. .*empty\.py",
    "examined_package.mod:setting": "is of type int, which cannot be called; wrap it in a function without arguments",
    "examined_package.mod:asks": r"cannot be called: TypeError: asks\(\) missing 1 required positional argument: 'size'"
    r".* It must work in Python as examined_package\.mod\.asks\(\), without arguments",
    "examined_package.mod:pair": r"returned 2 values; it must return \(model, loss, batches\)",
    "examined_package.mod:number": r"returned a value of type int; it must return \(model, loss, batches\)",
    "examined_package.mod:not_a_model": "model=3 must be a torch.nn.Module",
    "examined_package.mod:one_batch": "batches: got a single batch; pass a list of batches",
}


@pytest.mark.parametrize("text", FAILURES)
def test_what_was_wrong_with_the_factory_is_named(text, capsys, folder):
    assert main(["examine", text]) == 1
    error = capsys.readouterr().err
    assert error.startswith("normscope examine: ")
    assert re.search(FAILURES[text], error)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("subjects", [["curvature"], ["scale", "conditioning"]])
def test_chosen_subjects_are_measured_and_judged_alone(folder, capsys, subjects):
    assert main(["examine", "examined_package.mod:make", "--out", "some", "--json", "--subjects", *subjects]) == 0
    found = {finding["id"].partition(".")[0] for finding in json.loads(capsys.readouterr().out)}
    assert found - {*ALWAYS} == set(subjects)


def test_every_probe_but_the_one_that_needs_steps_belongs_to_a_subject():
    assert {probe for probes in SUBJECTS.values() for probe in probes} == set(PROBES) - {"flight"}
