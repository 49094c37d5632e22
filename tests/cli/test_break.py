"""The demo broken on purpose: each defect has its finding, and a model that cannot have it is told so."""

import pytest

from normscope.cli import main
from normscope.diagnostics.explanation import explanations
from normscope.workbench import BREAKS


@pytest.mark.parametrize(
    ("model", "name"), [("cnn", "dead-units"), ("cnn", "evaluation-mode"), ("transformer", "missing-norm")]
)
def test_a_defect_is_found(model, name, tmp_path, capsys):
    steps = ("--steps", "40", "--out", str(tmp_path / "run"))
    assert main(["demo", "--model", model, "--break", name, *steps]) == 0
    text = capsys.readouterr().out
    assert f"broken on purpose: {BREAKS[name].text}" in text
    assert f"found  {BREAKS[name].text}: {BREAKS[name].findings[0]}, number 1 of" in text


def test_a_model_that_cannot_have_a_defect_is_told_what_can_break_it(capsys):
    assert main(["demo", "--model", "transformer", "--break", "momentum"]) == 1
    assert (
        "--break momentum needs --model cnn; --model transformer can be broken by eps, fast" in capsys.readouterr().err
    )


def test_every_defect_expects_a_finding_that_exists():
    known = explanations()
    assert len(BREAKS) >= 12
    assert all(id in known for item in BREAKS.values() for id in item.findings)
