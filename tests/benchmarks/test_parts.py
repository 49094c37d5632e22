"""The clock of parts.py: every part that runs has a time, the parts are what hooks call, and all is put back."""

import pytest

from tests.benchmarks import parts

SILENT = {"attention"}  # of a perceptron


@pytest.mark.parametrize("setting", parts.SETTINGS)
def test_each_part_has_its_time_and_what_it_reads(setting, monkeypatch):
    monkeypatch.setattr(parts, "DENSE", 1)
    before = [getattr(owner, name) for some in parts.PARTS.values() for owner, name, _ in some]
    rows = {row["part"]: row for row in parts.measure("mlp", setting, 2)}
    assert [getattr(owner, name) for some in parts.PARTS.values() for owner, name, _ in some] == before
    assert rows.keys() == parts.PARTS.keys()
    assert rows["moments of activations and gradients"]["MB"] == pytest.approx(9.5, abs=0.1)
    assert all(0 <= row["ms"] < 1000 for row in rows.values())
    if "all probes" in setting:
        assert all(row["ms"] > 0 for name, row in rows.items() if name not in SILENT)
        assert rows["norms of parameter gradients"]["MB"] == pytest.approx(4.53, abs=0.01)  # 1.13 million weights
        assert 0.1 < rows["flight recorder, around the step"]["MB"] < 1
