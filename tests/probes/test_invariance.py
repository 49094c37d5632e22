"""Doubled weights on a held batch: what is scale-invariant, in which units, and that nothing else changes."""

import copy

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.linalg.problem import Problem
from normscope.norms.recognize import find_norms
from normscope.probes import invariance


def network(norm, eps=1e-30):
    torch.manual_seed(0)
    norms = {
        "batch": lambda: nn.BatchNorm1d(8, eps=eps),
        "layer": lambda: nn.LayerNorm(8, eps=eps),
        "group": lambda: nn.GroupNorm(2, 8, eps=eps),
    }
    body = nn.Sequential(nn.Linear(6, 8, bias=False), norms[norm](), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    return body.double()


def problem(model):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return Problem(model, nn.functional.cross_entropy, [(inputs, torch.arange(40) % 3)])


def defects(model, **options):
    found = invariance.measure(problem(model), find_norms(model), dict(model.named_parameters()))["batch"]
    return {(row.site, row.role): dict(zip(row.stats, row.values.tolist(), strict=True)) for row in found}


@pytest.mark.parametrize(
    ("norm", "passes", "fails"),
    [
        ("batch", "row_defect", ()),
        ("layer", "tensor_defect", ("row_defect",)),
        ("group", "block_defect", ("row_defect",)),
    ],
)
def test_doubling_changes_nothing_in_the_units_of_the_layer(norm, passes, fails):
    found = defects(network(norm))
    value, gradient = found["0/weight", "value"], found["0/weight", "gradient"]
    assert value[passes] < 1e-14
    assert gradient[passes] < 1e-13
    assert all(min(value[name], gradient[name]) > 0.05 for name in fails)
    assert set(value) == {"batch": {"row_defect"}, "layer": {*fails, passes}}.get(
        norm, {*fails, passes, "tensor_defect"}
    )
    head = found["4/weight", "value"]
    assert head["tensor_defect"] > 0.1
    assert found["4/weight", "gradient"]["tensor_defect"] > 0.1


def test_eps_is_all_that_breaks_it():
    """With batch statistics the output moves by about 3 / 8 eps / var, so a hundred times the eps does so as well."""
    small, large = (defects(network("batch", eps))["0/weight", "value"]["row_defect"] for eps in (1e-6, 1e-4))
    assert large / small == pytest.approx(100, rel=0.05)
    assert 1e-8 < small < 1e-4


def test_a_layer_in_evaluation_mode_is_not_invariant():
    model = network("batch")
    model[1].eval()
    assert defects(model)["0/weight", "gradient"]["tensor_defect"] > 0.1


def test_nothing_of_the_model_changes():
    model = network("batch")
    model(torch.randn(9, 6).double()).sum().backward()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters()]
    held = {name: id(p) for name, p in model.named_parameters()}
    defects(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert {name: id(p) for name, p in model.named_parameters()} == held
    assert all(module.training for module in model.modules())


def test_a_weight_without_gradient_is_passed_over():
    model = network("batch")
    with torch.no_grad():
        model[4].weight.zero_()
    assert {site for site, _ in defects(model)} == {"4/weight"}


def test_many_weights_are_tried_at_a_stride(monkeypatch):
    monkeypatch.setattr(invariance, "MOST", 1)
    assert {site for site, _ in defects(network("batch"))} == {"0/weight"}


def test_the_snapshot_is_taken_at_the_first_sample_and_at_the_close():
    model = network("batch")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    held = problem(model)
    with ns.attach(model, optimizer, every=1, problem=held) as scope:
        for _ in range(12):
            optimizer.zero_grad()
            inputs, targets = held.batches[0]
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    found = scope.record().series("0/weight", "row_defect", phase="batch")
    assert found.index.tolist() == [0, 11]
    assert found.max() < 1e-12


def test_a_loss_that_cannot_be_differentiated_switches_the_probe_off():
    model = network("batch")
    inputs = torch.randn(8, 6).double()
    held = Problem(model, lambda output, target: output.detach().sum(), [(inputs, inputs)])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ns.attach(model, optimizer, every=1, problem=held) as scope:
        model(inputs).sum().backward()
        optimizer.step()
    events = scope.record().events
    assert events.loc[events["kind"] == "probe-failed", "message"].str.startswith("invariance: RuntimeError").tolist()
