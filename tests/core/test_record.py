import builtins

import numpy as np
import pandas as pd
import pytest

from normscope.core.errors import ArgumentError
from normscope.core.record import COLUMNS, join
from normscope.core.store import Store

STEPS = (0, 10, 20)
SITES = ("b.norm/output", "a.conv/output", "a.conv/weight")  # b runs first


def record(run="a", scale=1.0, widths=(2, 2, 2)):
    """Three sites, three steps; a value says where it comes from: 100 site + step + stat / 10."""
    store = Store(None, run, {"seed": 0})
    for number, site in enumerate(SITES):
        module, _, slot = site.partition("/")
        store.site(site, {"module": module, "call": 0, "slot": slot, "order": number})
        for step, width in zip(STEPS, widths, strict=True):
            values = scale * np.array([100 * number + step + 0.1, 100 * number + step + 0.2])
            store.scalars(step, site, "train", "value", ("rms", "rms.max"), values)
            store.array(step, site, "train", "value", "rms", np.full(width, step))
    store.scalars(10, SITES[0], "train", "gradient", ("rms",), np.array([7.0]))
    store.scalars(10, SITES[0], "population", "value", ("rms",), np.array([8.0]))
    for step in range(25):
        store.step({
            "step": step,
            "sampled": step in STEPS,
            "batch_size": 4,
            "loss": None,
            "loss_scale": None,
            "grad_norm": 1.0,
            "skipped": False,
        })
    store.commit()
    return store.record()


def test_frame_is_tidy_and_complete():
    frame = record().frame()
    assert tuple(frame) == COLUMNS
    assert len(frame) == 3 * 3 * 2 + 2
    row = frame[(frame["site"] == "a.conv/output") & (frame["step"] == 20) & (frame["stat"] == "rms.max")]
    assert row[["run", "phase", "role"]].values.tolist() == [["a", "train", "value"]]
    assert row["value"].tolist() == [np.float32(120.2)]
    channels = record(widths=(2, 3, 4)).frame(index=True)
    assert list(channels) == [*COLUMNS[:-1], "index", "value"]
    assert len(channels) == 3 * 9
    last = channels[(channels["site"] == "a.conv/weight") & (channels["step"] == 20)]
    assert last["index"].tolist() == [0, 1, 2, 3]
    assert last["value"].tolist() == [20] * 4


def test_an_empty_record():
    empty = Store(None, "a", {}).record()
    assert list(empty.frame()) == list(COLUMNS)
    assert len(empty.frame(index=True)) == 0
    assert empty.steps.tolist() == []
    assert repr(empty) == "Record('a': 0 steps, 0 sampled, 0 sites, 0 values)"
    assert len(empty.select("*").frame()) == 0
    assert empty.wide("rms").shape == (0, 0)
    with pytest.raises(ArgumentError, match=r"site='a/output' is unknown; Options: none"):
        empty.series("a/output", "rms")


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ({}, 20),
        ({"site": "a.*"}, 12),
        ({"site": "*/output"}, 14),
        ({"site": "b.norm/output", "stat": "rms"}, 5),
        ({"stat": "rms*"}, 20),
        ({"stat": "rms.max"}, 9),
        ({"role": "gradient"}, 1),
        ({"phase": "population"}, 1),
        ({"run": "other"}, 0),
        ({"steps": (0, 10)}, 14),
        ({"steps": (1, 9)}, 0),
        ({"steps": (20, 20)}, 6),
    ],
)
def test_select(how, count):
    part = record().select(**how)
    assert len(part.frame()) == count
    assert len(part.context) == 25
    assert all(len(block.steps) for block in part.blocks)


def test_select_takes_channels_along():
    part = record().select("a.*", stat="rms", steps=(10, 20))
    assert [(item.site, item.steps.tolist()) for item in part.channels] == [
        ("a.conv/output", [10, 20]),
        ("a.conv/weight", [10, 20]),
    ]
    assert [value.tolist() for value in part.channels[0].values] == [[10, 10], [20, 20]]


@pytest.mark.parametrize("steps", [(3, 1), (1,), (1, 2, 3)])
def test_select_refuses_what_is_no_range(steps):
    with pytest.raises(ArgumentError, match=r"steps=.* must be \(first, last\)"):
        record().select(steps=steps)


def test_series():
    series = record().series("a.conv/output", "rms")
    assert series.index.tolist() == list(STEPS)
    assert series.tolist() == [np.float32(v) for v in (100.1, 110.1, 120.1)]
    assert record().series("b.norm/output", "rms", role="gradient").to_dict() == {10: 7.0}
    assert record().series("b.norm/output", "rms", phase="population").to_dict() == {10: 8.0}
    assert record().series("a.conv/output", "rms", role="update").empty
    with pytest.raises(ArgumentError, match="stat='rsm' is unknown; did you mean 'rms'"):
        record().series("a.conv/output", "rsm")
    with pytest.raises(ArgumentError, match=r"site='a.conv/outputs' is unknown; did you mean 'a.conv/output'"):
        record().series("a.conv/outputs", "rms")


def test_array():
    steps, values = record().array("a.conv/weight", "rms")
    assert steps.tolist() == list(STEPS)
    assert values.tolist() == [[0, 0], [10, 10], [20, 20]]
    assert record().array("a.conv/weight", "mean")[1].size == 0
    with pytest.raises(ArgumentError, match="changed its number of channels"):
        record(widths=(2, 3, 4)).array("a.conv/weight", "rms")


def test_wide_is_in_the_order_of_execution():
    wide = record().wide("rms")
    assert list(wide) == ["b.norm/output", "a.conv/output"]
    assert wide.index.tolist() == list(STEPS)
    assert list(record().wide("rms", slot="weight")) == ["a.conv/weight"]
    assert list(record().wide("rms", role="gradient")) == ["b.norm/output"]


def test_a_statistic_that_was_not_recorded_names_those_that_were():
    assert record().stats == ("rms", "rms.max")
    with pytest.raises(ArgumentError, match=r"stat='rsm' is unknown; did you mean 'rms'"):
        record().wide("rsm")


def test_a_notebook_shows_what_was_recorded_where():
    html = record("a<b")._repr_html_()
    assert "<td>train</td><td>output</td><td>value</td><td>rms, rms.max</td>" in html
    assert "a&lt;b" in html
    assert "a<b" not in html


def test_join_and_runs():
    both = join([record("a"), record("b", scale=2.0)])
    assert both.names == ("a", "b")
    assert both.series("a.conv/output", "rms", run="b").tolist() == [np.float32(2 * v) for v in (100.1, 110.1, 120.1)]
    assert len(both.select(run="b").frame()) == len(record().frame())
    assert both.steps.tolist() == list(STEPS)
    with pytest.raises(ArgumentError, match="two runs have the same name"):
        join([record("a"), record("a")])
    with pytest.raises(ArgumentError, match=r"run=None is unknown.*Options: a, b"):
        both.series("a.conv/output", "rms")


def test_a_record_is_immutable():
    one = record()
    with pytest.raises(AttributeError):
        one.blocks = ()
    with pytest.raises(ValueError, match="read-only"):
        one.blocks[0].values[0, 0] = 1


def test_csv_holds_every_value_exactly(tmp_path):
    one = record()
    read = pd.read_csv(one.to_csv(tmp_path / "a.csv"))
    assert list(read) == list(COLUMNS)
    assert read["value"].astype(np.float32).tolist() == one.frame()["value"].tolist()
    assert read[["site", "stat"]].values.tolist() == one.frame()[["site", "stat"]].astype(str).values.tolist()


def test_parquet_says_what_it_needs(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name.partition(".")[0] in ("pyarrow", "fastparquet"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ArgumentError, match="needs pyarrow: pip install pyarrow, or use to_csv"):
        record().to_parquet(tmp_path / "a.parquet")
