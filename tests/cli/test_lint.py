"""normscope lint: a factory that returns a model, its optimizer and an example, or fewer of these."""

import json
import sys

import pytest

from normscope.cli import main

SOURCE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))

def pair():
    made = model()
    return made, torch.optim.AdamW(made.parameters())

def whole():
    return *pair(), torch.randn(16, 6)

def no_optimizer():
    return model(), None, torch.randn(16, 6)

def nothing():
    return None

def many():
    return 1, 2, 3, 4
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "linted_module.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("linted_module", None)


@pytest.mark.parametrize("name", ["model", "pair", "whole", "no_optimizer"])
def test_it_ends_with_the_table_and_writes_nothing(name, folder, capsys):
    assert main(["lint", f"linted_module:{name}"]) == 0
    text = capsys.readouterr().out
    assert "structure.dropout-before-norm" in text
    assert ("scale.gain-decay" in text) == (name in ("pair", "whole"))
    assert ("undecided" in text) == (name in ("model", "pair"))
    assert text.endswith("\nnormscope findings ID tells what a finding means and what to do.\n")
    assert {path.name for path in folder.iterdir()} <= {"linted_module.py", "__pycache__"}


def test_json_is_the_public_form(capsys):
    assert main(["lint", "linted_module:whole", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found[0]["id"], found[0]["verdict"]) == ("structure.dropout-before-norm", "warning")
    assert found[0]["evidence"] == {"rate": 0.5, "factor": 2.0, "layers": 1}


FAILURES = {
    "nothing": "model=None must be a torch.nn.Module",
    "many": "returned 4 values; it must return (model[, optimizer[, example]]).",
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_cannot_be_judged_fails_with_the_reason(name, capsys):
    assert main(["lint", f"linted_module:{name}"]) == 1
    assert FAILURES[name] in capsys.readouterr().err
