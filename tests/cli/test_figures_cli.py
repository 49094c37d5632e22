"""normscope figures and normscope catalog --section: what became of the survey's claims, without torch."""

import json
import subprocess
import sys

import pytest

from normscope.cli import main
from normscope.core.gallery import VERDICTS, reproduction, reproductions
from normscope.core.survey import outline, works


def told(capsys, *arguments, status=0):
    assert main(list(arguments)) == status
    return capsys.readouterr()


def test_all_figures_are_listed_with_their_claims(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    lines = told(capsys, "figures").out.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines if line[:2] == "  " and line[2] != " "] == [r.id for r in reproductions()]
    claims = [claim for item in reproductions() for claim in item.claims]
    assert sum(line.startswith(" " * 9) for line in lines) == len(claims)
    assert lines[-2].startswith(f"{len(reproductions())} figures, {len(claims)} claims: ")


@pytest.mark.parametrize("chapter", ["SI", "si", "scale"])
def test_a_chapter_is_named_by_its_letters_or_its_title(chapter, capsys):
    shown = json.loads(told(capsys, "figures", "--chapter", chapter, "--json").out)
    assert [item["id"] for item in shown] == [r.id for r in reproductions() if r.id.startswith("SI-")]


def test_a_verdict_leaves_its_claims(capsys):
    shown = json.loads(told(capsys, "figures", "--verdict", "not-reproduced", "--json").out)
    assert {claim["verdict"] for item in shown for claim in item["claims"]} == {"not reproduced"}
    expected = [r.id for r in reproductions() if any(c.verdict == "not reproduced" for c in r.claims)]
    assert [item["id"] for item in shown] == expected


def test_one_figure_is_told(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "90")
    text = told(capsys, "figures", "si-4").out
    item = reproduction("SI-4")
    flat = " ".join(text.split())
    assert text.splitlines()[0] == f"SI-4  {item.title}"
    assert " ".join(item.caption.split()) in flat
    for claim in item.claims:
        assert " ".join(claim.statement.split()) in flat
    assert "Spherical Motion Dynamics" in flat
    assert "expected 1 ± 0.01 measured" in flat
    assert "reports/SI-4/figure.png" in flat
    assert "python -m analyses run SI-4" in flat
    assert "explains the findings scale.equilibrium" in flat
    assert json.loads(told(capsys, "figures", "SI-4", "--json").out)["claims"][0]["verdict"] in VERDICTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figures", "SI-44"], "id='SI-44' is unknown; did you mean 'SI-4'"),
        (["figures", "--chapter", "scael"], "chapter='scael' is unknown; Options: AP, "),
        (["catalog", "--section", "2.7"], "section='2.7' is unknown; the outline above has 1, 1.1"),
    ],
)
def test_what_is_unknown_fails_with_what_there_is(arguments, message, capsys):
    assert message in told(capsys, *arguments, status=1).err


def test_every_json_is_strict(capsys):
    def refuse(constant):
        raise AssertionError(constant)

    json.loads(told(capsys, "figures", "--json").out, parse_constant=refuse)


def test_the_outline_counts_works_and_verdicts(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    lines = told(capsys, "catalog", "--section").out.splitlines()
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()] == [s.number for s in outline()]
    assert next(line for line in lines if line.startswith("2 ")).startswith("2      Analysis (43 works, ")
    assert max(map(len, lines)) <= 100
    assert sum(len(s.works) for s in outline() if len(s.number) == 1) == len(works())


def test_a_section_walks_its_works(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    text = told(capsys, "catalog", "--section", "2.2").out
    assert text.startswith("2.2 Improved Conditioning in Optimization\n16 works, ")
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("S1")] == [f"S{n}" for n in range(130, 146)]
    begin = lines.index(next(line for line in lines if line.startswith("S138 ")))
    part = lines[begin : lines.index("", begin)]
    assert part[2].split()[0] == "CO-16"
    assert part[-1] == "         normscope figures CO-16"
    assert len(part) == 4 + len(reproduction("CO-16").claims)
    layers = told(capsys, "catalog", "--section", "1.2.2").out
    assert 'layer:iterative: normscope.norms.build("iterative", ...)' in layers


def test_a_section_as_json_keeps_the_rows_of_the_catalog(capsys):
    rows = json.loads(told(capsys, "catalog", "--section", "2.4", "--json").out)
    assert [row["id"] for row in rows] == ["S153", "S154"]
    assert [item["id"] for item in rows[1]["figures"]] == ["RE-4", "RE-5"]
    assert list(rows[0])[:6] == ["id", "chapter", "section", "title", "year", "provides"]


def test_they_load_no_torch():
    code = (
        "import sys\nfrom normscope.cli import main\n"
        "assert main(['figures']) == main(['figures', 'CO-1']) == main(['catalog', '--section', '2']) == 0\n"
        "assert not {'torch', 'pandas'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
