"""An error of the user's own code is told in one line, and a mistyped path is not waited for."""

import sys

import pytest

import normscope as ns
from normscope.cli import main

SOURCE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

def batches(width=4):
    return [(torch.randn(8, width), torch.randint(2, (8,))) for _ in range(3)]

def raises(*_):
    raise ValueError("two\\nlines")

def stream():
    yield batches()[0]
    raise RuntimeError("the file is gone")

def loss():
    return model(), raises, batches()

def shapes():
    return model(), nn.functional.cross_entropy, batches(5)

def module():
    return model(), nn.CrossEntropyLoss(), [(torch.randn(8, 4), torch.randn(8, 7))]

def loader():
    return model(), nn.functional.cross_entropy, stream()

def metric():
    return model(), batches(), batches(), raises

def anonymous():
    return model(), batches(), batches(), lambda model, batches: 1 / 0
"""
FAILURES = {
    ("examine", "loss"): "raises() failed with ValueError: two lines ({mod}, line 12)",
    ("examine", "shapes"): "Sequential.forward() failed with RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    ("examine", "module"): "CrossEntropyLoss.forward() failed with RuntimeError: 0D or 1D target tensor expected",
    ("examine", "loader"): "stream() failed with RuntimeError: the file is gone ({mod}, line 16)",
    ("gap", "metric"): "raises() failed with ValueError: two lines ({mod}, line 12)",
    ("gap", "anonymous"): "anonymous.<locals>.<lambda>() failed with ZeroDivisionError: division by zero ({mod}, ",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "users_mod.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("users_mod", None)


@pytest.mark.parametrize(("command", "name"), FAILURES)
def test_one_line_names_the_function_the_error_and_the_place(command, name, folder, capsys):
    assert main([command, f"users_mod:{name}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    told = FAILURES[command, name].format(mod=folder / "users_mod.py")
    assert line.startswith(f"normscope {command}: factory='users_mod:{name}': {told}")


def test_in_python_the_error_stays_what_it_is(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    mod = __import__("users_mod")
    with pytest.raises(ValueError, match="two"):
        ns.gap(*mod.metric()[:3], metric=mod.raises, progress=False)
    with pytest.raises(ValueError, match="two"):
        ns.examine(*mod.loss(), progress=False)


def test_an_error_of_normscope_itself_is_not_put_on_the_user(monkeypatch):
    def broken(*_, **__):
        raise LookupError("a bug")

    broken.__code__ = broken.__code__.replace(co_filename=ns.__file__)
    monkeypatch.setattr("normscope.cli.gap.gap", broken)
    with pytest.raises(LookupError, match="a bug"):
        main(["gap", "users_mod:metric"])


def test_watch_says_that_a_folder_is_missing(capsys):
    assert main(["watch", "rnus/a"]) == 1
    assert "path='rnus/a' lies in no folder: rnus does not exist. Give the folder" in capsys.readouterr().err


def test_watch_waits_as_long_as_it_is_told_and_names_what_is_alike(folder, capsys):
    (folder / "resnet").mkdir()
    (folder / "resnet" / "record.sqlite").touch()
    assert main(["watch", "resnt", "--wait", "0.2", "--interval", "0.05"]) == 1
    text = capsys.readouterr()
    assert text.out == "waiting for resnt to begin; Ctrl-C ends; did you mean resnet?\n"
    assert text.err == "normscope watch: path='resnt': no run has begun there in 0.2 seconds; did you mean resnet?\n"
