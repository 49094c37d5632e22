"""Files that somebody forged, checksums and all: refused at once and in words, or read without harm."""

import ast
import json
import pickle
import resource
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

import normscope as ns
from normscope.core.store import FILE_NAME, Store, checksum
from tests.core.test_store import write

OTHER = "has other tables, columns or views than a record"
TYPE = "holds a value of the wrong type"
SERIES = ["body.conv/output", "train", "value"]


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    store = Store(folder, "a", {"seed": 1})
    write(store)
    store.close()
    return (folder / FILE_NAME).read_bytes()


def forged(content, folder, *changes):
    """Write the record, changed by statements, or by rows (table, values) with their right checksum."""
    (folder / FILE_NAME).write_bytes(content)
    with closing(sqlite3.connect(folder / FILE_NAME)) as connection:
        for change in changes:
            if isinstance(change, str):
                connection.execute(change)
            else:
                table, *row = change
                places = ", ".join("?" * (len(row) + 1))
                connection.execute(f"INSERT OR REPLACE INTO {table} VALUES ({places})", (*row, checksum(row)))
        connection.commit()
    return folder


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT 'a' run, i step, 0 checksum FROM n"
HUGE = "message TEXT GENERATED ALWAYS AS (hex(zeroblob(400000000))) VIRTUAL"
SCHEMAS = {
    "view": ("ALTER TABLE steps RENAME TO others", "CREATE VIEW steps AS SELECT * FROM others"),
    "endless view": ("DROP TABLE events", f"CREATE VIEW events AS {ENDLESS}"),
    "huge view": ("DROP TABLE events", "CREATE VIEW events AS SELECT zeroblob(900000000) run, 1 step, 0 checksum"),
    "huge column": ("DROP TABLE events", f"CREATE TABLE events (run TEXT, step INTEGER, {HUGE}, checksum INTEGER)"),
    "trigger": ("CREATE TRIGGER t AFTER INSERT ON steps BEGIN DELETE FROM steps; END",),
    "index": ("CREATE INDEX i ON steps (abs(step))",),
    "fewer columns": ("ALTER TABLE events DROP COLUMN message",),
    "more columns": ("ALTER TABLE steps ADD COLUMN more DEFAULT 3",),
    "no table": ("DROP TABLE arrays",),
}
ROWS = {
    "layout no JSON": (("layouts", 0, "a", "nonsense"), "Expecting value"),
    "layout no list": (("layouts", 0, "a", "3"), "not iterable"),
    "layout a table": (("layouts", 0, "a", '{"a": 1}'), "not enough values"),
    "layout too deep": (("layouts", 0, "a", "[" * 200_000 + "]" * 200_000), "recursion"),
    "layout of numbers": (("layouts", 0, "a", "[[1, 2, 3, [4, 5]]]"), "no list of sites with names of statistics"),
    "layout of lists": (("layouts", 0, "a", "[[[], {}, 3, [{}]]]"), "no list of sites with names of statistics"),
    "layout of a text": (("layouts", 0, "a", json.dumps([[*SERIES, "mean"]])), "no list of sites with names"),
    "layout too short": (("layouts", 0, "a", json.dumps([[*SERIES, ["mean"]]])), "names 1 statistics, its rows hold 6"),
    "layout too long": (("layouts", 0, "a", json.dumps([[*SERIES, ["m"] * 50]])), "names 50 statistics, its rows hold"),
    "no layout": (("scalars", 7, 2, b"\0" * 12), "7"),
    "row of another length": (("scalars", 0, 2, b"\0" * 12), "cannot reshape"),
    "run a list": (("runs", "a", "[1]"), "no attribute"),
    "run without a name": (("runs", "a", "{}"), "'run'"),
    "run of another name": (("runs", "a", '{"run": "b"}'), "what is said of run 'a' is not what normscope writes"),
    "run at no time": (("runs", "a", '{"run": "a", "created": NaN}'), "what is said of run 'a'"),
    "run at a text": (("runs", "a", '{"run": "a", "closed": "x"}'), "must be real number"),
    "run of no segments": (("runs", "a", '{"run": "a", "segments": [3]}'), "no attribute"),
    "run of no structure": (("runs", "a", '{"run": "a", "structure": 3}'), "what is said of run 'a'"),
    "site a list": (("sites", "a", "x/output", "[1, 2]"), "no attribute"),
    "site in no order": (("sites", "a", "x/output", '{"order": "first"}'), "not supported"),
    "name of bytes": (("sites", "a", b"\xff\xfe", "{}"), TYPE),
    "array of a text": (("arrays", "a", "x/output", "train", "value", "mean", 1, "text"), TYPE),
    "array cut": (("arrays", "a", "x/output", "train", "value", "mean", 1, b"abc"), "multiple of element size"),
    "array too large": (("arrays", "a", "x/o", "train", "value", "mean", 1, b"\0" * 140_000_000), "too big"),
    "step a text": (("steps", "a", "many", 1, 1, 1.0, 1.0, 1.0, 0), TYPE),
    "step nothing": (("steps", "a", None, 1, 1, 1.0, 1.0, 1.0, 0), TYPE),
    "loss a text": (("steps", "a", 3, 1, 1, "low", 1.0, 1.0, 0), TYPE),
    "event nothing": (("events", "a", None, "note", "", ""), TYPE),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [*((changes, OTHER) for changes in SCHEMAS.values()), *(((row,), message) for row, message in ROWS.values())],
    ids=[*SCHEMAS, *ROWS],
)
def test_what_is_forged_is_refused_at_once_and_in_words(content, tmp_path, changes, message):
    folder = forged(content, tmp_path, *changes)
    most, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ns.StoreError, match=message) as error:
        ns.load(folder)
    assert time.monotonic() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 400_000  # kB
    assert str(folder / FILE_NAME) in str(error.value)


def test_a_site_cannot_pass_for_another(content, tmp_path):
    known = json.dumps({"run": "b", "site": ["x"], "module": "m"})
    record = ns.load(forged(content, tmp_path, ("sites", "a", "x/output", known)))
    assert record.sites[["run", "site"]].values.tolist()[-1] == ["a", "x/output"]


@pytest.mark.parametrize("wrong", [{"class": 7, "shape": "big", "norm": 4, "eps": "e"}, {"module": 3, "channels": {}}])
def test_a_site_of_nonsense_costs_no_page(content, tmp_path, wrong):
    record = ns.load(forged(content, tmp_path, ("sites", "a", "body.conv/output", json.dumps({"order": 0, **wrong}))))
    assert ns.write_report(record, ns.diagnose(record), tmp_path / "report.html").exists()


# ---- never unpickled -------------------------------------------------------------------------------------------------

LOADS = {"load", "loads", "Unpickler", "read_pickle", "from_file"}
FROM = {
    "pickle",
    "cPickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "torch",
    "np",
    "numpy",
    "pd",
    "pandas",
    "cloudpickle",
}


def unpickling(tree):
    """Find calls that may unpickle: pickle and its kin, torch.load without weights_only=True, numpy's allow_pickle."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in FROM and LOADS & {name.name for name in node.names}:
            yield node
        if isinstance(node, ast.Call):
            given = {key.arg: getattr(key.value, "value", None) for key in node.keywords}
            named = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
            if given.get("allow_pickle") not in (None, False):
                yield node
            elif named and node.func.value.id in FROM and node.func.attr in LOADS:
                safe = node.func.value.id in ("np", "numpy") or given.get("weights_only") is True
                if not safe:
                    yield node


def test_nothing_in_normscope_unpickles():
    files = list(Path(ns.__file__).parent.rglob("*.py"))
    assert len(files) > 100
    assert [(file, node.lineno) for file in files for node in unpickling(ast.parse(file.read_text()))] == []


@pytest.mark.parametrize(
    "code", ["pickle.load(f)", "torch.load(f)", "np.load(f, allow_pickle=True)", "from pickle import loads"]
)
def test_what_unpickles_is_seen(code):
    assert list(unpickling(ast.parse(code)))


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize("place", ["file", "blob", "text"])
def test_a_pickle_in_place_of_a_record_is_not_run(content, tmp_path, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trap = pickle.dumps(Trap(), protocol=0)
    if place == "file":
        (tmp_path / FILE_NAME).write_bytes(trap)
    elif place == "blob":
        padded = trap + b"." * (-len(trap) % 4)
        forged(content, tmp_path, ("arrays", "a", "body.conv/output", "train", "value", "mean", 1, padded))
    else:
        forged(content, tmp_path, ("runs", "a", trap.decode()))
    if place == "blob":
        assert len(ns.load(tmp_path).channels)
    else:
        with pytest.raises(ns.StoreError):
            ns.load(tmp_path)
    assert not Path("sprung").exists()
    pickle.loads(trap)
    assert Path("sprung").exists()  # it would have
