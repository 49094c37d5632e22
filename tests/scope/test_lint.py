"""Lint: what is found before training, with and without an example; the model stays as it was."""

import copy
import json

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.finding import Verdict
from normscope.workbench import models
from tests.diagnostics.test_structure import CASES as ATTACHED
from tests.diagnostics.test_structure import adamw, bn, convolutional, frozen, plain, sgd

FAILURE, WARNING, UNDECIDED, NOTE, OK = Verdict


def of(findings, name):
    found = [finding for finding in findings if finding.id == name]
    assert len(found) <= 1
    return found[0] if found else None


def example_for(model):
    first = next(model.parameters())
    return torch.randn((16, 3, 8, 8) if first.dim() == 4 else (16, 8), dtype=first.dtype)


@pytest.mark.parametrize(("diagnostic", "verdict", "site", "make", "make_optimizer"), ATTACHED)
def test_what_an_attached_run_shows_is_known_before(diagnostic, verdict, site, make, make_optimizer):
    model = make()
    found = diagnostic_of(diagnostic, ns.lint(model, make_optimizer(model), example_for(model)))
    assert (found and found.verdict, found.site if found else "") == (verdict, site)


def diagnostic_of(diagnostic, findings):
    return of(findings, f"{diagnostic.__module__.rpartition('.')[2]}.{diagnostic.__name__.replace('_', '-')}")


def momentum(value):
    return lambda: convolutional(nn.BatchNorm2d(8, momentum=value))


def evaluated(model):
    model[1].norm.eval()
    return model


def biased(norm):
    return plain(nn.Linear(8, 8), norm, nn.ReLU())


def whitening():
    return nn.Sequential(nn.Linear(8, 32), ns.norms.build("decorrelated-batch", 32), nn.Linear(32, 3))


CASES = [
    # id, verdict, site, model, optimizer
    ("scale.bias-before-norm", NOTE, "1/bias", lambda: biased(nn.BatchNorm1d(8)), sgd),
    ("scale.bias-before-norm", None, "", lambda: biased(nn.LayerNorm(8)), sgd),
    ("scale.bias-before-norm", None, "", lambda: plain(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)), sgd),
    ("scale.bias-before-norm", None, "", lambda: plain(nn.ReLU(), nn.BatchNorm1d(8)), sgd),
    ("scale.gain-decay", NOTE, "1/weight", lambda: plain(nn.LayerNorm(8)), adamw(weight_decay=0.1)),
    ("scale.gain-decay", OK, "", lambda: plain(nn.LayerNorm(8)), sgd),
    ("scale.gain-decay", None, "", lambda: plain(nn.LayerNorm(8)), None),
    ("scale.decay", NOTE, "1/weight", lambda: biased(nn.LayerNorm(8)), sgd),
    ("scale.decay", OK, "", lambda: biased(nn.LayerNorm(8)), adamw(weight_decay=0.1)),
    ("scale.decay", None, "", lambda: plain(nn.ReLU(), nn.LayerNorm(8)), sgd),
    ("mismatch.momentum", FAILURE, "1.norm/running", momentum(0.0), sgd),
    ("mismatch.momentum", WARNING, "1.norm/running", momentum(0.99), sgd),
    ("mismatch.momentum", WARNING, "1.norm/running", momentum(1e-4), sgd),
    ("mismatch.momentum", NOTE, "1.norm/running", momentum(0.5), sgd),
    ("mismatch.momentum", NOTE, "1.norm/running", momentum(None), sgd),
    ("mismatch.momentum", OK, "", momentum(0.1), sgd),
    ("mismatch.momentum", OK, "", momentum(0.001), sgd),
    ("mismatch.momentum", None, "", lambda: plain(nn.LayerNorm(8)), sgd),
    ("mismatch.evaluation-mode", NOTE, "1.norm/running", lambda: evaluated(convolutional(bn(), bn())), sgd),
    ("mismatch.evaluation-mode", OK, "", lambda: convolutional(bn(), bn()), sgd),
    ("mismatch.evaluation-mode", None, "", lambda: convolutional(bn(), bn()).eval(), sgd),
    ("noise.small-batch", OK, "", lambda: convolutional(bn()), sgd),
    ("noise.whitening-batch", WARNING, "1/output", whitening, sgd),
    ("noise.whitening-batch", None, "", lambda: plain(nn.BatchNorm1d(8)), sgd),
    ("run.no-normalization", NOTE, "", plain, sgd),
    ("run.no-normalization", OK, "", lambda: plain(nn.LayerNorm(8)), sgd),
]


@pytest.mark.parametrize(("name", "verdict", "site", "make", "make_optimizer"), CASES)
def test_findings_of_other_subjects(name, verdict, site, make, make_optimizer):
    model = make()
    found = of(ns.lint(model, make_optimizer and make_optimizer(model), example_for(model)), name)
    assert (found and found.verdict, found.site if found else "") == (verdict, site)
    if verdict in (FAILURE, WARNING):
        assert found.cause
        assert found.remedy


def test_batches_of_few_values():
    assert of(ns.lint(plain(nn.BatchNorm1d(8)), example=torch.randn(2, 8)), "noise.small-batch").verdict is WARNING
    assert of(ns.lint(plain(nn.BatchNorm1d(8)), example=torch.randn(64, 8)), "noise.small-batch").verdict is OK
    one = ns.lint(plain(nn.BatchNorm1d(8)), example=torch.randn(1, 8))
    assert of(one, "structure.few-values").verdict is FAILURE
    assert of(ns.lint(plain(nn.LayerNorm(8)), example=torch.randn(1, 8)), "structure.few-values").verdict is OK


def test_a_layer_that_refuses_the_example_is_a_finding():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.InstanceNorm2d(8))
    found = ns.lint(model, example=torch.randn(4, 3, 8, 8))
    assert (found[0].id, found[0].verdict, found[0].site) == ("structure.forward-fails", FAILURE, "2/input")
    assert "Expected more than 1 spatial element" in found[0].message


UNORDERED = {
    "noise.small-batch",
    "scale.bias-before-norm",
    "structure.few-values",
    "structure.never-reached",
    "structure.shared-norm",
}


def test_without_an_example_what_needs_it_is_undecided_and_says_so():
    found = ns.lint(convolutional(bn(), bn()), example=None)
    undecided = {f.id: f for f in found if f.verdict is UNDECIDED}
    assert set(undecided) == UNORDERED
    assert all(f.remedy == "Pass example=, a batch as the model takes it." for f in undecided.values())
    assert not [f for f in ns.lint(plain(nn.ReLU())) if f.verdict is UNDECIDED]


def test_without_an_example_a_sequence_tells_its_order():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(8))
    )
    found = ns.lint(model, sgd(model))
    assert of(found, "scale.bias-before-norm").site == "0.0/bias"
    assert of(found, "structure.dropout-before-norm").site == "1.1/input"
    assert of(found, "scale.decay").site == "0.0/weight"


class Everything(nn.Module):
    """Dropout, counters, running statistics, a generator, and forward arguments of several kinds."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.calls = 0

    def forward(self, x, *, twice=False):
        self.calls += 1
        return self.net(x + torch.rand(8)) + (self.net(x) if twice else 0)


def test_the_model_stays_as_it_was():
    model = Everything()
    model.net[2].eval()
    model(torch.randn(4, 8)).sum().backward()
    before, gradient = copy.deepcopy(model.state_dict()), model.net[0].weight.grad.clone()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    adam = torch.optim.AdamW(model.parameters())
    ns.lint(model, adam, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ns.ArgumentError):
        ns.lint(model, adam, torch.ones(4, 5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.net[0].weight.grad, gradient)
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert model.calls == 1
    assert not adam.state


def test_an_attached_scope_hears_nothing_of_it():
    model = plain(nn.BatchNorm1d(8))
    optimizer = sgd(model)
    with ns.attach(model, optimizer, every=1) as scope:
        ns.lint(model, optimizer, torch.randn(4, 8))
        assert len(scope.record().sites) == 0


@pytest.mark.parametrize(
    "example",
    [
        torch.ones(4, 8),
        (torch.ones(4, 8), torch.ones(4, 3)),
        [torch.ones(4, 8), None],
        {"x": torch.ones(4, 8)},
        ({"x": torch.ones(4, 8), "twice": True}, torch.ones(4)),
    ],
)
def test_an_example_may_be_what_a_batch_is(example):
    assert of(ns.lint(Everything(), example=example), "structure.never-reached").verdict is OK


def test_a_tuple_holds_the_arguments_where_forward_needs_several():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.seen = nn.LayerNorm(8), None

        def forward(self, x, edges):
            assert edges is not None
            return self.norm(x)

    assert of(ns.lint(Graph(), example=(torch.ones(4, 8), torch.ones(2, 3))), "structure.never-reached").verdict is OK


def test_a_mapping_that_forward_takes_as_one_argument():
    class Batch(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, batch):
            return self.norm(batch["x"])

    assert of(ns.lint(Batch(), example={"x": torch.ones(4, 8)}), "structure.never-reached").verdict is OK


ERRORS = [
    (lambda: ns.lint(3), r"model=3 must be a torch\.nn\.Module\."),
    (lambda: ns.lint(plain(), torch.ones(4, 8)), "optimizer=a Tensor .* an example is passed as example="),
    (
        lambda: ns.lint(plain(), example=torch.ones(4, 5)),
        r"example=.*: Sequential\.forward raised RuntimeError: mat1 and mat2 .* pass what the model takes: its input",
    ),
    (lambda: ns.lint(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))), "is scripted and takes no hooks"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_errors_say_what_to_pass(call, message):
    with pytest.raises(ns.ArgumentError, match=message):
        call()


HEALTHY = {
    "cnn": lambda: (models.residual_cnn(), torch.randn(32, 1, 28, 28)),
    "cnn group": lambda: (models.residual_cnn(norm=lambda c: nn.GroupNorm(8, c)), torch.randn(8, 1, 28, 28)),
    "cnn instance": lambda: (models.residual_cnn(norm=nn.InstanceNorm2d), torch.randn(8, 1, 28, 28)),
    "transformer": lambda: (models.transformer(50), torch.randint(50, (4, 32))),
    "transformer rms": lambda: (models.transformer(50, norm=nn.RMSNorm), torch.randint(50, (4, 32))),
    "mlp": lambda: (models.mlp([64, 32, 32, 32, 10]), torch.randn(32, 64)),
    "torch": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 3, enable_nested_tensor=False),
        torch.randn(9, 4, 32),
    ),
}


@pytest.mark.parametrize("make", HEALTHY.values(), ids=HEALTHY)
@pytest.mark.parametrize("training", [True, False])
def test_healthy_models_get_notes_at_most(make, training):
    model, example = make()
    model.train(training)
    found = ns.lint(model, torch.optim.AdamW(model.parameters()), example)
    assert not [f for f in found if f.verdict in (FAILURE, WARNING, UNDECIDED)]
    assert sum(f.verdict is NOTE for f in found) <= 3
    assert not [f for f in ns.lint(model) if f.verdict in (FAILURE, WARNING)]


def test_third_party_models_get_no_warning():
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"input_ids": torch.randint(5, 90, (2, 16))}
    convnext = transformers.ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[2, 2, 2, 2])
    cases = [
        (transformers.BertModel(transformers.BertConfig(**small, intermediate_size=64)), tokens),
        (transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, intermediate_size=64)), tokens),
        (transformers.ConvNextForImageClassification(convnext), {"pixel_values": torch.randn(4, 3, 64, 64)}),
    ]
    for model, example in cases:
        found = ns.lint(model.train(), torch.optim.AdamW(model.parameters()), example)
        assert not [f for f in found if f.verdict in (FAILURE, WARNING)]


def test_findings_come_worst_first_as_a_list_and_as_a_table():
    model = frozen(plain(nn.GroupNorm(8, 8, eps=0.1)), "1")
    found = ns.lint(model, sgd(model), torch.randn(4, 8))
    assert [f.verdict.rank for f in found] == sorted(f.verdict.rank for f in found)
    assert isinstance(found, list)
    assert found == list(found)
    assert repr(found).splitlines()[-1].startswith("1 failure, 1 warning, ")
    assert "structure.few-values" in found._repr_html_()
    assert json.dumps([f.as_dict() for f in found])
