"""What a watched run records of outputs and their gradients, against plain autograd and numpy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normscope as ns
from tests.awkward.base import Wrap, sgd
from tests.cases import CASES


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def reference(x):
    """Return per-channel mean, var, rms of a tensor [N, C, ...] or [..., C], in float64 numpy."""
    axis = 1 if x.dim() == 4 else -1
    rows = x.detach().double().movedim(axis, -1).reshape(-1, x.shape[axis]).numpy()
    return {"mean": rows.mean(0), "var": rows.var(0), "rms": np.sqrt((rows**2).mean(0))}


def scalars(record, site, role="value", phase="train"):
    """Return the scalars of a site by name, each a list over steps."""
    blocks = [b for b in record.blocks if (b.site, b.role, b.phase) == (site, role, phase)]
    return {stat: block.values[:, i].tolist() for block in blocks for i, stat in enumerate(block.stats)}


def watched(model, x, loss=lambda y: y.square().mean(), **settings):
    """Train one step and return the record."""
    optimizer = sgd(model)
    with ns.attach(model, optimizer, every=1, **settings) as scope:
        loss(model(x)).backward()
        optimizer.step()
    return scope.record()


def check_site(record, site, value, gradient):
    for role, tensor in (("value", value), ("gradient", gradient)):
        expected = reference(tensor)
        for stat, power in (("mean", 1), ("var", 2), ("rms", 1)):
            found = record.array(site, stat, role=role)[1][0]
            near = 1e-6 * expected["rms"].max() ** power
            np.testing.assert_allclose(found, expected[stat], rtol=1e-4, atol=near, err_msg=f"{site} {role} {stat}")


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.GroupNorm(2, 4),
        nn.Flatten(2),
        nn.Linear(4, 3),
        nn.Tanh(),
    )


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_of_every_layer(memory):
    model = conv_net().to(memory_format=memory)
    x = torch.randn(5, 3, 6, 6).to(memory_format=memory)
    tensors, y = [], x
    for module in model:
        y = module(y)
        tensors.append(y)
    gradients = torch.autograd.grad(y.square().mean(), tensors)
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    record = watched(model, x)
    for number, (value, gradient) in enumerate(zip(tensors, gradients, strict=True)):
        check_site(record, f"{number}/output", value, gradient)


def test_an_in_place_layer_does_not_change_what_came_before():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    x = torch.randn(16, 6)
    before = model[0](x)
    after = before.relu()
    y = model[2](after)
    gradients = torch.autograd.grad(y.square().mean(), (before, after, y))
    record = watched(model, x)
    for number, (value, gradient) in enumerate(zip((before, after, y), gradients, strict=True)):
        check_site(record, f"{number}/output", value, gradient)
        np.testing.assert_allclose(record.array(f"{number}/output", "max")[1][0], value.detach().abs().amax(0))
        zeros = (value == 0).double().mean(0)
        np.testing.assert_allclose(record.array(f"{number}/output", "zeros")[1][0], zeros)


def test_calls_of_a_shared_module_are_told_apart():
    model = Wrap(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Linear(6, 6))
    x = torch.randn(10, 6)
    first = model.a(x)
    second = model.a(torch.tanh(first))
    gradients = torch.autograd.grad(second.square().mean(), (first, second))
    record = watched(model, x)
    check_site(record, "a/output", first, gradients[0])
    check_site(record, "a#1/output", second, gradients[1])


def test_calls_beyond_the_eighth_join_it():
    def run(model, x):
        states = [x]
        for _ in range(20):
            states.append(model.a(states[-1]))
        run.states = states[1:]
        return states[-1]

    model = Wrap(run, a=nn.Linear(6, 6))
    x = torch.randn(10, 6)
    y = model(x)
    gradients = torch.autograd.grad(y.square().mean(), run.states)
    values = [state.detach() for state in run.states]
    record = watched(model, x)
    check_site(record, "a#6/output", values[6], gradients[6])
    check_site(record, "a#7/output", torch.cat(values[7:]), torch.cat(gradients[7:]))
    assert scalars(record, "a#7/output")["count"] == scalars(record, "a#7/output", "gradient")["count"] == [130]


@pytest.mark.parametrize("probes", [("moments",), ("tails",), None])
def test_a_second_backward_through_a_graph_is_not_added(probes):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    x = torch.randn(8, 6)
    single = watched(model, x, lambda y: y.square().mean(), probes=probes)

    def twice(y):
        loss = y.square().mean()
        loss.backward(retain_graph=True)
        return loss

    double = watched(model, x, lambda y: twice(y), probes=probes)
    stat = "max" if probes == ("tails",) else "rms"
    size = "sample_n" if probes == ("tails",) else "count"
    for number in range(3):
        one, two = (scalars(r, f"{number}/output", "gradient") for r in (single, double))
        assert one[size] == two[size] == [8]
        assert two[stat][0] > 0


def test_accumulated_passes_are_merged():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    batches = torch.randn(12, 5, 6)
    optimizer = sgd(model)
    with ns.attach(model, optimizer, every=1) as scope:
        for x in batches:
            model(x).square().mean().backward()
        optimizer.step()
    record = scope.record()
    assert scalars(record, "0/output")["count"] == scalars(record, "0/output", "gradient")["count"] == [60]
    assert record.context["batch_size"].tolist() == [60]


def test_accumulated_values_are_those_of_all_batches():
    model = nn.Linear(6, 4)
    batches = torch.randn(20, 5, 6)
    expected = reference(model(batches.reshape(-1, 6)))
    optimizer = sgd(model)
    with ns.attach(model, optimizer, every=1) as scope:
        for x in batches:
            model(x).sum().backward()
        optimizer.step()
    for stat, values in expected.items():
        np.testing.assert_allclose(scope.record().array("/output", stat)[1][0], values, rtol=1e-4, atol=1e-6)


def test_evaluation_without_no_grad_is_not_training():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    x = torch.randn(16, 6)
    y = model[0](x)
    expected = reference(y)
    optimizer = sgd(model)
    with ns.attach(model, optimizer, every=1) as scope:
        model.eval()
        for _ in range(3):
            model(torch.randn(7, 6) + 50)
        model.train()
        model(x).square().mean().backward()
        model.eval()
        model(torch.randn(7, 6) + 50)
        model.train()
        optimizer.step()
    record = scope.record()
    np.testing.assert_allclose(record.array("0/output", "mean")[1][0], expected["mean"], rtol=1e-4, atol=1e-6)
    assert record.context["batch_size"].tolist() == [16]
    found = scalars(record, "1/running")
    assert (found["calls"], found["training"], found["silent"]) == ([1], [1], [0])
    assert scalars(record, "1/input")["batch"] == [16]


def test_a_frozen_model_part_has_values_and_no_gradients():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    model[0].requires_grad_(False)
    record = watched(model, torch.randn(5, 6))
    assert {(b.site, b.role) for b in record.blocks if b.site.endswith("output")} == {
        ("0/output", "value"),
        ("1/output", "value"),
        ("1/output", "gradient"),
    }


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_measured_once(reentrant):
    block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))
    plain = nn.Sequential(nn.Linear(6, 6), *block)
    x = torch.randn(10, 6)
    tensors, y = [], x
    for module in plain:
        y = module(y)
        tensors.append(y)
    gradients = torch.autograd.grad(y.square().mean(), tensors)
    block[1].reset_running_stats()
    model = Wrap(lambda m, x: checkpoint(m.block, m.first(x), use_reentrant=reentrant), first=plain[0], block=block)
    record = watched(model, x)
    for number in range(4):
        check_site(record, f"block.{number}/output", tensors[number + 1], gradients[number + 1])
    found = scalars(record, "block.1/running")
    assert (found["calls"], found["recomputed"], found["silent"]) == ([1], [1], [0])
    assert found["updates"] == [2]


def test_a_checkpoint_recomputed_in_the_next_step_is_left_alone():
    block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    model = Wrap(lambda m, x: checkpoint(m.block, m.first(x), use_reentrant=False), first=nn.Linear(6, 6), block=block)
    optimizer = sgd(model)
    with ns.attach(model, optimizer, every=1) as scope:
        loss = model(torch.randn(10, 6)).square().mean()
        with torch.no_grad():
            optimizer.step()  # the step ends before the backward of its own graph
        loss.backward()
        optimizer.step()
    record = scope.record()
    assert record.events["kind"].tolist() == []
    assert record.steps.tolist() == [0, 1]
    assert record.series("first/output", "rms").index.tolist() == [0]


def test_order_predecessors_and_structure():
    model = conv_net()
    sites = watched(model, torch.randn(5, 3, 6, 6)).sites.set_index("site")
    outputs = sites[sites["slot"] == "output"].sort_values("order")
    assert list(outputs.index) == [f"{n}/output" for n in range(8)]
    assert outputs["predecessor"].tolist() == ["", *(f"{n}/output" for n in range(7))]
    assert outputs["class"].tolist() == [type(m).__name__ for m in model]
    assert outputs["channels"].tolist()[:5] == [6, 6, 6, 4, 4]
    assert outputs["activation"].tolist() == ["", "", "relu", "", "", "", "", "bounded"]
    assert outputs.loc["1/output", ["norm", "eps", "momentum", "has_running"]].tolist() == ["batch", 1e-5, 0.1, True]
    assert outputs.loc["4/output", ["norm", "groups"]].tolist() == ["group", 2]


def test_an_unmeasured_output_is_noted_once():
    model = Wrap(lambda m, x: m.last(x * m.choose(x)), choose=Wrap(lambda m, x: x > 0), last=nn.Linear(6, 2))
    optimizer = sgd(model)
    with ns.attach(model, optimizer, every=1) as scope:
        for _ in range(3):
            model(torch.randn(4, 6)).sum().backward()
            optimizer.step()
    events = scope.record().events
    assert events[["kind", "site", "message"]].values.tolist() == [
        ["unmeasured", "choose/output", "bool values are not measured"]
    ]


def test_a_norm_that_wraps_another_is_measured_itself():
    class ScaledLayerNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))
            self.eps = 1e-5
            self.norm = nn.LayerNorm(6, elementwise_affine=False)

        def forward(self, x):
            return self.norm(x) * self.weight

    record = watched(nn.Sequential(nn.Linear(6, 6), ScaledLayerNorm()), torch.randn(5, 6))
    assert {"1/output", "1/input"} <= {block.site for block in record.blocks}


@pytest.mark.parametrize(
    "name", ["bf16 autocast", "float64", "bf16 weights", "spectral normalization", "stochastic depth"]
)
def test_awkward_models_record_what_a_hook_of_the_user_sees(name):
    (case,) = [case for case in CASES if case.name == name]
    job = case.build()
    seen = {}

    def keep(module, inputs, output):
        seen.setdefault(module, output.detach().clone())

    places = {site.partition("/")[0] for site in case.present if site.endswith("/output") and "#" not in site}
    modules = {place: job.model.get_submodule(place) for place in places}
    for module in modules.values():
        module.register_forward_hook(keep)
    with ns.attach(job.model, job.optimizers, every=1) as scope:
        job.step()
    assert seen
    for place, module in modules.items():
        if module in seen:
            found = scope.record().array(f"{place}/output", "rms")[1][0]
            np.testing.assert_allclose(found, reference(seen[module])["rms"], rtol=1e-4, err_msg=place)
