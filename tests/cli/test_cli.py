"""The command line: help, exit codes, catalog, demo."""

import json
import subprocess
import sys
import time

import pytest

import normscope as ns
from normscope.cli import COMMANDS, main


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name, _ in COMMANDS)


@pytest.mark.parametrize("name", [name for name, _ in COMMANDS])
def test_every_command_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"normscope {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["demo", "--model", "rnn"], ["demo", "--steps", "0"], ["report"]]
)
def test_wrong_usage_exits_2(arguments, capsys):
    assert main(arguments) == 2
    assert "normscope" in "".join(capsys.readouterr())


def test_failure_exits_1_with_the_reason(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_help_is_fast():
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "normscope", "--help"], capture_output=True, timeout=30, check=True)
        times.append(time.perf_counter() - start)
    base = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], capture_output=True, timeout=30, check=True)
        base.append(time.perf_counter() - start)
    assert min(times) < 0.3 or min(times) < 6 * min(base)


def test_catalog_json_has_the_public_form(capsys):
    assert main(["catalog", "--json"]) == 0
    works = json.loads(capsys.readouterr().out)
    assert len(works) == 245
    assert all(list(work) == ["id", "chapter", "section", "title", "year", "provides"] for work in works)
    items = [item for work in works for item in work["provides"]]
    assert all(list(item) == ["name", "object", "status"] and item["status"] in ("done", "planned") for item in items)


def test_catalog_for_people(capsys):
    assert main(["catalog"]) == 0
    text = capsys.readouterr().out
    assert "Batch Normalization" in text
    assert text.rstrip().endswith("planned.")


@pytest.mark.parametrize("model", ["cnn", "transformer"])
def test_demo_ends_with_findings_and_paths(model, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["demo", "--model", model, "--steps", "22", "--seed", "3", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert str(out) in text
    assert (out / "report.html").exists()
    assert (out / "findings.json").exists()
    record = ns.load(out)
    assert list(record.steps) == [0, 10, 20]
    assert record.runs[0]["seed"] == 3
    assert record.context.drop_duplicates("step")["loss"].notna().all()
    # a second run into the same folder is refused before training
    assert main(["demo", "--model", model, "--steps", "22", "--out", str(out)]) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_equal_seeds_give_equal_records(tmp_path):
    for name in ("a", "b"):
        assert main(["demo", "--steps", "3", "--seed", "5", "--out", str(tmp_path / name)]) == 0
    one, two = (ns.load(tmp_path / name).frame() for name in ("a", "b"))
    assert one["value"].equals(two["value"])
