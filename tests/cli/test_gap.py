"""normscope gap: a factory's model is measured and judged; optional parts of what it returns may be missing."""

import json
import re
import sys

import pytest

from normscope.cli import main

SOURCE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = []
    for _ in range(4):
        x = torch.randn(32, 6)
        data.append((x, model(x).argmax(1)))
    model[1].running_mean += 3.0
    return model, data

def with_target():
    model, data = make()
    return model, None, data

def with_metric():
    model, data = make()
    return model, data, data, loss

def loss(model, batches):
    return [float(nn.functional.cross_entropy(model(x), y)) for x, y in batches]

def alone():
    return make()[:1]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "gap_factories.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("gap_factories", None)


def test_it_ends_with_findings_and_the_page(folder, capsys):
    assert main(["gap", "gap_factories:make"]) == 0
    text = capsys.readouterr().out
    assert "✕ failure  mismatch.stored-statistics" in text
    assert text.endswith("report  runs/gap-make/report.html\n")
    assert (folder / "runs" / "gap-make" / "report.html").exists()


@pytest.mark.parametrize(("factory", "metric", "rows"), [("with_target", "accuracy", 3), ("with_metric", "loss", 4)])
def test_json_is_all_that_is_printed(factory, metric, rows, capsys, folder):
    options = ["--json", "--out", "out", "--batches", "3", "--norms", "1", "--lower-is-better"]
    assert main(["gap", f"gap_factories:{factory}", *options]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert len(found["table"]) == rows
    assert text == (folder / "out" / "findings.json").read_text()
    assert f"{metric} (lower is better)" in (folder / "out" / "report.html").read_text()


def test_what_the_factory_must_return_is_said(capsys):
    assert main(["gap", "gap_factories:alone"]) == 1
    needed = r"returned 1 values; it must return \(model, train_batches\[, target_batches\[, metric\]\]\)"
    assert re.search(needed, capsys.readouterr().err)


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_a_number_of_batches_that_cannot_be_is_wrong_usage(count, capsys):
    assert main(["gap", "gap_factories:make", f"--batches={count}"]) == 2
    assert "must be a number, at least 1" in capsys.readouterr().err
