"""The comparison as tables, figures, page and files, from trials written down by hand."""

import math
import re
import subprocess
import sys

import pytest

from normscope.core.errors import ArgumentError, StoreError
from normscope.metrics.trial import Trial
from normscope.report.comparison import Comparison
from normscope.report.grid import FORMATS, Cell, Grid, cell

MIB = 2**20


def trial(entry, rate, seed, loss, **changes):
    facts = {
        "metrics": {"test_loss": loss, "test_accuracy": 1 - loss},
        "measured": {"initial_loss": 2.0, "final_loss": loss, "kappa": 10.0, "throughput": 5.0, "memory": MIB},
        "curve": ((0.0, 2.0), (5.0, loss)),
        "profile": (("a/input", math.nan), ("b/input", 10.0), ("c/input", 20.0 + seed)),
        "findings": (("scale.decay", "warning", "a <b> & c"),) if entry == "x & y_1" else (),
    }
    return Trial(entry, rate, seed, **facts | changes)


def made(**changes):
    trials = [
        trial(entry, rate, seed, loss + rate + seed / 1000)
        for entry, loss in (("bn", 0.10), ("x & y_1", 0.30))
        for rate in (0.01, 0.1)
        for seed in (0, 1, 2)
    ]
    trials += [Trial("gone", 0.1, seed, "ValueError: no <input>") for seed in (0, 1, 2)]
    facts = {"entries": ("bn", "x & y_1", "gone"), "trials": tuple(trials), "select": "test_loss"}
    return Comparison(**facts | changes)


CELLS = [
    ((0.93421, 0.9211, 0.9473, False), Cell("0.934", "0.013")),
    ((12345.0, 11000.0, 13690.0, True), Cell("12300", "1300", True)),
    ((3.0, 3.0, 3.0, False), Cell("3")),
    ((0.25, math.nan, math.nan, False), Cell("0.25")),
    ((math.nan, math.nan, math.nan, False), Cell("–")),
    ((math.inf, math.nan, math.nan, False), Cell("∞")),
    ((-0.5, -0.6, -0.4, False), Cell("-0.50", "0.10")),
    ((1e-9, 0.9e-9, 1.1e-9, False), Cell("1e-9", "1.0e-10")),
]


@pytest.mark.parametrize(("numbers", "expected"), CELLS, ids=[str(numbers) for numbers, _ in CELLS])
def test_a_mean_and_its_error_are_rounded_alike(numbers, expected):
    assert cell(*numbers) == expected


GRID = Grid(
    heads=(("lr", ""), ("loss κ₅₀", "lower")),
    readings=("rate", "the loss"),
    rows=(("a_b", (Cell("0.1"), Cell("0.20", "0.01", True))), ("c|d", (Cell("–"), Cell("0.5")))),
    notes=("100 % sure.",),
)


def test_latex_is_a_booktabs_table_with_bold_means_alone():
    assert FORMATS["latex"](GRID).splitlines() == [
        r"% needs \usepackage{booktabs}",
        "% 100 % sure.",
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r" & lr & loss $\kappa$$_{50}$ $\downarrow$ \\",
        r"\midrule",
        r"a\_b & 0.1 & \textbf{0.20} $\pm$ 0.01 \\",
        r"c|d & -- & 0.5 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_markdown_and_text_and_html_say_the_same():
    assert FORMATS["markdown"](GRID).splitlines() == [
        "| entry | lr | loss κ₅₀ ↓ |",
        "| --- | ---: | ---: |",
        r"| a\_b | 0.1 | **0.20 ± 0.01** |",
        r"| c\|d | – | 0.5 |",
        "",
        "- 100 % sure.",
    ]
    assert FORMATS["text"](GRID).splitlines() == [
        "     lr   loss κ₅₀ ↓",
        "a_b  0.1  *0.20 ± 0.01",
        "c|d  –    0.5",
        "",
        "100 % sure.",
    ]
    assert '<td class="number"><strong>0.20 ± 0.01</strong></td>' in FORMATS["html"](GRID)


def test_a_wide_table_of_text_goes_on_below():
    wide = Grid(tuple((f"column {i}", "") for i in range(9)), ("",) * 9, (("bn", (Cell("1.0"),) * 9),))
    lines = FORMATS["text"](wide).splitlines()
    assert max(map(len, lines)) <= 118
    assert sum(line.startswith("bn") for line in lines) == 1
    narrow = [line for line in FORMATS["html"](wide).split("<th") if "column" in line]
    assert len(narrow) == 9


def test_bold_stands_where_paired_intervals_separate_and_nowhere_else():
    separate = made().table("latex", ["test_loss", "test_accuracy"])
    rows = [line for line in separate.splitlines() if r"\textbf" in line]
    assert len(rows) == 1
    assert rows[0].startswith("bn & 0.01 & \\textbf{0.1110} $\\pm$ 0.0025 & \\textbf{0.8890}")
    close = [
        trial(e, 0.1, s, loss)
        for e, losses in (("bn", (0.1, 0.3)), ("ln", (0.2, 0.25)))
        for s, loss in enumerate(losses)
    ]
    assert r"\textbf" not in made(entries=("bn", "ln"), trials=tuple(close)).table("latex", ["test_loss"])


def test_one_seed_has_no_interval_and_no_bold():
    found = made(entries=("bn", "ln"), trials=(trial("bn", 0.1, 0, 0.1), trial("ln", 0.1, 0, 0.3)))
    assert r"\textbf" not in found.table("latex")
    assert "±" not in found.table("latex", ["test_loss"])
    assert "One seed: no interval, nothing is bold" in found.table()


def test_the_notes_say_what_a_reader_must_know():
    notes = " ".join(made().notes)
    assert "95 % Student interval over 3 seeds" in notes
    assert "Each entry at its best of the learning rates 0.01, 0.1, by the mean of test_loss." in notes
    assert "gone failed in 3 of 3 runs: ValueError: no <input>" in notes
    assert "Best at the end of the grid, which should be wider: bn (0.01), x & y_1 (0.01)." in notes
    odd = made(trials=(Trial("bn", 0.1, 0, metrics={"foo": 1.0}),), entries=("bn",), select="foo")
    assert "select='foo': its name does not say which is better" in " ".join(odd.notes)


def test_the_row_of_an_entry_that_failed_says_so():
    row = next(line for line in made().table("markdown").splitlines() if line.startswith("| gone"))
    assert set(row.split(" | ")[1:-1]) <= {"failed", "–"}


def test_pictures_hold_a_curve_an_entry_with_its_band():
    frames = made().prepared()
    assert list(frames) == ["training", "conditioning", "learning-rates"]
    depth = frames["conditioning"]
    last = depth[(depth["entry"] == "bn") & (depth["x"] == 2)].iloc[0]
    assert (last["low"], last["high"]) == (20.0, 22.0)
    assert last["y"] == pytest.approx((20 * 21 * 22) ** (1 / 3))
    assert set(depth["x"]) == {1.0, 2.0}
    rates = frames["learning-rates"]
    assert rates.loc[rates["entry"] == "gone", "y"].isna().all() or "gone" not in set(rates["entry"])
    assert sorted(set(rates["x"])) == [0.01, 0.1]


def test_a_run_that_diverged_is_drawn_at_the_first_loss():
    lost = trial("bn", 1.0, 0, math.inf)
    rates = made(trials=(trial("bn", 0.1, 0, 0.2), lost), entries=("bn",)).prepared()["learning-rates"]
    assert rates["y"].tolist() == [0.2, 2.0]


def test_figures_draw_every_entry_and_name_it():
    axes = made().figures()["training"].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["bn", "x & y_1"]
    assert len(axes.lines) == len(axes.collections) == 2
    assert axes.lines[0].get_ydata().tolist() == [2.0, pytest.approx(0.111)]


def test_everything_is_saved(tmp_path):
    made().save(tmp_path / "new")
    files = {file.name for file in (tmp_path / "new").iterdir()}
    pictures = {
        f"{name}.{ending}" for name in ("training", "conditioning", "learning-rates") for ending in ("pdf", "svg")
    }
    assert files == pictures | {"table.tex", "table.md", "table.txt", "runs.csv", "summary.csv", "comparison.html"}


def test_the_page_stands_alone_and_shows_names_as_text(tmp_path):
    text = made(checks=(("bn", "Mine", (("alone", "fail", "it <leaks>"),)),)).report(tmp_path).read_text()
    assert not re.findall(r'(?:src|href)="http', text.replace('href="https://arxiv.org', ""))
    assert "<script" not in text
    assert text.count("<svg") == 3
    assert "currentColor" in text
    for part in (
        "x &amp; y_1",
        "a &lt;b&gt; &amp; c",
        "it &lt;leaks&gt;",
        "no &lt;input&gt;",
        "3 of 3",
        "Paired differences",
    ):
        assert part in text, part
    assert "<b>" not in text
    assert "prefers-color-scheme: dark" in text


def test_it_is_read_again_without_torch(tmp_path):
    made().write(tmp_path)
    assert Comparison.read(tmp_path).table() == made().table()
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch': raise ImportError('torch is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "import normscope\n"
        f"print(normscope.Comparison.read({str(tmp_path)!r}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout.startswith("Comparison of 3 entries, 15 runs, 3 seeds"), found.stderr


def test_what_cannot_be_read_is_told(tmp_path):
    with pytest.raises(StoreError, match="holds no finished comparison"):
        Comparison.read(tmp_path)
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(StoreError, match="is damaged"):
        Comparison.read(tmp_path)


BAD = {
    r"format='tex' is unknown; did you mean 'text' or 'latex'\?": lambda: made().table("tex"),
    r"columns='kapa' is unknown; did you mean 'kappa'\?": lambda: made().table(columns=["kapa"]),
    r"select='loss' is unknown; did you mean 'test_loss'\?.*metrics that fit returned": lambda: made(select="loss"),
    "higher='acc' is unknown": lambda: made(higher=("acc",)),
}


@pytest.mark.parametrize("message", BAD)
def test_names_that_are_unknown(message):
    with pytest.raises(ArgumentError, match=message):
        BAD[message]()
