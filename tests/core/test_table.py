"""The table of findings for a terminal."""

import re
from html import escape

import pytest

from normscope.core.finding import Finding, Verdict
from normscope.core.table import Findings, findings_table
from tests.report.records import Run, findings_of


@pytest.fixture(scope="module")
def findings():
    return findings_of(Run(12, 8).record())


@pytest.mark.parametrize("width", [60, 80, 120, 160, 240])
def test_it_keeps_to_the_width_and_says_everything(findings, width):
    text = findings_table(findings, width)
    lines = text.splitlines()
    assert max(len(line) for line in lines if not re.match(r"\S \w+ +\S+\.", line)) <= width
    flat = " ".join(text.split())
    assert lines[-1] == "2 failures, 6 warnings, 2 undecided, 3 notes, 4 ok"
    for finding in findings:
        assert finding.id in flat
    if width >= 160:
        assert max(map(len, lines)) <= width
        assert lines[0].split() == ["verdict", "id", "site", "step", "message"]
    else:
        told = [finding for finding in findings if finding.verdict is not Verdict.OK]
        assert all(" ".join(finding.message.split()) in flat for finding in told)


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_what_is_ok_takes_one_line(width):
    message = "Looked at and found to be well " * 12
    text = findings_table([Finding("a.b", Verdict.OK, message), Finding("c.d", Verdict.NOTE, message)], width)
    lines = text.splitlines()
    good = [line for line in lines if line.startswith("✓")]
    assert good == lines[-3:-2]
    assert good[0].split()[:3] == ["✓", "ok", "a.b"]
    assert len(good[0]) <= width
    assert good[0].endswith("…") or width == 30
    short = findings_table([Finding("a.b", Verdict.OK, "All is well.")], 80).splitlines()
    assert any(line.endswith("All is well.") for line in short)


def test_the_worst_come_first(findings):
    words = re.findall(r"^\S (failure|warning|undecided|note|ok)\b", findings_table(findings[::-1], 80), re.M)
    assert words == ["failure"] * 2 + ["warning"] * 6 + ["undecided"] * 2 + ["note"] * 3 + ["ok"] * 4


def test_it_is_colored_only_where_asked_or_on_a_terminal(findings, monkeypatch):
    assert "\x1b" not in findings_table(findings, 80)
    assert "\x1b[31;1m✕ failure\x1b[0m" in findings_table(findings, 80, color=True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\x1b" in findings_table(findings, 80)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in findings_table(findings, 80)


def test_names_cannot_speak_to_the_terminal():
    finding = Finding("a.b", Verdict.NOTE, "look\x1b[2J\nat this", site="x\x1b]0;title\x07/output")
    text = findings_table([finding], 80)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "x\\x1b]0;title\\x07/output" in text


def test_it_says_when_there_is_none():
    assert findings_table([], 80) == "no findings"


def test_findings_print_as_the_table_and_are_a_list(findings, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = Findings(findings)
    assert repr(shown) == str(shown) == findings_table(findings, 120)
    assert shown == findings
    assert repr(Findings()) == "no findings"


def test_a_notebook_shows_everything_and_trusts_no_name(findings):
    html = Findings(findings)._repr_html_()
    assert html.count("<tr>") == len(findings) + 1
    for finding in findings:
        if finding.verdict is not Verdict.OK:
            assert escape(finding.message) in html
            assert escape(finding.remedy) in html
    told = Findings([Finding("a.b", Verdict.NOTE, "<script>", site="<img>", remedy="<b>")])._repr_html_()
    assert not any(tag in told for tag in ("<script>", "<img>", "<b>"))
    assert Findings()._repr_html_() == "<p>no findings</p>"
