"""The maps of layers by steps and how they are packed."""

import base64

import numpy as np
import pytest

from normscope.core.store import Store
from normscope.report.maps import BAND_CELLS, CELLS, maps, payload
from tests.report.records import Run


@pytest.fixture(scope="module")
def record():
    return Run(12, 40).record()


def decoded(packed, key):
    return np.frombuffer(base64.b64decode(packed.data[key]), "<f4")


def test_maps_hold_what_was_recorded_in_order_of_execution(record):
    found = {(m.quantity, m.stat.name, m.phase): m for m in maps(record)}
    drift = found["running statistics", "drift", "train"]
    assert drift.sites == tuple(site for site in record.sites["site"] if site.endswith("/running"))
    for row, site in enumerate(drift.sites):
        assert drift.values[row] == pytest.approx(record.series(site, "drift").to_numpy())
        assert drift.bands[2, row] == pytest.approx(record.series(site, "drift.max").to_numpy())
    held = found["activations", "rms", "population"]
    assert set(held.sites) == {site.replace("/running", "/output") for site in drift.sites}
    assert held.steps.tolist() == record.series(held.sites[0], "rms", phase="population").index.tolist()
    assert found["updates of parameters", "norm", "train"].sites[0] == "stem.conv/weight"


def test_what_was_nan_is_told_from_what_was_not_measured():
    store = Store(None, "a", {})
    store.site("m/output", {})
    store.site("n/output", {})
    for step, value in ((0, 1.0), (1, np.nan), (2, np.inf)):
        store.scalars(step, "m/output", "train", "value", ("rms", "kurtosis"), np.array([value, value]))
    store.scalars(0, "n/output", "train", "value", ("rms",), np.array([2.0]))
    store.commit()
    rms, kurtosis = maps(store.record())
    assert rms.values.tolist()[0] == [1.0, np.inf, np.inf]
    assert np.isnan(rms.values[1]).tolist() == [False, True, True]
    assert np.isnan(kurtosis.values[0]).tolist() == [False, True, False]  # of a constant there is no kurtosis


def test_there_is_no_band_where_the_value_itself_broke():
    store = Store(None, "a", {})
    store.site("m/output", {})
    stats = ("rms", "rms.min", "rms.q50", "rms.max")
    store.scalars(0, "m/output", "train", "value", stats, np.array([2.0, 1.0, 2.0, 3.0]))
    store.scalars(1, "m/output", "train", "value", stats, np.array([np.nan, 1.0, 1e13, 1e14]))
    store.commit()
    [rms] = maps(store.record())
    assert rms.bands[:, 0, 0].tolist() == [1, 2, 3]
    assert np.isnan(rms.bands[:, 0, 1]).all()


def test_blocks_of_one_site_with_other_statistics_are_joined():
    store = Store(None, "a", {})
    store.site("m/output", {})
    store.scalars(0, "m/output", "train", "value", ("rms",), np.array([1.0]))
    store.scalars(1, "m/output", "train", "value", ("rms", "dead"), np.array([2.0, 0.5]))
    store.commit()
    found = {m.stat.name: m for m in maps(store.record())}
    assert found["rms"].values.tolist() == [[1.0, 2.0]]
    assert found["dead"].steps.tolist() == [1]


def test_a_short_run_is_packed_whole(record):
    found = maps(record)
    packed = payload(found)
    for item, entry in zip(found, packed.maps, strict=True):
        if entry["constant"] is None:
            assert not entry["paired"]
            assert packed.axes[entry["axis"]] == item.steps.tolist()
            assert decoded(packed, entry["data"]) == pytest.approx(item.values.ravel(), nan_ok=True)
        assert [packed.sites[i] for i in entry["rows"]] == list(item.sites)


def test_a_long_run_is_thinned_to_its_extremes_within_the_budget():
    found = maps(Run(20, 1500).record())
    packed = payload(found)
    cells = sum(len(decoded(packed, key)) for key in packed.data)
    assert cells <= CELLS + BAND_CELLS
    for item, entry in zip(found, packed.maps, strict=True):
        if entry["constant"] is None and len(item.steps) > 600:
            values = decoded(packed, entry["data"]).reshape(len(item.sites), -1)
            assert entry["paired"]
            assert values.shape[1] == len(packed.axes[entry["axis"]]) <= 600
            assert np.nanmax(values, axis=1).tolist() == np.nanmax(item.values, axis=1).tolist()
            assert np.nanmin(values, axis=1).tolist() == np.nanmin(item.values, axis=1).tolist()
            assert np.isinf(values).any(axis=1).tolist() == np.isinf(item.values).any(axis=1).tolist()


def test_very_many_layers_have_no_bands_rather_than_a_large_page():
    packed = payload(maps(Run(150, 30).record()))
    assert all(entry.get("bands") is None for entry in packed.maps)
    assert sum(len(decoded(packed, key)) for key in packed.data) <= CELLS


def test_a_map_of_one_value_carries_it_instead_of_data(record):
    entries = {(e["quantity"], e["stat"]): e for e in payload(maps(record)).maps if e["phase"] == "train"}
    assert entries["gradients of activations", "nonfinite"]["constant"] == 0.0
    assert "data" not in entries["gradients of activations", "nonfinite"]
    assert entries["activations", "nonfinite"]["constant"] is None
