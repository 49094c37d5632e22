"""Attention: what its metrics say against closed forms, and what is concluded from runs that are good or broken."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normscope as ns
from normscope.core.finding import Verdict
from normscope.core.record import join
from normscope.diagnostics import attention
from normscope.figures import attention as figures
from normscope.metrics import attention as metrics
from normscope.report.page import page
from tests.metrics.records import Network, spread

STEPS = range(0, 100, 10)


def network(logit=lambda step: 5.0, entropy=lambda step: 0.8, log_z=lambda step: 6.0, *, seen=True, dtype="float32"):
    """A network with two layers that attend; the second has half the logits of the first."""
    found = Network(norm="layer")
    for i, part in enumerate((1.0, 0.5)):
        site = f"l{i}.attend/attention"
        found.extra_sites[site] = {"class": "Attention", "shape": None}

        def stats(step, part=part):
            bound = spread(ceiling=2 * part * logit(step))
            return bound | (spread(logit=part * logit(step), entropy=entropy(step)) | {"scale": 0.25} if seen else {})

        found.extra[site, "train", "value"] = stats
        if seen:
            found.arrays[site, "value", "logit"] = lambda step, part=part: (
                part * logit(step) * np.array([0.1, 1.0, 0.3])
            )
    found.extra_sites["/logits"] = {"class": "model", "dtype": dtype, "shape": None}
    found.extra["/logits", "train", "value"] = lambda step: {"log_z": log_z(step)}
    return found


def judged(judge, **settings):
    (found,) = judge(network(**settings).record())
    return found


@pytest.mark.parametrize(
    ("settings", "verdict", "words"),
    [
        ({}, Verdict.OK, "the largest attention logit is 5 (threshold 100), of 2 layers"),
        ({"logit": lambda step: 1.0 + step}, Verdict.OK, "is 81"),
        (
            {"logit": lambda step: 9.0 + 3 * step},
            Verdict.WARNING,
            "is 249 (threshold 100) in head 1, and rising, from 9",
        ),
        ({"logit": lambda step: 150.0}, Verdict.NOTE, "is 150 (threshold 100) in head 1, but not rising"),
        ({"logit": lambda step: 9.0 + 3 * step, "seen": False}, Verdict.NOTE, "allow attention logits up to 498"),
        ({"logit": lambda step: 150.0, "seen": False}, Verdict.OK, "the scores themselves were not seen"),
    ],
)
def test_logits(settings, verdict, words):
    found = judged(attention.logits_grow, **settings)
    assert found.verdict is verdict
    assert words in found.message


def test_a_layer_that_rises_is_named_before_one_that_only_is_large():
    found = network(logit=lambda step: 300.0)
    found.extra["l1.attend/attention", "train", "value"] = lambda step: spread(logit=10.0 + 2 * step, ceiling=1e3)
    (finding,) = attention.logits_grow(found.record())
    assert (finding.verdict, finding.site) == (Verdict.WARNING, "l1.attend/attention")
    assert (finding.step, finding.evidence["layers_beyond"]) == (50, 2)


def test_logits_that_end_in_nan_are_judged_by_what_was_before():
    found = judged(attention.logits_grow, logit=lambda step: 9.0 + 3 * step if step < 80 else math.nan)
    assert found.verdict is Verdict.WARNING


@pytest.mark.parametrize(
    ("entropy", "verdict", "step"),
    [
        (lambda step: 0.8, Verdict.OK, None),
        (lambda step: 0.02, Verdict.OK, None),  # from the start, as in a model that is trained already
        (lambda step: 0.9 * 0.95**step, Verdict.WARNING, 60),
    ],
)
def test_entropy(entropy, verdict, step):
    found = judged(attention.entropy_collapse, entropy=entropy)
    assert (found.verdict, found.step) == (verdict, step)


def test_sharp_attention_of_a_task_that_is_learned_is_a_note():
    found = network(entropy=lambda step: 0.9 * 0.9**step)
    found.contexts = {step: {"loss": 2.0 * 0.9**step} for step in range(100)}
    (finding,) = attention.entropy_collapse(found.record())
    assert finding.verdict is Verdict.NOTE


@pytest.mark.parametrize(
    ("log_z", "dtype", "verdict"),
    [
        (lambda step: 6.0 + step / 10, "bfloat16", Verdict.OK),
        (lambda step: 6.0 - 4 * step, "bfloat16", Verdict.WARNING),
        (lambda step: 6.0 - 4 * step, "float32", Verdict.NOTE),
        (lambda step: 90.0, "bfloat16", Verdict.NOTE),
    ],
)
def test_output(log_z, dtype, verdict):
    found = judged(attention.output_logits, log_z=log_z, dtype=dtype)
    assert found.verdict is verdict


def test_a_model_that_does_not_attend_is_not_judged():
    record = Network().record()
    for judge in (attention.logits_grow, attention.entropy_collapse, attention.output_logits):
        assert judge(record) == []
    assert ">Attention</h2>" not in page(record, ns.diagnose(record))


class Attends(nn.Module):
    """Causal attention with norms of queries and keys, before a head."""

    def __init__(self, norm=nn.Identity, classes=11):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(classes, 16), nn.Linear(16, 48), nn.Linear(16, classes)
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, ids):
        q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in self.qkv(self.embed(ids)).chunk(3, -1))
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=True)
        return self.head(y.transpose(1, 2).flatten(2))


def trained(model, steps=24, **settings):
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    with ns.attach(model, optimizer, every=2, probes=("attention", "normalization", "parameters")) as scope:
        for _ in range(steps):
            ids = torch.randint(0, 11, (4, 13), generator=generator)
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.step(loss=loss)
    return scope.record()


@pytest.fixture(scope="module")
def grown():
    """A run whose queries and keys grow because their learning rate is a hundred times too high."""
    torch.manual_seed(0)
    return trained(Attends(), lr=0.3)


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_gains_bound_the_logits_whatever_the_input(kind):
    torch.manual_seed(0)
    model = Attends(lambda: kind(8))
    with torch.no_grad():
        for norm in (model.q_norm, model.k_norm):
            norm.weight.copy_(torch.randn(8) * 3)
            if kind is nn.LayerNorm:
                norm.bias.copy_(torch.randn(8))
    sides = [
        math.sqrt(8) * norm.weight.abs().max().item() + getattr(norm, "bias", torch.zeros(1)).norm().item()
        if kind is nn.LayerNorm
        else math.sqrt(8) * norm.weight.abs().max().item()
        for norm in (model.q_norm, model.k_norm)
    ]
    record = trained(model, steps=3, lr=1e-9)
    bound = metrics.from_gains(record)["/attention"]
    assert bound.iloc[0] == pytest.approx(math.prod(sides) / math.sqrt(8), rel=1e-5)
    assert (metrics.logits(record)["/attention"] <= metrics.ceilings(record)["/attention"]).all()
    assert (metrics.ceilings(record)["/attention"] <= bound * (1 + 1e-6)).all()


def test_growth_made_on_purpose_is_found_and_a_healthy_run_is_not(grown):
    (broken,) = attention.logits_grow(grown)
    assert (broken.verdict, broken.site) == (Verdict.WARNING, "/attention")
    torch.manual_seed(0)
    healthy = trained(Attends(lambda: nn.RMSNorm(8)), lr=1e-3)
    for judge in (attention.logits_grow, attention.entropy_collapse, attention.output_logits):
        (found,) = judge(healthy)
        assert found.verdict is Verdict.OK
    assert "the model: the largest attention logit is 2.5" in attention.logits_grow(healthy)[0].message


def test_the_layer_that_gives_the_output_is_found_by_its_rows(grown):
    site, first, late = metrics.output_layer(grown)
    assert site == "head/weight"
    norms = grown.series("head/weight", "norm")
    assert first == pytest.approx(norms.iloc[:3].median())
    assert late == pytest.approx(norms.iloc[-3:].median())


def test_pictures_and_section(grown):
    for figure in (figures.LOGITS, figures.HEADS, figures.ENTROPIES, figures.LEVEL):
        frame = figure.prepare(grown, ())
        assert tuple(frame.columns) == figure.columns
        assert len(frame)
    heads = figures.HEADS.prepare(grown, ())
    assert heads["logit"].max() == pytest.approx(metrics.logits(grown)["/attention"].iloc[-1])
    assert ">Attention</h2>" in page(grown, ns.diagnose(grown))


def test_runs_are_told_apart(grown):
    both = join([grown, network().record()])
    found = [f for f in ns.diagnose(both) if f.id == "attention.logits-grow"]
    assert {(f.run, f.verdict) for f in found} == {("run", Verdict.WARNING), ("a", Verdict.OK)}


@pytest.mark.parametrize(
    ("keys", "rest", "expected"), [(64, 0.01, 0.023), (4096, 0.01, 0.017), (64, 0.03, 0.062), (4096, 0.03, 0.046)]
)
def test_the_numbers_behind_the_threshold_of_entropy(keys, rest, expected):
    weights = np.full(keys, rest / (keys - 1))
    weights[0] = 1 - rest
    assert -(weights * np.log(weights)).sum() / math.log(keys) == pytest.approx(expected, abs=6e-4)
    assert str(expected) in attention.ENTROPY_COLLAPSE.threshold_source
