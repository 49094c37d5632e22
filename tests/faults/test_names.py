"""Names of layers and of folders are text wherever they come out: page, Markdown, terminal, log."""

import json
import re
import sqlite3

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.cli import main
from tests.report.conftest import browser  # noqa: F401  # a fixture

NAMES = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "'; DROP TABLE runs; --",
    'a" onmouseover="document.title=1',
    "../../../etc/passwd",
    "two\nlines",
    "\x1b[31mred\x1b]0;owned\x07",
    "\u202eright to left",
    "{{7*7}} ${7*7} %{y}",
    "Schicht-層-🙂",
    "x" * 300,
)
FOLDERS = [name.replace("/", "_") for name in NAMES if len(name) < 100]


class Hostile(nn.Module):
    def __init__(self):
        super().__init__()
        for name in NAMES:  # add_module would refuse the dots, load_state_dict and wrappers do not
            self._modules[name] = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())

    def forward(self, x):
        for module in self._modules.values():
            x = module(x)
        return x


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One hostile model recorded into a folder of each hostile name."""
    torch.manual_seed(0)
    model, folder = Hostile(), tmp_path_factory.mktemp("runs")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for name in FOLDERS:
        with ns.attach(model, optimizer, run=folder / name, every=1) as scope:
            for _ in range(3):
                optimizer.zero_grad()
                loss = model(torch.randn(8, 4)).square().mean()
                loss.backward()
                optimizer.step()
                scope.step(loss=loss)
    return folder


def test_each_name_is_in_the_record_as_it_is(runs):
    assert sorted(path.name for path in runs.iterdir()) == sorted(FOLDERS)  # none left the folder
    for name in FOLDERS:
        record = ns.load(runs / name)
        assert record.names == (name,)
        modules = set(record.sites["module"])
        assert all(f"{layer}.0" in modules for layer in NAMES)
    with sqlite3.connect(runs / FOLDERS[2] / "record.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (1,)
    connection.close()


@pytest.mark.parametrize("name", [name for name in FOLDERS if not name.isprintable()])
@pytest.mark.parametrize("command", [["report"], ["report", "--json"], ["watch", "--once"]], ids=" ".join)
def test_nothing_printed_controls_the_terminal(runs, name, command, capsys):
    for path in (runs / name, runs / f"{name}.not", runs):
        main([*command, str(path)])
        told = capsys.readouterr()
        assert all(line.isprintable() for line in (told.out + told.err).split("\n")), path


def test_json_and_markdown_hold_names_as_text(runs):
    record = ns.load(runs / FOLDERS[0])
    page = ns.write_report(record, ns.diagnose(record), runs / FOLDERS[0] / "report.html")
    assert all(item["run"] == FOLDERS[0] for item in json.loads(page.with_name("findings.json").read_text()))
    text = page.with_suffix(".md").read_text()
    assert not re.search(r"(?<!\\)<(script|img)", re.sub("`[^`\n]*`", "", text))
    assert all(line.isprintable() for line in text.split("\n"))


def test_names_do_nothing_in_a_browser(runs, browser):  # noqa: F811
    record = ns.load(runs / FOLDERS[0])
    page = ns.write_report(record, ns.diagnose(record), runs / "page.html")
    browser.emulate()
    browser.open(page)
    assert browser.run("return document.title") != "owned"
    assert (
        browser.run("return document.querySelectorAll('[onerror], [onmouseover], main script, main img').length") == 0
    )
    shown = browser.run("return document.querySelector('main').textContent.replace(/\\u200b/g, '')")
    assert NAMES[0] in shown
    assert NAMES[3] in shown
    assert browser.errors() == []
    assert browser.requests() == [page.resolve().as_uri()]
    page.unlink()
    page.with_suffix(".md").unlink()
    page.with_suffix(".json").unlink()
