"""normscope report, on a run on the disk, where there is no torch."""

import argparse
import json
import subprocess
import sys

import pytest

from normscope.cli import main
from normscope.cli import report as command
from normscope.core.illustration import illustrations
from normscope.core.reading import load
from normscope.diagnostics import diagnose
from tests.report.records import Run

WITHOUT_TORCH = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "matplotlib"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Refusing())
from normscope.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "a"
    run = Run(12, 20, path=path)
    run.record()
    run.store.close()
    return path


def test_it_writes_the_page_and_prints_findings_and_paths(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["report", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    findings = diagnose(load(folder))
    assert len(findings) > 10
    assert all(any(finding.id in line for line in lines) for finding in findings)
    for line, name in zip(lines[-3:], ("report.html", "report.md", "findings.json"), strict=True):
        assert line.split()[1] == str(folder / name)
        assert (folder / name).stat().st_size > 100


def test_json_goes_to_standard_output_and_nothing_is_written(folder, capsys):
    for file in folder.glob("*.html"):
        file.unlink()
    assert main(["report", str(folder / "record.sqlite"), "--json"]) == 0
    read = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert all(row.pop("figures") == [figure.id for figure in illustrations(row["id"])] for row in read)
    assert read == [finding.as_dict() for finding in diagnose(load(folder))]
    assert not list(folder.glob("*.html"))


def test_json_goes_to_a_file_where_one_is_named(folder, tmp_path, capsys):
    file = tmp_path / "new" / "found.json"
    assert main(["report", str(folder), "--json", "--out", str(file)]) == 0
    assert capsys.readouterr().out == f"json  {file}\n"
    assert len(json.loads(file.read_text(encoding="utf-8"))) == len(diagnose(load(folder)))
    assert list(file.parent.iterdir()) == [file]


def test_json_opens_no_page(folder, capsys):
    assert main(["report", str(folder), "--json", "--open"]) == 2
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_folders_are_not_nested_on_the_way_to_a_page(folder, tmp_path, capsys, more):
    assert main(["report", str(folder), "--out", str(tmp_path / "no" / "such" / "page.html"), *more]) == 1
    assert f"{tmp_path / 'no'} does not exist" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_folder_of_runs_lists_them(folder, capsys):
    assert main(["report", str(folder.parent)]) == 1
    error = capsys.readouterr().err
    assert "a folder of 1; give one of them" in error
    assert str(folder) in error


def test_the_page_goes_where_it_is_told(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--out", str(tmp_path / "x" / "page.html")]) == 0
    assert (tmp_path / "x" / "page.html").exists()
    assert str(tmp_path / "x" / "page.md") in capsys.readouterr().out


def test_it_works_without_torch_and_matplotlib(folder, tmp_path):
    arguments = [sys.executable, "-c", WITHOUT_TORCH, "report", str(folder), "--out", str(tmp_path / "page.html")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize("content", [None, b"no database"])
def test_what_cannot_be_read_exits_1_and_says_why(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "record.sqlite").write_bytes(content)
    assert main(["report", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert str(tmp_path) in said.err


def test_the_browser_opens_only_on_request(folder, tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = str(tmp_path / "page.html")
    assert command.run(parser.parse_args([str(folder), "--out", out])) == 0
    assert opened == []
    assert command.run(parser.parse_args([str(folder), "--out", out, "--open"])) == 0
    assert opened == [(tmp_path / "page.html").as_uri()]
