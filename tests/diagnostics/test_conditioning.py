"""Conditioning diagnostics on small networks that were really trained."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normscope as ns
from normscope.core.finding import Verdict
from normscope.core.source import cite
from normscope.core.store import Store
from normscope.diagnostics import conditioning, diagnose

ALL = (
    conditioning.ill_conditioned_inputs,
    conditioning.ill_conditioned_gradients,
    conditioning.curvature_dominated,
    conditioning.rank_collapse,
)
RULES = (conditioning.INPUTS, conditioning.GRADIENTS, conditioning.CURVATURE, conditioning.RANK)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(samples=512):
    """Inputs like pixels: positive, correlated with their neighbors, of ten classes."""
    generator = torch.Generator().manual_seed(0)
    smooth = F.avg_pool1d(torch.randn(10, 1, 72, generator=generator), 9, 1).squeeze(1)
    labels = torch.arange(samples) % 10
    noise = F.avg_pool1d(torch.randn(samples, 1, 72, generator=generator), 9, 1).squeeze(1)
    return 2 * smooth[labels] + noise + 0.5, labels


def perceptron(depth, norm=None, gain=True, scale=1.0):
    torch.manual_seed(0)
    layers = []
    for inside, outside in pairwise([64] * depth):
        linear = nn.Linear(inside, outside)
        if gain:
            nn.init.kaiming_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        layers += [linear, *([norm(outside)] if norm else []), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    with torch.no_grad():
        model[0].weight.mul_(scale)
    return model


def train(model, steps=16, lr=0.02, every=1, data=None):
    x, y = images() if data is None else data
    optimizer = torch.optim.SGD(model.parameters(), lr)
    with ns.attach(model, optimizer, every=every, probes="covariance") as scope:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return scope.record()


@pytest.fixture(scope="module")
def deep():
    return train(perceptron(24), steps=50, every=5)


@pytest.fixture(scope="module")
def dead():
    """Torch's own initialization, too small for a ReLU: signal and gradient die out."""
    return train(perceptron(24, gain=False), steps=50, every=5)


def only(found):
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("diagnose_one", ALL)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_a_network_with_normalization_is_fine(norm, diagnose_one):
    record = train(perceptron(12 if norm is nn.BatchNorm1d else 8, norm), steps=50, every=5)
    assert only(diagnose_one(record)).verdict is Verdict.OK


@pytest.mark.parametrize("diagnose_one", ALL)
def test_a_shallow_network_without_normalization_is_fine(diagnose_one):
    found = diagnose_one(train(perceptron(5), steps=50, every=5))
    assert [finding.verdict for finding in found] in ([Verdict.OK], [])


def test_inputs_of_a_deep_network_without_normalization_are_ill_conditioned(deep):
    found = only(conditioning.ill_conditioned_inputs(deep))
    assert found.verdict is Verdict.WARNING
    assert found.evidence["kappa_50"] > conditioning.INPUT_KAPPA > 10 * found.evidence["kappa_50_first"]
    assert int(found.site.partition("/")[0]) > 20  # in the deeper half
    assert f"{found.evidence['kappa_50']:.3g}" in found.message
    assert "20000" in found.message


def synthetic(kappas):
    """A record of inputs whose largest eigenvalues by step are given, the median one being 1."""
    store = Store(None, "a", {})
    for order, (site, values) in enumerate(kappas.items()):
        store.site(site, {"module": site.partition("/")[0], "call": 0, "slot": "input", "order": order})
        for step, value in enumerate(values):
            stats = {"moment.max": value, "moment.p50": 1.0, "samples": 100.0, "width": 10.0}
            store.scalars(10 * step, site, "train", "value", tuple(stats), np.array(list(stats.values())))
    store.commit()
    return store.record()


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([50, 1e5, 1e5, 1e5], Verdict.NOTE),
        ([1e5, 1e5, 1e5, 1e5], Verdict.WARNING),
        ([1e5, 1e5, 50, 50, 50], Verdict.OK),
        ([50, 1e5, 1e5, 50, 50, 50], Verdict.OK),
    ],
)
def test_what_a_run_only_passes_through_is_no_warning(values, verdict):
    found = only(conditioning.ill_conditioned_inputs(synthetic({"data/input": [7, 7, 7], "deep/input": values})))
    assert found.verdict is verdict
    assert ("at the start 50 times" in found.message) == (verdict is Verdict.NOTE)
    assert found.site == ("" if verdict is Verdict.OK else "deep/input")


def test_samples_become_alike_in_a_deep_network_without_normalization():
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    found = only(conditioning.rank_collapse(train(perceptron(24), steps=20, lr=1e-3, data=(x, images()[1]))))
    assert found.verdict is Verdict.WARNING
    assert found.evidence["rank_first"] > 4 * found.evidence["rank_last"]
    assert found.site == "46/input"
    assert found.sites[-1] == "2/input"


def test_gradients_of_a_network_that_is_nearly_constant_are_ill_conditioned(dead):
    found = only(conditioning.ill_conditioned_gradients(dead))
    assert found.verdict is Verdict.WARNING
    assert found.evidence["beyond_at_end"] > found.evidence["layers"] / 2


def test_the_layer_that_alone_has_a_gradient_dominates(dead):
    found = only(conditioning.curvature_dominated(dead))
    assert (found.verdict, found.site) == (Verdict.WARNING, "46/output")
    assert found.evidence["ratio"] == pytest.approx(found.evidence["largest"] / found.evidence["median"])


def test_data_that_are_not_standardized_make_the_first_layer_dominate():
    x, y = images()
    record = train(perceptron(5, scale=1e-3), data=(x * 1000, y), steps=20, lr=1e-9)
    found = only(conditioning.curvature_dominated(record))
    assert (found.verdict, found.site) == (Verdict.WARNING, "0/output")
    assert found.evidence["ratio"] > conditioning.DOMINANCE


def test_few_samples_are_undecided_and_the_message_says_how_many_are_needed():
    x, y = images(40)
    found = only(conditioning.ill_conditioned_inputs(train(perceptron(6), data=(x, y))))
    assert found.verdict is Verdict.UNDECIDED
    assert "at least 128" in found.message
    assert "128" in found.remedy


def test_a_bottleneck_is_a_note():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64), nn.Linear(64, 10))
    found = only(conditioning.ill_conditioned_inputs(train(model)))
    assert (found.verdict, found.site) == (Verdict.NOTE, "2/input")


def test_a_record_without_second_moments_has_no_findings():
    empty = Store(None, "empty", {}).record()
    assert [finding for judge in ALL for finding in judge(empty)] == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_every_rule_has_a_source_that_resolves_and_a_remedy(rule):
    assert cite(rule.source).title
    assert rule.remedy
    assert rule.threshold_source.startswith("measured: ")


def test_all_of_them_are_registered(deep):
    ids = [finding.id for finding in diagnose(deep)]
    assert [rule.id for rule in RULES if rule.id not in ids] == []


def test_a_diverged_run_is_judged_without_an_error():
    x, y = images()
    found = [f for judge in ALL for f in judge(train(perceptron(12), lr=1e6, data=(x, y)))]
    assert all(np.isfinite(v) for f in found for v in f.evidence.values() if isinstance(v, float)) or found
