"""Examine leaves a model as it was, tells what it measured, and names what cannot be examined."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normscope as ns
from normscope.core.errors import ArgumentError
from normscope.scope.examine import MAX_BATCHES
from tests import checks
from tests.awkward.base import Job

LOSS = F.cross_entropy


def model_of():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Sequential(nn.Linear(8, 3))
    )


def batches_of(count=3, size=16, width=6):
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(size, width, generator=generator) for _ in range(count)]
    return [(x, x[:, :3].argmax(1)) for x in drawn]


MODEL, BATCHES = model_of(), batches_of()


def job_of(model):
    return Job(model, [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)], lambda: None)


def used(prepare=lambda model: None):
    """A model in the middle of a training step: with gradients, some modules in evaluation mode, and random states."""
    checks.seed()
    model = model_of()
    LOSS(model(torch.randn(8, 6)), torch.zeros(8, dtype=torch.long)).backward()
    model[0].bias.grad = None
    model[4].eval()
    prepare(model)
    return model


def everything(model):
    """All that must not change, bit for bit, and which objects hold it."""
    job = job_of(model)
    objects = {name: (id(p), id(p.grad)) for name, p in model.named_parameters()}
    objects |= {name: (id(b), b._version) for name, b in model.named_buffers()}
    versions = {name: p._version for name, p in model.named_parameters()}
    return checks.state_of(job), objects, versions, checks.hook_counts(job)


def broken(output, target):
    raise ZeroDivisionError("on purpose")


def broken_later():
    """A loss that draws random numbers and fails at the second batch."""
    calls = []

    def loss(output, target):
        torch.rand(1), np.random.rand(), random.random()
        calls.append(None)
        return LOSS(output, target) if len(calls) < 2 else broken(output, target)

    return loss


@pytest.mark.parametrize("every_probe", [True, False])
def test_the_model_is_bit_for_bit_what_it_was(every_probe):
    model = used()
    before = everything(model)
    record = ns.examine(model, LOSS, BATCHES, probes=None if every_probe else "moments")
    assert everything(model) == before
    assert list(record.steps) == [0, 1, 2]
    assert list(record.events.loc[record.events["kind"] == "probe-failed", "message"]) == []


@pytest.mark.parametrize("loss", [broken, broken_later()], ids=["at once", "at the second batch"])
def test_the_model_is_what_it_was_after_an_error_of_the_loss(loss):
    model = used()
    before = everything(model)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        ns.examine(model, loss, BATCHES)
    assert everything(model) == before


def test_hooks_of_the_user_on_parameters_stay_and_are_not_called():
    calls = []

    def hooked(model):
        model[0].weight.register_hook(lambda grad: calls.append("gradient"))
        optimizer = torch.optim.SGD([model[0].weight], 1.0)  # a step within backward
        model[0].weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())

    model = used(hooked)
    before = everything(model)
    ns.examine(model, LOSS, BATCHES)
    assert everything(model) == before
    assert calls == []
    LOSS(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    assert calls == ["gradient"]
    assert everything(model)[2]["0.weight"] > before[2]["0.weight"]


class Fading(nn.Linear):
    """A layer with a buffer that training moves in place and the backward of evaluation needs."""

    def __init__(self):
        super().__init__(6, 3)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        if self.training:
            self.scale.mul_(0.9)
        return super().forward(x * self.scale)


def test_a_backward_that_waits_goes_on():
    model = Fading().eval()
    x = torch.randn(8, 6, requires_grad=True)
    output = model(x).square().sum()
    expected = torch.autograd.grad(output, x, retain_graph=True)[0]
    ns.examine(model, LOSS, BATCHES)
    assert torch.equal(torch.autograd.grad(output, x)[0], expected)


def test_the_generator_of_a_loader_is_not_advanced():
    data = torch.utils.data.TensorDataset(torch.randn(64, 6), torch.zeros(64, dtype=torch.long))
    loader = torch.utils.data.DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(3))
    before = loader.generator.get_state()
    ns.examine(model_of(), LOSS, loader)
    assert torch.equal(loader.generator.get_state(), before)


@pytest.mark.parametrize("loss", [LOSS, broken], ids=["well", "error"])
def test_an_attached_scope_does_not_hear_it(loss):
    def trained(looks):
        checks.seed()
        model = model_of()
        job = job_of(model)
        with ns.attach(model, job.optimizers, every=1) as scope:
            for x, y in BATCHES:
                job.optimizers[0].zero_grad()
                LOSS(model(x), y).backward()
                if looks:
                    with contextlib.suppress(ZeroDivisionError):
                        ns.examine(model, loss, BATCHES)
                job.optimizers[0].step()
            return scope.record(), checks.state_of(job), checks.hook_counts(job)

    (record, state, hooks), (plain, plain_state, plain_hooks) = trained(True), trained(False)
    assert state == plain_state
    assert hooks == plain_hooks
    assert record.frame().equals(plain.frame())
    assert len(record.steps) == 3


def test_it_measures_each_batch_with_its_own_statistics_and_no_dropout():
    model = model_of()
    record = ns.examine(model, LOSS, BATCHES)
    assert record.series("1/output", "mean").to_numpy() == pytest.approx(np.zeros(3), abs=1e-6)
    by_hand = nn.Sequential(model[0], nn.BatchNorm1d(8), nn.ReLU(), model[4])  # without dropout, in training mode
    losses = [LOSS(by_hand(x), y) for x, y in BATCHES]
    context = record.context.drop_duplicates("step")
    assert context["loss"].tolist() == pytest.approx([loss.item() for loss in losses], rel=1e-6)
    norms = [
        float(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, by_hand.parameters())]).norm())
        for loss in losses
    ]
    assert context["grad_norm"].tolist() == pytest.approx(norms, rel=1e-5)


def test_a_loader_is_read_up_to_the_limit_and_a_record_can_be_written(tmp_path):
    record = ns.examine(MODEL, LOSS, iter(batches_of(MAX_BATCHES + 3)), run=tmp_path / "look", layers="4")
    assert len(record.steps) == MAX_BATCHES
    assert ns.load(tmp_path / "look").frame().equals(record.frame())
    assert {site.split("/")[0].split(".")[0] for site in record.sites["site"]} <= {"4", ""}


@pytest.mark.parametrize(("progress", "drawn"), [(True, True), (False, False), (None, False)])
def test_progress_is_drawn_on_demand(progress, drawn, capsys):
    ns.examine(MODEL, LOSS, BATCHES, probes="moments", progress=progress)
    assert ("batches: " in capsys.readouterr().err) is drawn


def frozen():
    return model_of().requires_grad_(False)


REFUSED = {
    "model": ((3, LOSS, BATCHES), {}, r"model=3 must be a torch\.nn\.Module"),
    "loss": ((MODEL, 3, BATCHES), {}, r"loss=3 must be callable as loss\(output, target\)"),
    "batches, a number": ((MODEL, LOSS, 3), {}, r"batches=3 must be a sequence of batches \(input, target\)"),
    "batches, one": ((MODEL, LOSS, BATCHES[0]), {}, "batches: got a single batch; pass a list of batches"),
    "batches, none": ((MODEL, LOSS, []), {}, r"batches=\[\] is empty; pass at least one"),
    "batches, no pairs": (
        (MODEL, LOSS, [BATCHES[0][0]]),
        {},
        r"a batch of type Tensor is not a pair \(input, target\); pass forward=lambda",
    ),
    "reduction": ((MODEL, LOSS, BATCHES), {"reduction": "none"}, "reduction='none' is unknown; .*Options: mean, sum"),
    "probes": ((MODEL, LOSS, BATCHES), {"probes": "moment"}, "probes='moment' is unknown; did you mean 'moments'"),
    "layers": ((MODEL, LOSS, BATCHES), {"layers": "nowhere.*"}, r"layers='nowhere\.\*' is unknown;"),
    "run": ((MODEL, LOSS, BATCHES), {"run": ""}, "run='' must be a folder for the record"),
    "frozen model": (
        (frozen(), LOSS, BATCHES),
        {},
        "model=Sequential has no parameter that requires a gradient; set requires_grad",
    ),
    "model without parameters": ((nn.ReLU(), LOSS, BATCHES), {}, "model=ReLU has no parameter that requires"),
    "loss, not scalar": (
        (MODEL, lambda output, target: output, BATCHES),
        {},
        r"loss: batch 0 gave a tensor of shape \(16, 3\); it must be a scalar tensor that depends on the parameters",
    ),
    "loss, a number": (
        (MODEL, lambda output, target: 1.5, BATCHES),
        {},
        r"loss: batch 0 gave 1\.5; it must be a scalar tensor",
    ),
    "loss, detached": (
        (MODEL, lambda output, target: LOSS(output, target).detach(), BATCHES),
        {},
        r"loss: batch 0 gave tensor\(.*\); it must be a scalar tensor that depends on the parameters",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_examined_is_named(name):
    arguments, options, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        ns.examine(*arguments, **options)


# ---- what it finds ---------------------------------------------------------------------------------------------------

DEPTH, WIDTH = 24, 32


def deep(factor, norm):
    """A deep network whose signal grows by about `factor` from layer to layer, or is normalized."""
    torch.manual_seed(0)
    layers = []
    for _ in range(DEPTH):
        linear = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.normal_(linear.weight, std=factor * (2 / WIDTH) ** 0.5)
        layers += [linear, *([nn.BatchNorm1d(WIDTH)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 3))


def findings_of(model):
    record = ns.examine(model, LOSS, batches_of(8, 256, WIDTH))
    return {finding.id: finding.verdict.value for finding in ns.diagnose(record)}


def test_a_network_without_norm_that_explodes_is_found():
    found = findings_of(deep(3.0, norm=False))
    assert found["propagation.signal-exploding"] in ("warning", "failure")
    assert found["propagation.gradient-exploding"] in ("warning", "failure")
    assert found["run.no-normalization"] == "note"


def test_a_network_that_is_well_is_left_in_peace():
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU())]
    found = findings_of(nn.Sequential(*layers, nn.Linear(WIDTH, 3)))
    assert {id for id, verdict in found.items() if verdict in ("warning", "failure")} == set()
    assert found["propagation.signal-exploding"] == found["run.no-normalization"] == "ok"


class Forced(nn.Module):
    """A layer whose forward rewrites its weight, as forced weight normalization does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.weight.copy_(self.weight * 0.9)
        return x @ self.weight.T


@pytest.mark.parametrize("make", [Forced, lambda: ns.norms.build("centering", 4)])
def test_weights_that_a_forward_rewrites_are_what_they_were(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.LayerNorm(4), nn.Linear(4, 2))
    model(torch.randn(8, 4))
    batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(3)]
    before = everything(model)
    record = ns.examine(model, F.mse_loss, batches)
    assert everything(model) == before
    assert list(record.events.loc[record.events["kind"] == "probe-failed", "message"]) == []
