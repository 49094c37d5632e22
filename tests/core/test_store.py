import multiprocessing
import random
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from normscope.core.errors import ArgumentError, StoreError
from normscope.core.reading import load
from normscope.core.store import FILE_NAME, Store, check_run, run_exists

SITES = ("body.conv/output", "body.norm/output", "body.norm/running")


def write(store, steps=8, first=0):
    """Write a small run; every commit is one step."""
    random_numbers = np.random.default_rng(first)
    if not first:
        for order, site in enumerate(SITES):
            module, _, slot = site.partition("/")
            store.site(site, {"module": module, "call": 0, "slot": slot, "order": order, "shape": [4, 3], "eps": 1e-5})
    for step in range(first, first + steps):
        for site in SITES:
            store.scalars(step, site, "train", "value", ("mean", "var"), random_numbers.normal(size=2))
            store.array(step, site, "train", "value", "mean", random_numbers.normal(size=3))
        loss = float(random_numbers.normal())
        store.step(context(step, loss=loss, grad_norm=float("inf") if step == 3 else 2.0, skipped=step == 3))
        for group in range(2):
            store.group({"step": step, "optimizer": "SGD", "group": group, "lr": 0.1, "momentum": 0.9, "decay": None})
        store.commit()
    store.event(first, "note", SITES[0], "Grüße, 層")
    store.commit()


def context(step, **others):
    row = {
        "step": step,
        "sampled": True,
        "batch_size": 4,
        "loss": 1.0,
        "loss_scale": None,
        "grad_norm": 2.0,
        "skipped": False,
    }
    return row | others


def differs(one, other):
    """Name the parts in which two records differ."""
    frames = {
        "frame": (one.frame(), other.frame()),
        "arrays": (one.frame(index=True), other.frame(index=True)),
        "sites": (one.sites, other.sites),
        "context": (one.context, other.context),
        "events": (one.events, other.events),
    }
    found = [
        name for name, (a, b) in frames.items() if list(a) != list(b) or not a.astype(object).equals(b.astype(object))
    ]
    return found + (["runs"] if one.runs != other.runs else [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its folder and its file's bytes."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    store = Store(folder, "a", {"seed": 1, "versions": {"torch": "2"}})
    write(store)
    store.close()
    return folder, (folder / FILE_NAME).read_bytes()


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_was_written_is_read(tmp_path, in_memory):
    store = Store(None if in_memory else tmp_path / "new" / "a", "a", {"seed": 1})
    values = np.array([0.5, np.nan, -np.inf])
    store.site("m/output", {"module": "m", "shape": [2, 3], "norm": None})
    store.scalars(0, "m/output", "train", "value", ("mean", "var", "rms"), values)
    store.scalars(2, "m/output", "train", "value", ("mean", "var", "rms"), values + 1)
    store.scalars(2, "m/output", "train", "gradient", ("mean",), np.array([7.0]))
    store.array(0, "m/output", "train", "value", "mean", np.arange(5))
    store.step(context(0, loss=0.1, batch_size=np.nan))
    store.step(context(1, sampled=False, loss=None, grad_norm=np.inf, loss_scale=8.0, skipped=True))
    store.group({"step": 0, "optimizer": "SGD", "group": 0, "lr": 1, "momentum": None, "decay": 0.5})
    store.event(1, "note", "m/output", "text")
    store.commit()
    record = store.record()
    store.close()
    if not in_memory:
        assert differs(load(tmp_path / "new" / "a"), record) == []
        assert [p.name for p in (tmp_path / "new" / "a").iterdir()] == [FILE_NAME]
    assert record.runs[0]["seed"] == 1
    assert record.runs[0]["created"] == pytest.approx(time.time(), abs=60)
    assert record.sites.to_dict("records") == [
        {"run": "a", "site": "m/output", "module": "m", "shape": [2, 3], "norm": None}
    ]
    value, gradient = sorted(record.blocks, key=lambda block: block.role, reverse=True)
    assert value.stats == ("mean", "var", "rms")
    assert value.steps.tolist() == [0, 2]
    np.testing.assert_array_equal(value.values, np.array([values, values + 1], np.float32))
    assert gradient.values.tolist() == [[7.0]]
    assert record.channels[0].values[0].tolist() == [0, 1, 2, 3, 4]
    rows = record.context
    assert rows["step"].tolist() == [0, 1]
    assert rows["sampled"].tolist() == [True, False]
    assert rows["skipped"].tolist() == [False, True]
    assert rows["loss"].tolist()[0] == 0.1
    assert np.isnan(rows["loss"][1])
    assert np.isnan(rows["batch_size"][0])
    assert rows["grad_norm"].tolist() == [2.0, np.inf]
    assert rows["lr"][0] == 1
    assert np.isnan(rows["lr"][1])
    assert record.events.to_dict("records") == [
        {"run": "a", "step": 1, "kind": "note", "site": "m/output", "message": "text"}
    ]


def test_a_later_row_replaces_an_earlier_one():
    store = Store(None, "a", {})
    store.site("m/output", {"note": "first"})
    store.step(context(0, loss=1.0))
    store.commit()
    store.site("m/output", {"note": "second"})
    store.step(context(0, loss=2.0))
    store.scalars(0, "m/output", "train", "value", ("mean",), np.array([1.0]))
    store.scalars(0, "m/output", "train", "value", ("mean",), np.array([2.0]))
    store.commit()
    record = store.record()
    assert record.sites["note"].tolist() == ["second"]
    assert record.context["loss"].tolist() == [2.0]
    assert record.blocks[0].values.tolist() == [[2.0]]


def test_uncommitted_rows_are_not_in_the_record():
    store = Store(None, "a", {})
    store.step(context(0))
    assert len(store.record().context) == 0
    assert store.waiting == 1
    store.commit()
    assert len(store.record().context) == 1
    assert store.waiting == 0


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_an_existing_run_is_not_overwritten(finished):
    folder, data = finished
    assert run_exists(folder)
    with pytest.raises(StoreError, match="holds a run already; choose another folder"):
        Store(folder, "a", {})
    assert (folder / FILE_NAME).read_bytes() == data


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(StoreError, match="cannot be created"):
        Store(tmp_path / "file", "a", {})
    with pytest.raises(StoreError, match="cannot be created"):
        Store(tmp_path / "file" / "below", "a", {})
    with pytest.raises(StoreError, match="not a normscope record"):
        load(tmp_path / "file")


def test_a_folder_that_cannot_be_made():
    with pytest.raises(StoreError, match="cannot be created"):
        Store("/proc/normscope/a", "a", {})


@pytest.mark.parametrize("run", ["", 3, ["a"], True])
def test_a_run_that_is_no_path(run):
    with pytest.raises(ArgumentError, match="must be a folder for the record"):
        check_run(run)


def test_nothing_there(tmp_path):
    with pytest.raises(StoreError, match=r"holds no run: .* does not exist"):
        load(tmp_path)


def test_another_schema_version_is_refused(finished, tmp_path):
    changed = copy_of(finished, tmp_path, "PRAGMA user_version = 999")
    with pytest.raises(StoreError, match="schema version 999; this normscope reads"):
        load(changed)


def test_another_database_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    connection = sqlite3.connect(tmp_path / "a" / FILE_NAME)
    connection.execute("CREATE TABLE runs (run TEXT)")
    connection.close()
    with pytest.raises(StoreError, match="is a database, but not a normscope record"):
        load(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", b"no database at all", b"\0" * 8192], ids=["empty", "text", "zeros"])
def test_what_is_no_database_is_refused(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(StoreError):
        load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE steps SET loss = 0.5 WHERE step = 2",
        "UPDATE steps SET skipped = 1 WHERE step = 2",
        "UPDATE groups SET lr = 1.0",
        "UPDATE sites SET attributes = '{}'",
        "UPDATE runs SET provenance = '{}'",
        "UPDATE events SET message = 'all is well'",
        'UPDATE layouts SET keys = replace(keys, \'"mean", "var"\', \'"var", "mean"\')',
        "UPDATE scalars SET step = step + 100 WHERE layout = 0",
        "UPDATE arrays SET data = zeroblob(12)",
        "UPDATE arrays SET data = 'text'",
        "DELETE FROM runs",
        "DELETE FROM layouts",
    ],
)
def test_a_changed_row_is_refused(finished, tmp_path, change):
    with pytest.raises(StoreError, match="damaged"):
        load(copy_of(finished, tmp_path, change))


def copy_of(finished, folder, change=None, data=None):
    """Copy the finished run, changed by a statement or with other bytes."""
    (folder / FILE_NAME).write_bytes(finished[1] if data is None else data)
    if change:
        connection = sqlite3.connect(folder / FILE_NAME)
        connection.execute(change)
        connection.commit()
        connection.close()
    return folder


def test_flipped_bits_are_refused_or_without_effect(finished, tmp_path):
    """Flip single bits anywhere, half of them where the file holds content: never garbage, never another error."""
    data = finished[1]
    true = load(finished[0])
    filled = [i for i, byte in enumerate(data) if byte]
    places = random.Random(0)
    refused = 0
    for n in range(300):
        broken = bytearray(data)
        broken[places.choice(filled) if n % 2 else places.randrange(len(data))] ^= 1 << places.randrange(8)
        try:
            found = load(copy_of(finished, tmp_path, data=bytes(broken)))
        except StoreError:
            refused += 1
        else:
            assert differs(found, true) == [], f"flip {n} changed the record unnoticed"
    assert refused > 60


def test_truncated_files_are_refused_or_without_effect(finished, tmp_path):
    data = finished[1]
    true = load(finished[0])
    sizes = [*range(0, len(data), 4096), *random.Random(1).sample(range(len(data)), 40), len(data) - 1]
    for size in sizes:
        try:
            found = load(copy_of(finished, tmp_path, data=data[:size]))
        except StoreError:
            continue
        assert differs(found, true) == [], f"{size} of {len(data)} bytes were read as another record"


# ---- the disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "obstacle", ["PRAGMA max_page_count = 20", "PRAGMA query_only = ON"], ids=["full", "read-only"]
)
def test_rows_wait_while_the_disk_refuses_them(tmp_path, obstacle):
    store = Store(tmp_path / "a", "a", {})
    write(store, steps=1)
    store._connection.execute(obstacle)
    for step in range(1, 40):
        store.step(context(step))
        store.array(step, SITES[0], "train", "value", "mean", np.full(500, step))
    with pytest.raises(StoreError, match="78 rows wait to be written"):
        store.commit()
    assert load(tmp_path / "a").context["step"].unique().tolist() == [0]
    store._connection.execute("PRAGMA max_page_count = 100000")
    store._connection.execute("PRAGMA query_only = OFF")
    store.commit()
    store.close()
    record = load(tmp_path / "a")
    assert record.context["step"].unique().tolist() == list(range(40))
    assert max(item.steps[-1] for item in record.channels) == 39


def test_dropped_rows_leave_a_record_that_goes_on(tmp_path):
    store = Store(tmp_path / "a", "a", {})
    store.scalars(0, "m/output", "train", "value", ("mean",), np.array([1.0]))
    store.commit()
    store._connection.execute("PRAGMA query_only = ON")
    store.scalars(1, "m/output", "train", "value", ("mean",), np.array([2.0]))
    store.scalars(1, "n/output", "train", "value", ("mean",), np.array([3.0]))
    with pytest.raises(StoreError, match="2 rows wait"):
        store.commit()
    store.drop_waiting()
    store._connection.execute("PRAGMA query_only = OFF")
    store.scalars(2, "n/output", "train", "value", ("mean",), np.array([4.0]))
    store.scalars(2, "o/output", "train", "value", ("mean",), np.array([5.0]))
    store.commit()
    store.close()
    values = load(tmp_path / "a").frame()
    assert values[["site", "step", "value"]].values.tolist() == [
        ["m/output", 0, 1.0],
        ["n/output", 2, 4.0],
        ["o/output", 2, 5.0],
    ]


def test_reading_while_another_process_writes(tmp_path):
    program = (
        "import sys; from tests.core.test_store import Store, write\n"
        f"store = Store({str(tmp_path / 'a')!r}, 'a', {{}})\n"
        "write(store, 1); print('ready', flush=True)\n"
        "for first in range(1, 120): write(store, 1, first)\n"
        "print('written', flush=True); sys.stdin.read(); store.close()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "ready\n"
        seen = []
        while writer.poll() is None and (not seen or seen[-1] < 119):
            record = load(tmp_path / "a")
            steps = record.context["step"].unique()
            assert steps.tolist() == list(range(len(steps)))  # no gap: whole steps only
            assert {len(block.steps) for block in record.blocks} == {len(steps)}
            seen.append(int(steps[-1]))
        assert seen == sorted(seen)
        assert len(set(seen)) > 1
        writer.communicate("", timeout=60)
    assert load(tmp_path / "a").context["step"].max() == 119


def test_a_reader_does_not_keep_the_writer_from_closing(tmp_path):
    store = Store(tmp_path / "a", "a", {})
    write(store)
    reader = sqlite3.connect(tmp_path / "a" / FILE_NAME)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM steps").fetchone()
    store.close()
    reader.close()
    assert len(load(tmp_path / "a").steps) == 8


def begin(folders, barrier, answers):
    """Begin the same runs as other processes, each at the same moment; answer which were refused."""
    refused = []
    for folder in folders:
        barrier.wait(30)
        try:
            Store(folder, "a", {}).close()
        except StoreError as error:
            refused.append((folder.name, "holds a run already" in str(error)))
    answers.put(refused)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_of_processes_that_begin_the_same_run_at_once_one_does_and_its_file_stays(tmp_path):
    system = multiprocessing.get_context("fork")
    folders, barrier, answers = [tmp_path / str(i) for i in range(40)], system.Barrier(4), system.Queue()
    children = [system.Process(target=begin, args=(folders, barrier, answers), daemon=True) for _ in range(4)]
    for child in children:
        child.start()
    refused = [name for _ in children for name in answers.get(timeout=60)]
    for child in children:
        child.join(60)
    assert sorted(refused) == sorted((folder.name, True) for folder in folders for _ in range(3))
    assert all(load(folder).names == ("a",) for folder in folders)
