"""normscope findings: a line for each finding, an explanation of one, no torch."""

import subprocess
import sys

import pytest

from normscope.cli import main
from normscope.diagnostics.explanation import SUBJECTS, explanations


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_all_are_listed_by_subject(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["findings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if line.partition(":")[0] in SUBJECTS] == list(SUBJECTS)
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(explanations())
    assert lines[-1] == f"{len(explanations())} findings; normscope findings ID explains one."
    if columns >= 100:
        assert max(map(len, lines)) <= columns


def test_one_is_explained(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "90")
    assert main(["findings", "noise.small-batch"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "noise.small-batch"
    heads = [line.split()[0] for line in lines[2:] if not line.startswith(" ")]
    assert heads == ["tells", "why", "mend", "threshold", "from", "read", "see", "see"]
    flat = " ".join(text.split())
    assert "threshold 0.5: how far an output moves with its batch, relative to its size" in flat
    assert "sqrt(3 / (2 n))" in flat
    assert "https://arxiv.org/abs/1702.03275" in flat
    assert "see figure ST-2: Stochastic disturbance by batch size; how far an output moves" in flat
    assert "(normscope figures ST-2)" in flat


def test_an_unknown_id_fails_with_the_closest(capsys):
    assert main(["findings", "noise.smal-batch"]) == 1
    assert "did you mean 'noise.small-batch'" in capsys.readouterr().err


def test_it_loads_no_torch():
    code = (
        "import sys\nfrom normscope.cli import main\n"
        "assert main(['findings']) == 0 and main(['findings', 'structure.eps']) == 0 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
