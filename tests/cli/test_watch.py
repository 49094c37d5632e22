"""normscope watch: a run in the terminal while another process writes it."""

import os
import pty
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.cli import main
from normscope.cli.watch import _Judge
from normscope.core.store import FILE_NAME
from normscope.report.live import Style, live, sparkline

PROGRAM = (
    "import sys, torch, normscope as ns\n"
    "torch.manual_seed(0)\n"
    "model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))\n"
    "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
    "with ns.attach(model, optimizer, run=sys.argv[1], every=2) as scope:\n"
    "    for step in range(int(sys.argv[2])):\n"
    "        loss = model(torch.randn(8, 4)).square().mean()\n"
    "        optimizer.zero_grad(); loss.backward(); optimizer.step(); scope.step(loss=loss)\n"
    "    print('trained', flush=True)\n"
    "    sys.stdin.read()\n"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    torch.manual_seed(0)
    blocks = [part for _ in range(6) for part in (nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU())]
    model = nn.Sequential(*blocks, nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ns.attach(model, optimizer, run=folder, every=2) as scope:
        for step in range(20):
            loss = model(torch.randn(32, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.step(loss=loss if step else float("nan"))
    return folder


def frame(folder, **settings):
    record = ns.load(folder)
    dead = ns.Finding(
        id="propagation.dead-units", verdict=ns.Verdict.WARNING, message="Units are dead.", site="2/output"
    )
    return live(record, [dead, *ns.diagnose(record)], 1e9 + 30, 1e9 + 90, Style(**settings))


def test_once_prints_one_frame_of_what_the_record_holds(finished, capsys):
    assert main(["watch", "--once", str(finished)]) == 0
    text = capsys.readouterr().out
    record = ns.load(finished)
    context = record.context.drop_duplicates("step")
    assert text.startswith("a  Sequential  ")
    assert "20 steps  10 sampled" in text
    assert re.search(r"closed \d+ s ago", text)
    assert f"{context['grad_norm'].iloc[-1]:.4g}" in text
    assert f"{context['loss'].iloc[-1]:.4g}" in text
    assert re.search(r"learning rate +0\.1 ", text)
    last = record.series("15/output", "rms", role="gradient").iloc[-1]
    assert re.search(rf"^15 .*{re.escape(f'{last:.2g}')}", text, re.MULTILINE)
    assert [m for m in re.findall(r"^(\d+) +[█ ]", text, re.MULTILINE)] == ["0", "3", "6", "9", "12", "15", "18"]
    assert "\x1b" not in text


def test_kappa_is_that_of_the_record(finished):
    record = ns.load(finished)
    large, small = (record.series("3/input", f"moment.{stat}").dropna() for stat in ("max", "p50"))
    assert frame(finished, width=100).splitlines()[-6].split()[-1] == f"{large.iloc[-1] / small.iloc[-1]:.2g}"


@pytest.mark.parametrize("width", [24, 40, 60, 71, 72, 100, 200])
@pytest.mark.parametrize("height", [None, 8, 16, 40])
@pytest.mark.parametrize("blocks", [True, False])
def test_a_frame_fits_its_terminal(finished, width, height, blocks):
    lines = frame(finished, width=width, height=height, blocks=blocks).splitlines()
    assert max(map(len, lines)) <= width
    assert height is None or len(lines) < height
    assert ("kappa50" in "".join(lines)) == (width >= 72 and (height is None or height > 12))
    assert blocks or not set("".join(lines)) & set("▁▂▃▄▅▆▇█")


def test_color_paints_verdicts_and_nothing_else(finished):
    plain, painted = frame(finished, width=90), frame(finished, width=90, color=True)
    assert "\x1b[" in painted
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == plain


def test_a_running_run_says_when_it_was_last_written(finished):
    record = ns.load(finished)
    run = {key: value for key, value in record.runs[0].items() if key != "closed"} | {"created": 1e9}
    resumed = run | {"segments": [{"step": 0, "created": 1e9 - 5000}, {"step": 5, "created": 1e9}]}
    shown = [live(replace(record, runs=(r,)), [], 1e9 + 30, 1e9 + 90, Style()) for r in (run, resumed)]
    assert "20 steps  10 sampled  0.667 steps/s over 30 s  last written 1 min 0 s ago" in shown[0]
    assert "20 steps  10 sampled  0.5 steps/s over 30 s  last written 1 min 0 s ago" in shown[1]


def test_a_run_without_a_step_has_a_frame(tmp_path):
    model = nn.Linear(2, 2)
    ns.attach(model, torch.optim.SGD(model.parameters(), 0.1), run=tmp_path / "a").close()
    assert "no step yet" in frame(tmp_path / "a")


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 5, " "),
        ([1.0], 5, "▄"),
        ([0.0, 7.0], 5, "▁█"),
        (np.arange(16.0), 8, "▁▂▃▄▅▆▇█"),
        ([float("inf"), 0.0, 1.0], 3, " ▁█"),
        ([float("nan")] * 3, 3, "   "),
    ],
)
def test_sparkline(values, width, line):
    assert sparkline(values, width) == line


def test_judging_waits_while_it_is_dear(monkeypatch):
    calls = []

    def slow(record):
        calls.append(record)
        time.sleep(0.05)
        return [record]

    monkeypatch.setattr("normscope.cli.watch.diagnose", slow)
    judge = _Judge()
    assert judge("first", False) == ["first"]
    assert judge("second", False) == ["first"]
    assert judge("last", True) == ["last"]
    time.sleep(0.3)
    assert judge("later", False) == ["later"]
    assert calls == ["first", "last", "later"]


# ---- following -------------------------------------------------------------------------------------------------------


def test_a_run_of_another_process_is_followed_from_before_it_begins_until_it_is_closed(tmp_path, capfd):
    done = []
    watcher = threading.Thread(target=lambda: done.append(main(["watch", str(tmp_path / "a"), "--interval", "0.1"])))
    watcher.start()
    time.sleep(0.5)
    assert capfd.readouterr().out == f"waiting for {tmp_path / 'a'} to begin; Ctrl-C ends\n"
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "a"), "9"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout.readline() == "trained\n"
        text, deadline = "", time.monotonic() + 60
        while "9 steps" not in text and time.monotonic() < deadline:
            time.sleep(0.1)
            text += capfd.readouterr().out
        assert "last written" in text
        assert "closed" not in text
        assert not done
        trainer.communicate("", timeout=60)
    watcher.join(60)
    text = capfd.readouterr().out
    assert done == [0]
    assert re.search(r"9 steps  5 sampled .* closed \d+ s ago", text)
    assert ns.load(tmp_path / "a").steps.tolist() == [0, 2, 4, 6, 8]  # the watcher has taken nothing
    assert os.listdir(tmp_path / "a") == [FILE_NAME]


@pytest.mark.parametrize("color", [True, False])
def test_a_terminal_is_redrawn_and_ctrl_c_ends_quietly(color, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "a"), "5"]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {} if color else {"NO_COLOR": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        trainer.stdout.readline()
        parent, child = pty.openpty()
        arguments = [sys.executable, "-m", "normscope", "watch", str(tmp_path / "a"), "--interval", "0.1"]
        with subprocess.Popen(
            arguments, stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True
        ) as watcher:
            os.close(child)
            shown = b""
            while shown.count(b"\x1b[H") < 3:
                shown += os.read(parent, 1 << 16)
            watcher.send_signal(2)
            assert watcher.wait(30) == 0
        os.close(parent)
        trainer.communicate("", timeout=60)
    assert b"5 steps" in shown
    assert bool(re.search(rb"\x1b\[3\dm. \w+\x1b\[0m", shown.replace(b"\xe2\x80\xa2", b"."))) == color
    assert b"Traceback" not in shown


# ---- what is no run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("once", [[], ["--once"]])
def test_a_wrong_folder_is_an_error(once, tmp_path, finished, capsys):
    (tmp_path / "notes.txt").write_text("nothing")
    assert main(["watch", str(tmp_path), *once]) == 1
    assert "holds no run" in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "notes.txt"), *once]) == 1
    assert "not a normscope record" in capsys.readouterr().err
    assert main(["watch", str(finished.parent), *once]) == 1
    assert f"is no run but a folder of 1; give one of them, newest first: {finished}" in capsys.readouterr().err


def test_once_does_not_wait_for_a_run(tmp_path, capsys):
    assert main(["watch", "--once", str(tmp_path / "none")]) == 1
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "soon"])
def test_a_wrong_interval_is_wrong_usage(interval, tmp_path, capsys):
    assert main(["watch", str(tmp_path), "--interval", interval]) == 2
    assert "--interval" in capsys.readouterr().err
