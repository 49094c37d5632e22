"""The command line's view of the normalizations: the table, and the demo on another norm."""

import json
import subprocess
import sys

import pytest

from normscope.cli import demo, main
from normscope.norms import find_norms, zoo
from normscope.scope.attach import attach


def test_catalog_norms_is_the_table(capsys):
    assert main(["catalog", "--norms", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)
    assert [method["name"] for method in methods] == list(zoo)
    by_name = {method["name"]: method for method in methods}
    assert by_name["batch"] == {
        "name": "batch",
        "area": "batch",
        "operation": "standardize",
        "recovery": "affine",
        "population": "running",
        "needs batch": True,
        "extra": 0,
        "source": "S007",
    }
    assert by_name["layer"]["needs batch"] is False
    # three weights for the means and three for the variances
    assert by_name["switchable"]["extra"] == 6


def test_catalog_norms_for_people(capsys):
    assert main(["catalog", "--norms"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "name",
        "area",
        "operation",
        "recovery",
        "population",
        "needs",
        "batch",
        "extra",
        "source",
    ]
    assert len([line for line in lines if line]) == len(zoo) + 2


def test_catalog_alone_needs_no_torch():
    code = (
        "import sys; from normscope.cli import main; main(['catalog']); "
        "sys.exit('torch' in sys.modules or 'normscope.norms' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_demo_converts_the_model_first(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        demo, "attach", lambda model, *given, **named: seen.append(model) or attach(model, *given, **named)
    )
    out = tmp_path / "run"
    arguments = ["--norm", "group", "--norm-option", "groups=4", "--steps", "2", "--out", str(out)]
    assert main(["demo", *arguments]) == 0
    assert "report" in capsys.readouterr().out
    assert (out / "report.html").exists()
    assert {(parts.kind, parts.groups) for parts in find_norms(seen[0]).values()} == {("group", 4)}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--norm", "grup"], "did you mean 'group'"),
        (["--norm", "group", "--norm-option", "groups=5"], "divisors"),
        (["--norm-option", "groups=4"], "--norm NAME"),
    ],
)
def test_demo_says_what_is_wrong(arguments, reason, tmp_path, capsys):
    assert main(["demo", *arguments, "--out", str(tmp_path / "run")]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_option_without_a_value_is_wrong_usage(capsys):
    assert main(["demo", "--norm", "group", "--norm-option", "groups"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err
