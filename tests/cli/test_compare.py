"""normscope compare: norms by name and of the user's own, checked first, on the same small work."""

import json
import re
import sys

import pytest
import torch

import normscope as ns
from normscope.cli import main

SOURCE = """
import torch
from torch import nn

class Good(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return x / (x.abs().mean(1, keepdim=True) + 1e-5) * self.weight

class Leaky(Good):
    def forward(self, x):
        return x / (x.abs().mean(0, keepdim=True) + 1e-5) * self.weight

class Asks(Good):
    def __init__(self, n, size):
        super().__init__(n)
"""
QUICK = ["--steps", "3", "--lr", "0.05", "--seeds", "1"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "compared_layers.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    sys.modules.pop("compared_layers", None)


def test_it_checks_trains_and_says_where_everything_is(folder, capsys):
    before = list(sys.path)
    assert main(["compare", "compared_layers:Good", "group,groups=8", "none", *QUICK, "--out", "runs/a"]) == 0
    out = capsys.readouterr().out
    assert "✓ pass  alone" in out
    assert "test_loss ↓" in out
    assert out.endswith("tables  runs/a/table.tex, table.md, runs.csv\nreport  runs/a/comparison.html\n")
    assert sys.path == before
    found = ns.Comparison.read("runs/a")
    assert found.entries == ("compared_layers:Good", "group,groups=8", "none")
    assert found.checks[0][:2] == ("compared_layers:Good", "Good")
    record = ns.load("runs/a/group-groups=8/lr-0.05/seed-0")
    assert record.sites.set_index("module")["groups"].get("layer1.norm").max() == 8
    assert record.context["step"].nunique() == 3
    stamps = {file: file.stat().st_mtime_ns for file in (folder / "runs").rglob("result.json")}
    assert main(["compare", "compared_layers:Good", "none", *QUICK, "--out", "runs/a", "--no-check"]) == 0
    assert {file: file.stat().st_mtime_ns for file in (folder / "runs").rglob("result.json")} == stamps


def test_a_layer_that_fails_its_check_is_not_trained_unless_asked_for(folder, capsys):
    assert main(["compare", "compared_layers:Leaky", *QUICK]) == 1
    captured = capsys.readouterr()
    assert "in evaluation an example depends on the others" in captured.out
    assert captured.err.startswith("normscope compare: compared_layers:Leaky fails the check of alone; mend it, or")
    assert not (folder / "runs").exists()


FAILURES = {
    ("ieterative",): "name='ieterative' is unknown; did you mean 'iterative'",
    ("compared_layers:Nope",): "factory='compared_layers:Nope' is unknown; .*compared_layers:Good",
    ("nowhere:Nope",): "there is no module 'nowhere'",
    (
        "compared_layers:Asks",
    ): r"cannot be made from a number of features: TypeError: .*'size'.*compared_layers\.Asks\(8\)",
    ("group,groups",): "'groups' is not KEY=VALUE, as in group,groups=8",
    ("a/b.py:Nope",): "norm='a/b.py:Nope' must be MODULE:NAME.*for the file a/b.py write a.b:Nope",
    (
        "none",
        "--against",
        "zoo",
        "--model",
        "transformer",
    ): "'transformer' has no recorded baselines; there are some of",
    (
        "none",
        "--against",
        "zoo",
        "--steps",
        "7",
    ): "recorded with another protocol .steps 7 instead of 150.: leave these",
    ("none", "--against", "zoo", "--seeds", "9"): "recorded with 3 seeds; leave it at 3",
}


@pytest.mark.parametrize("arguments", FAILURES, ids=" ".join)
def test_what_was_wrong_is_named_and_nothing_runs(arguments, capsys, folder):
    assert main(["compare", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("normscope compare: ")
    assert re.search(FAILURES[arguments], error), error
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("arguments", [[], ["bn", "--seeds", "0"], ["bn", "--model", "vgg"]])
def test_wrong_usage(arguments):
    assert main(["compare", *arguments]) == 2


def test_results_are_strict_json(folder):
    assert main(["compare", "none", *QUICK, "--out", "runs/b"]) == 0

    def refuse(name):
        raise AssertionError(name)

    for file in (folder / "runs").rglob("*.json"):
        json.loads(file.read_text(), parse_constant=refuse)
