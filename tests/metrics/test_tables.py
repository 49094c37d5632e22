import numpy as np
import pandas as pd
import pytest

from normscope.core.estimate import Status
from normscope.core.record import Record, join
from normscope.core.store import Store
from normscope.metrics import tables
from tests.metrics.records import Network

EMPTY = Record((), pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), (), ())


def test_a_table_is_in_order_of_execution_and_agrees_with_the_record():
    record = Network(layers=2).record()
    table = tables.table(record, "rms")
    assert list(table) == [site for site in record.sites["site"] if site.endswith("/output")]
    np.testing.assert_array_equal(table["head/output"], record.series("head/output", "rms"))


def test_statistics_that_came_in_two_sets_are_one_series():
    store = Store(None, "a", {})
    store.site("l/output", {"module": "l"})
    store.scalars(0, "l/output", "train", "value", ("rms",), np.array([1.0]))
    store.scalars(10, "l/output", "train", "value", ("rms", "var"), np.array([2.0, 4.0]))
    store.commit()
    record = store.record()
    assert tables.table(record, "rms")["l/output"].to_dict() == {0: 1.0, 10: 2.0}
    assert tables.table(record, "var")["l/output"].to_dict() == {10: 4.0}


def test_sites_without_order_keep_the_order_in_which_they_came():
    store = Store(None, "a", {})
    for site in ("z/output", "a/output"):
        store.site(site, {})
        store.scalars(0, site, "train", "value", ("rms",), np.array([1.0]))
    store.commit()
    record = store.record()
    assert list(tables.table(record, "rms")) == ["z/output", "a/output"]
    assert tables.attributes(record)["module"].tolist() == ["z", "a"]


def test_a_shared_module_is_one_layer_with_two_calls():
    network = Network(layers=1)
    network.extra_sites["l0.norm#1/output"] = {"class": "BatchNorm1d", "norm": "batch"}
    layers = tables.layers(network.record())
    assert layers.loc["l0.norm", "calls"] == 2
    assert layers.loc["l0.linear", "calls"] == 1
    assert layers.loc["l0.norm", "eps"] == pytest.approx(1e-5)


def test_channels_of_another_width_are_left_out():
    network = Network(layers=1)
    network.arrays["l0.act/output", "value", "rms"] = lambda step: np.ones(4 if step < 50 else 6)
    steps, values = tables.arrays(network.record(), "rms")["l0.act/output"]
    assert steps.tolist() == [50, 60, 70, 80, 90]
    assert values.shape == (5, 6)


def test_the_context_has_one_row_a_step_whatever_the_groups():
    record = Network().record()
    assert len(record.context) > 91
    frame = tables.context(record)
    assert frame.index.tolist() == list(range(91))
    assert frame["skipped"].dtype == bool


def test_late_medians_are_those_of_numpy_and_ignore_what_is_not_finite():
    values = np.random.default_rng(0).normal(size=40)
    frame = pd.DataFrame({"a": values, "b": np.full(40, np.nan), "c": np.where(np.arange(40) < 38, values, np.inf)})
    result = tables.late_medians(frame).set_index("site")
    assert result.loc["a", "value"] == pytest.approx(np.median(values[30:]))
    assert result.loc["a", "standard_error"] == pytest.approx(1.2533 * values[30:].std(ddof=1) / 10**0.5)
    assert result.loc["b", "status"] is Status.NOT_RECORDED
    assert result.loc["c", "value"] == pytest.approx(np.median(values[29:38]))


def test_the_error_of_a_median_is_right():
    draws = np.random.default_rng(1).normal(size=(400, 4000)).T
    estimate = tables.late_medians(pd.DataFrame(draws[:, :200]))
    spread = np.median(draws[3000:, 200:], axis=0).std()
    assert estimate["standard_error"].mean() == pytest.approx(spread, rel=0.15)


def test_runs_are_split():
    joined = join([Network(run="a").record(), Network(run="b", layers=3).record()])
    first, second = tables.split(joined)
    assert first.names == ("a",)
    assert len(second.sites) < len(first.sites)
    assert {block.run for block in second.blocks} == {"b"}
    assert set(second.context["run"]) == {"b"}


def test_an_empty_record_gives_empty_tables():
    assert tables.split(EMPTY) == [EMPTY]
    assert not len(tables.attributes(EMPTY))
    assert not len(tables.layers(EMPTY))
    assert not len(tables.table(EMPTY, "rms"))
    assert tables.arrays(EMPTY, "rms") == {}
    assert not len(tables.context(EMPTY))
    assert not len(tables.late_medians(tables.table(EMPTY, "rms")))
    assert tables.onset(pd.Series([], dtype=bool)) is None


@pytest.mark.parametrize(
    ("exceeds", "step"), [([True, True], 0), ([True, False], None), ([False, True, True], 1), ([True, False, True], 2)]
)
def test_onset(exceeds, step):
    assert tables.onset(pd.Series(exceeds)) == step
