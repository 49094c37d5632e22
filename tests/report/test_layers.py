"""The table of layers."""

import math

import numpy as np
import pytest

from normscope.core.store import Store
from normscope.report.layers import COLUMNS, layers
from tests.report.records import Run


def cells(layer):
    return dict(zip((name for name, _ in COLUMNS), layer.cells, strict=True))


def test_a_row_says_what_is_known_of_a_layer():
    record = Run(12, 8).record()
    rows = {layer.site: cells(layer) for layer in layers(record)}
    assert list(rows) == [site for site in record.sites["site"] if site.endswith("/output") and site != "/output"]
    norm, conv = rows["stem.bn/output"], rows["stem.conv/output"]
    assert (norm["class"].text, norm["norm"].text, norm["eps"].value, norm["momentum"].value) == (
        "BatchNorm2d",
        "batch",
        1e-5,
        0.1,
    )
    assert conv["shape"].text == "128 × 32 × 32 × 32"
    assert conv["parameters"].value == 32 * 32 * 3 * 3
    assert conv["last rms"].value == pytest.approx(record.series("stem.conv/output", "rms").iloc[-1])
    assert conv["gradient rms"].value == pytest.approx(
        record.series("stem.conv/output", "rms", role="gradient").iloc[-1]
    )
    assert rows["head/output"]["last rms"].text == "NaN"
    assert rows["head/output"]["last rms"].value == math.inf  # sorted to the end


def test_what_is_not_known_is_left_empty():
    store = Store(None, "a", {})
    store.site("m/output", {"class": "Odd"})
    store.site(
        "bn/output", {"class": "BatchNorm1d", "norm": "batch", "has_running": True, "momentum": None, "groups": 4}
    )
    store.scalars(3, "m/output", "train", "value", ("rms",), np.array([2.0]))
    store.commit()
    rows = {layer.site: cells(layer) for layer in layers(store.record())}
    assert [cell.text for cell in rows["m/output"].values()] == ["Odd", "", "", "", "", "", "2", "", "", ""]
    assert rows["bn/output"]["momentum"].text == "cumulative"
    assert rows["bn/output"]["norm"].text == "batch (4 groups)"
