"""Held batches with batch and with population statistics, against the two passes made by hand; and Problem itself."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normscope as ns
from normscope.core.errors import ArgumentError
from normscope.linalg.protect import undisturbed
from normscope.probes import population
from tests.awkward.tensors import MergingLinear, ReassignedNorm
from tests.checks import bits
from tests.probes.test_activations import reference

LOSS = nn.functional.mse_loss


def make():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
    return model


def held(count=2):
    draw = torch.Generator().manual_seed(5)
    return [(torch.randn(6, 2, 6, 6, generator=draw), torch.randn(6, 3, generator=draw)) for _ in range(count)]


def by_hand(model, batches):
    """Return outputs of both norms and of the model, and losses, in both phases."""
    found = {}
    for phase in ("batch", "population"):
        twin = copy.deepcopy(model).eval()
        twin[1].train(phase == "batch")
        outputs, norms = [], {"1": [], "4": []}
        for name, store in norms.items():
            twin[int(name)].register_forward_hook(lambda m, x, y, store=store: store.append(y.detach().clone()))
        with torch.no_grad():
            outputs = [twin(x) for x, _ in batches]
            losses = [LOSS(y, t) for y, (_, t) in zip(outputs, batches, strict=True)]
        found[phase] = (
            torch.cat(outputs),
            float(torch.stack(losses).mean()),
            {n: torch.cat(v) for n, v in norms.items()},
        )
    return found


def check(record, step, expected):
    for phase, (_, loss, norms) in expected.items():
        assert record.series("/output", "loss", phase=phase)[step] == pytest.approx(loss, rel=1e-5)
        assert record.series("/output", "n", phase=phase)[step] == 12
        for name, output in norms.items():
            for stat, values in reference(output).items():
                steps, found = record.array(f"{name}/output", stat, phase=phase)
                np.testing.assert_allclose(found[steps.tolist().index(step)], values, rtol=1e-4, atol=1e-6)
    batch, running = (expected[phase][0].double() for phase in ("batch", "population"))
    gap = float((batch - running).norm() / batch.norm())
    assert record.series("/output", "gap", phase="population")[step] == pytest.approx(gap, rel=1e-4)


def test_both_phases_against_two_passes_by_hand():
    model, batches = make(), held()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with ns.attach(model, optimizer, every=2, problem=ns.Problem(model, LOSS, batches)) as scope:
        for step in range(3):
            x, t = held(step + 1)[-1]
            optimizer.zero_grad()
            LOSS(model(x), t).backward()
            optimizer.step()
            if step == 0:
                first = by_hand(model, batches)
        last = by_hand(model, batches)
    record = scope.record()
    check(record, 0, first)
    check(record, 2, last)
    assert record.runs[0]["problem"] is True


def test_without_a_problem_there_is_no_such_phase():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with ns.attach(model, optimizer, every=1) as scope:
        model(held()[0][0]).sum().backward()
        optimizer.step()
    assert {block.phase for block in scope.record().blocks} == {"train", "flight"}


def test_a_network_without_running_statistics_has_no_gap():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    problem = ns.Problem(model, LOSS, [(torch.randn(5, 4), torch.randn(5, 4))])
    rows = population.measure(problem, {})["population"]
    assert dict(zip(rows[-1].stats, rows[-1].values, strict=True))["gap"] == 0


def test_the_close_measures_the_last_weights_unless_the_loop_broke():
    for broken in (False, True):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        scope = ns.attach(model, optimizer, every=1, problem=ns.Problem(model, LOSS, held()))
        for _ in range(12):  # samples 9 and 11 keep no arrays
            LOSS(model(held()[0][0]), held()[0][1]).backward()
            optimizer.step()
        scope.__exit__(*((ValueError, ValueError(), None) if broken else (None, None, None)))
        steps = scope.record().series("/output", "gap", phase="population").index.tolist()
        assert steps == ([*range(9), 10] if broken else [*range(9), 10, 11])
        assert scope.record().array("0/output", "rms")[0][-1] == 11


def test_a_failing_problem_costs_its_probe_alone():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    problem = ns.Problem(model, lambda output, target: output.no_such_thing, held())
    with ns.attach(model, optimizer, every=1, problem=problem) as scope:
        for _ in range(3):
            model(held()[0][0]).sum().backward()
            optimizer.step()
    events = scope.record().events
    failed = ["curvature", "invariance", "noise-scale", "population"]
    assert events["kind"].tolist() == ["probe-failed"] * len(failed)
    assert [message.partition(": Attr")[0] for message in events["message"]] == failed
    assert len(scope.record().steps) == 3


# ---- what must not be disturbed --------------------------------------------------------------------------------------


def random_states():
    return bits(torch.get_rng_state()), tuple(np.random.get_state()[1]), random.getstate()


def test_undisturbed_restores_modes_buffers_and_random_states_also_after_an_error():
    model = nn.Sequential(make(), ReassignedNorm(), MergingLinear())
    model[0][1].eval()
    before = {n: bits(t) for n, t in [*model.named_buffers(), *model.named_parameters()]}
    tensors = [id(t) for t in model.buffers()]
    modes, states = [m.training for m in model.modules()], random_states()

    def disturb():
        with undisturbed(model):
            for module in model.modules():
                module.training = True
            model[0](torch.randn(4, 2, 6, 6))
            model[1](torch.randn(4, 6))
            model[0][1].running_mean = torch.ones(4)
            random.random(), np.random.rand()
            assert not torch.is_grad_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        disturb()
    assert {n: bits(t) for n, t in [*model.named_buffers(), *model.named_parameters()]} == before
    assert [id(t) for t in model.buffers()] == tensors
    assert [m.training for m in model.modules()] == modes
    assert random_states() == states


def test_reading_a_shuffling_loader_moves_no_random_state():
    data = TensorDataset(torch.arange(8.0)[:, None], torch.arange(8.0))
    model, states = nn.Linear(1, 1), random_states()
    problem = ns.Problem(model, LOSS, DataLoader(data, batch_size=2, shuffle=True))
    assert random_states() == states
    assert len(problem.batches) == 4
    assert repr(problem) == "Problem(Linear, 2 parameters, 4 batches)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", LOSS, [1]), "model='model' must be a torch.nn.Module"),
        ((nn.Linear(1, 1), "loss", [1]), r"loss='loss' must be callable as loss\(output, target\)"),
        ((nn.Linear(1, 1), LOSS, []), r"batches=\[\] is empty; pass at least one held batch"),
        ((nn.Linear(1, 1), LOSS, iter(())), "is empty"),
        ((nn.Linear(1, 1), LOSS, 3), "batches=3 must be a sequence of batches"),
    ],
)
def test_bad_problems(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        ns.Problem(*arguments)


def test_a_batch_that_is_no_pair():
    problem = ns.Problem(nn.Linear(1, 1), LOSS, [{"x": 1}])
    with pytest.raises(ArgumentError, match=r"a batch of type dict is not a pair \(input, target\); pass forward="):
        problem.forward(problem.model, problem.batches[0])
