"""Recorded baselines: they belong to the protocol, one of them is reproduced, and they show what is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from normscope.core.errors import ArgumentError
from normscope.report.comparison import Comparison
from normscope.scope import trial
from normscope.workbench.baselines import ENTRIES, SEEDS, baselines, recorded
from normscope.workbench.protocol import Make, Norm, protocol


@pytest.mark.parametrize("model", ENTRIES)
def test_every_entry_rate_and_seed_is_there(model):
    wanted = protocol(model)
    trials, version = baselines(wanted)
    expected = {(name, rate, seed) for name in ENTRIES[model] for rate in wanted.rates for seed in range(SEEDS)}
    assert {(item.entry, item.rate, item.seed) for item in trials} == expected
    assert len(trials) == len(expected)
    assert not any(item.reason for item in trials)
    assert version.startswith("2.")


@pytest.mark.parametrize("model", ENTRIES)
def test_batch_norm_beats_no_norm_and_conditions_better(model):
    trials, _ = baselines(protocol(model))
    found = Comparison(tuple(ENTRIES[model]), trials, "test_loss").summary()
    rows = found[found["entry"] == "none"].set_index("quantity")
    assert rows.loc["final_loss", "difference_low"] > 0
    assert rows.loc["test_loss", "difference"] > 0
    assert rows.loc["kappa", "difference"] > 0


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_recorded_run_is_reproduced():
    wanted = protocol("mlp")
    stored = next(t for t in baselines(wanted)[0] if (t.entry, t.rate, t.seed) == ("batch", 0.05, 1))
    options = {"every": 10, "probes": "parameters"}
    found = trial.run(trial.Task("batch", Make(wanted, Norm("batch")), wanted.fit, 0.05, 1, None, options))
    assert found.reason == ""
    assert found.metrics["test_loss"] == pytest.approx(stored.metrics["test_loss"], rel=0.05)
    assert found.measured["memory"] == pytest.approx(stored.measured["memory"], rel=1e-4)
    assert np.allclose(found.curve[:4], stored.curve[:4], rtol=1e-2)


def test_another_protocol_is_refused():
    with pytest.raises(ArgumentError, match=r"recorded with another protocol \(steps 7 instead of 150\)"):
        baselines(replace(protocol("mlp"), steps=7))


def test_what_is_stored_is_short_and_without_throughput():
    wanted = protocol("mlp")
    trials, _ = baselines(wanted)
    made = replace(trials[0], measured={"throughput": 3.0, "kappa": 1.23456789}, setting={"fit": "x"})
    (stored,) = recorded(wanted, [made])["trials"]
    assert stored["measured"] == {"kappa": 1.2346}
    assert stored["setting"] == {}


def test_entries_share_what_is_no_norm():
    states = []
    for name in ("batch", "layer", "none"):
        torch.manual_seed(0)
        states.append(protocol("mlp").make(Norm(name)).state_dict())
    assert all(torch.equal(states[0][key], state[key]) for state in states for key in states[0] if "linear" in key)


def test_an_unknown_model_is_named():
    with pytest.raises(ArgumentError, match=r"model='vgg' is unknown; Options: mlp, resnet, transformer"):
        protocol("vgg")
