"""Every figure runs, is judged and drawn, in its fast setting with one seed."""

import json

import pandas as pd
import pytest

from analyses import SCRIPTS
from analyses.__main__ import main


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fast")
    assert main(["all", "--fast", "--jobs", "2", "--seeds", "1", "--out", str(folder)]) == 0
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("id", SCRIPTS)
def test_a_figure_runs_in_its_fast_setting(out, id):
    frame = pd.read_csv(out / id / "data.csv")
    assert tuple(frame.columns) == ("seed", *SCRIPTS[id].COLUMNS)
    assert len(frame)
    claims = json.loads((out / id / "claims.json").read_text())["claims"]
    assert claims
    assert {claim["seeds"] for claim in claims} == {1}
    assert (out / id / "figure.png").stat().st_size > 10_000
    assert f"### {id}. {SCRIPTS[id].TITLE}" in (out / "README.md").read_text()
