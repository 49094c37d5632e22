"""normscope explain: a run with a spike, one without, one that died, and what was asked wrongly."""

import json

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.cli import main

SPIKE = 120


def trained(folder, spoils=(SPIKE,), dies=False, steps=150, breaks=None, tells=lambda step: True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scope = ns.attach(model, optimizer, run=folder, every=10, probes=("parameters", "flight"))
    weight = torch.randn(8, 3)
    for step in range(steps):
        x = torch.randn(64, 8)
        y = (x @ weight).argmax(1)
        if step in spoils:
            x, y = 30 * x, (y + 1) % 3
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if tells(step):
            scope.step(loss=float("nan") if breaks is not None and step >= breaks else loss)
    if dies:
        scope._session.flush()  # and never closed, as after a kill
        scope._hooks.remove()
    else:
        scope.close()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "spiked")


def test_what_happened_why_and_what_to_do(run, capsys):
    assert main(["explain", str(run)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith(f"step {SPIKE}: data what The loss jumped at step {SPIKE} from ")
    assert "nothing had moved before. why A batch unlike the others:" in told
    assert "mend Look at inputs and labels of that step" in told
    assert "v the spike, | where it began" in told
    assert "0.weight" in told


def test_json_is_the_same(run, capsys):
    assert main(["explain", str(run), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["since"], told["spike"]["step"], told["spike"]["recovered"]) == (
        "data",
        SPIKE,
        SPIKE,
        True,
    )
    assert {row["onset"] for row in told["moved"]} == {SPIKE}


def test_the_report_tells_the_same(run):
    (finding,) = [f for f in ns.diagnose(ns.load(run)) if f.id.startswith("spikes.")]
    assert (finding.id, finding.verdict, finding.step) == ("spikes.data", ns.Verdict.NOTE, SPIKE)
    ns.write_report(ns.load(run), [finding], run / "report.html")
    page = (run / "report.html").read_text()
    assert "What moved first" in page
    assert "0.weight" in page


def test_a_run_without_a_spike_says_so(tmp_path, capsys):
    trained(tmp_path / "a", spoils=())
    assert main(["explain", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == (
        "No spike in 150 steps of the loss. `--step N` tells what moved before any step.\n"
    )
    assert "spikes.undecided" in [f.id for f in ns.diagnose(ns.load(tmp_path / "a")) if f.verdict is ns.Verdict.OK]


def test_a_raised_rate_is_told_of_a_step_without_a_spike(tmp_path, capsys):
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with ns.attach(model, optimizer, run=tmp_path / "a", probes=("parameters", "flight")):
        for step in range(90):
            optimizer.param_groups[0]["lr"] = 3e-3 if step >= 80 else 1e-3
            optimizer.zero_grad()
            model(torch.randn(64, 8)).square().mean().backward()
            optimizer.step()
    assert main(["explain", str(tmp_path / "a"), "--step", "80"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith("step 80: no spike")
    assert "The learning rate had been raised to 3 times what it was, from step 80 on" in told


def test_any_step_can_be_asked_for(run, capsys):
    assert main(["explain", str(run), "--step", "90"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("step 90: no spike")
    assert "No spike: at step 90 the loss was " in told
    assert "why" not in told


def test_a_step_within_a_spike_is_told_as_the_spike(tmp_path, capsys):
    folder = trained(tmp_path / "long", steps=135, spoils=(SPIKE, SPIKE + 3))
    assert main(["explain", str(folder), "--step", str(SPIKE + 2)]) == 0
    assert capsys.readouterr().out.startswith(f"Step {SPIKE + 2} belongs to the spike at step {SPIKE}.")


@pytest.mark.parametrize("steps", [5, 0])
def test_too_few_steps_are_not_called_calm(steps, tmp_path, capsys):
    trained(tmp_path / "short", steps=steps)
    assert main(["explain", str(tmp_path / "short")]) == 0
    assert capsys.readouterr().out.startswith("Too few steps to judge: a spike is seen against 16 steps before it")


@pytest.mark.parametrize("step", [0, 3, 15])
def test_an_early_loss_that_is_not_finite_is_told(step, tmp_path, capsys):
    trained(tmp_path / "early", steps=40, breaks=step)
    assert main(["explain", str(tmp_path / "early")]) == 0
    assert f"The loss was not finite from step {step} on" in " ".join(capsys.readouterr().out.split())


def test_a_loss_that_was_not_told_is_not_called_infinite(run, tmp_path, capsys):
    trained(tmp_path / "untold", steps=60, tells=lambda step: step != 50)
    assert main(["explain", str(tmp_path / "untold"), "--step", "50"]) == 0
    assert "No spike: at step 50 the loss was not recorded; in the steps before, " in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_run_that_died_is_explained(tmp_path, capsys):
    trained(tmp_path / "died", dies=True)
    assert main(["explain", str(tmp_path / "died")]) == 0
    assert capsys.readouterr().out.startswith(f"step {SPIKE}: data")


def test_a_step_that_is_not_there_is_an_error(run, capsys):
    assert main(["explain", str(run), "--step", "999"]) == 1
    assert capsys.readouterr().err == "normscope explain: step=999 is not in the run; recorded steps: 0 to 149.\n"


def test_the_picture_is_written(run, tmp_path, capsys):
    assert main(["explain", str(run), "--out", str(tmp_path / "spike.png")]) == 0
    assert (tmp_path / "spike.png").read_bytes()[1:4] == b"PNG"
    assert capsys.readouterr().out.endswith(f"picture  {tmp_path / 'spike.png'}\n")


def test_a_picture_leaves_json_alone(run, tmp_path, capsys):
    assert main(["explain", str(run), "--json", "--out", str(tmp_path / "spike.svg")]) == 0
    told = capsys.readouterr()
    assert len(json.loads(told.out)) == 1
    assert told.err == f"picture  {tmp_path / 'spike.svg'}\n"


def test_where_nothing_moved_no_picture_is_written(run, tmp_path, capsys):
    path = tmp_path / "none.png"
    assert main(["explain", str(run), "--step", "90", "--out", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"no picture: there is nothing to draw, so {path} was not written\n")
    assert not path.exists()


def test_a_picture_of_an_unknown_kind_is_an_error(run, capsys):
    assert main(["explain", str(run), "--out", "spike.txt"]) == 1
    assert capsys.readouterr().err == "normscope explain: out='spike.txt' must end in one of: .png, .pdf, .svg.\n"


def test_a_terminal_without_blocks_gets_letters(run, monkeypatch, capsys):
    monkeypatch.setattr("normscope.cli.explain.can_print", str.isascii)
    assert main(["explain", str(run)]) == 0
    assert capsys.readouterr().out.isascii()
