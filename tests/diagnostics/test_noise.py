import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.finding import Verdict
from normscope.core.store import Store
from normscope.diagnostics import noise
from tests.diagnostics.test_propagation import only
from tests.metrics.records import Network, at
from tests.metrics.test_noise import gradient, noisy, stream

FAILURE, WARNING, UNDECIDED, NOTE, OK = Verdict
ALL = (noise.small_batch, noise.whitening_batch, noise.batches_not_random, noise.gradient_noise)


@pytest.mark.parametrize(("moved", "verdict", "limit"), [(0.2, OK, 0.5), (0.4, NOTE, 0.35), (0.6, WARNING, 0.5)])
def test_batches_too_small_for_their_statistics(moved, verdict, limit):
    found = only(noise.small_batch(noisy(moved=moved, batch=8.0).record()))
    assert (found.verdict, found.threshold) == (verdict, limit)
    assert found.evidence["moved"] == pytest.approx(moved)
    assert found.evidence["moved_at_32"] == pytest.approx(moved / 2)
    assert f"in a batch of 8 mean and variance are off by {moved * 0.8165:.2g} deviations" in found.message
    if verdict is not OK:
        assert (found.site, len(found.sites)) == ("l0.norm/output", 6)
        assert "SyncBatchNorm" in found.remedy


def test_frozen_layers_use_no_batch():
    assert noise.small_batch(noisy(moved=0.9).edit(at("/running", training=0.0)).record()) == []
    assert noise.small_batch(Network(norm="layer").record()) == []


@pytest.mark.parametrize(
    ("batch", "count", "verdict"), [(64.0, 64.0, OK), (4.0, 4.0, WARNING), (4.0, 4096.0, UNDECIDED), (16.0, 16.0, OK)]
)
def test_without_a_problem_counts_may_decide(batch, count, verdict):
    found = only(noise.small_batch(Network().edit(at("/input", batch=batch, count=count)).record()))
    assert found.verdict is verdict
    if verdict is UNDECIDED:
        assert "problem=normscope.Problem(model, loss, [(inputs, targets)])" in found.remedy


def whitening(features, values, **options):
    network = noisy(Network(layers=2), **options)
    network.inputs = {"whitened": features, "whitened_from": values}
    return network.record()


@pytest.mark.parametrize(
    ("features", "values", "moved", "verdict", "limit"),
    [
        (16, 1024, 0.1, OK, 2.0),
        (16, 48, 0.1, NOTE, 4.0),
        (16, 24, 0.1, WARNING, 2.0),
        (16, 16, 0.1, WARNING, 2.0),
        (16, 1024, 0.7, WARNING, 0.5),
    ],
)
def test_batches_too_small_for_their_whitening(features, values, moved, verdict, limit):
    record = whitening(features, values, moved=moved)
    found = only(noise.whitening_batch(record))
    assert (found.verdict, found.threshold) == (verdict, limit)
    assert f"{features} features are whitened from {values} values a batch" in found.message
    assert ("singular" in found.message) == (values <= features)
    assert noise.small_batch(record) == []  # they are judged here alone
    if verdict is WARNING and moved < 0.5:
        assert f"Whiten at most {values // 4} features together" in found.remedy


@pytest.mark.parametrize(("value", "verdict"), [(1.0, OK), (0.1, OK), (2.0, OK), (3.5, WARNING), (20.0, WARNING)])
def test_batches_that_are_no_random_draws(value, verdict):
    record = stream(Network(), [np.nan, *value * np.linspace(0.8, 1.2, 9)]).record()
    found = only(noise.batches_not_random(record))
    assert found.verdict is verdict
    assert found.evidence["ratio"] == pytest.approx(value)
    assert found.site == ("/input" if verdict is WARNING else "")


def test_one_odd_batch_is_not_enough():
    record = stream(Network(), [np.nan, 40.0, *[1.0] * 8]).record()
    assert only(noise.batches_not_random(record)).verdict is OK


def test_batches_that_cannot_be_judged():
    few = Network(steps=range(0, 40, 10))
    assert only(noise.batches_not_random(stream(few, [np.nan, 9.0, 9.0, 9.0]).record())).verdict is UNDECIDED
    nodes = {step: 100 + step for step in range(0, 100, 10)}
    found = only(noise.batches_not_random(stream(Network(), [np.nan, *[9.0] * 9], nodes).record()))
    assert (found.verdict, "10 different lengths" in found.message) == (UNDECIDED, True)
    assert noise.batches_not_random(Network().record()) == []


@pytest.mark.parametrize(
    ("square", "verdict", "words"),
    [(3.0, OK, "batch of 64 ± "), (1.1, NOTE, "A batch of about 3"), (41.0, NOTE, "A larger batch"), (21.0, OK, "640")],
)
def test_the_noise_scale_is_compared_with_the_batch(square, verdict, words):
    record = gradient(Network(), 1.0, square, 32.0, errors=(0.01, 0.01)).record()
    found = only(noise.gradient_noise(record))
    assert found.verdict is verdict
    assert words in found.message + found.remedy


def test_a_scale_that_its_error_swallows_is_no_advice():
    found = only(noise.gradient_noise(gradient(Network(), 1.0, 1.1, 32.0, errors=(0.1, 0.1)).record()))
    assert (found.verdict, "beyond half of it" in found.message) == (UNDECIDED, True)


def test_a_scale_without_an_upper_end():
    found = only(noise.gradient_noise(gradient(Network(), 0.1, 4.0, 32.0).record()))
    assert (found.verdict, "395 or more" in found.message) == (OK, True)
    found = only(noise.gradient_noise(gradient(Network(), 0.1, 40.0, 32.0).record()))
    assert found.verdict is NOTE


def test_a_signal_below_zero_gives_no_batch_size():
    found = only(noise.gradient_noise(gradient(Network(), -1.0, 4.0, 32.0, errors=(0.1, 0.1)).record()))
    assert (found.verdict, "cannot be told from zero" in found.message) == (UNDECIDED, True)


def test_the_noise_scale_needs_a_problem_or_micro_batches():
    found = only(noise.gradient_noise(Network().record()))
    assert (found.verdict, "problem=" in found.remedy) == (UNDECIDED, True)
    found = only(noise.gradient_noise(gradient(Network(), np.nan, np.nan).record()))
    assert (found.verdict, "problem=" in found.remedy) == (UNDECIDED, False)


@pytest.mark.parametrize("diagnostic", ALL)
def test_an_empty_record_has_no_noise(diagnostic):
    assert diagnostic(Store(None, "empty", {}).record()) == []


# ---- whole runs ------------------------------------------------------------------------------------------------------


def trained(order, batch=16, norm=nn.BatchNorm1d):
    """Train on 2048 samples of eight classes; `order` turns labels and a generator into positions."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(2048) % 8
    x = torch.randn(2048, 24, generator=draw) + torch.randn(8, 24, generator=draw)[labels]
    model = nn.Sequential(nn.Linear(24, 16), norm(16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    positions = order(labels, draw)
    held = ns.Problem(model, nn.functional.cross_entropy, [(x[:256], labels[:256])])
    with ns.attach(model, optimizer, every=4, problem=held) as scope:
        for start in range(0, 60 * batch, batch):
            here = positions[start : start + batch]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[here]), labels[here]).backward()
            optimizer.step()
    return {f.id: f for f in scope.findings() if f.subject == "noise"}


def shuffled(labels, draw):
    return torch.randperm(len(labels), generator=draw)


def by_class(labels, draw):
    return torch.argsort(labels, stable=True)


def repeated(labels, draw):
    return torch.randint(len(labels), (len(labels) // 8,), generator=draw).repeat_interleave(8)


def test_a_healthy_run_has_no_warning():
    found = trained(shuffled)
    assert {f.verdict for f in found.values()} <= {OK, NOTE}
    assert found["noise.small-batch"].evidence["moved"] == pytest.approx(0.31, abs=0.05)
    assert found["noise.batches-not-random"].evidence["ratio"] == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("order", [by_class, repeated])
def test_a_run_on_sorted_or_repeated_data_is_found(order):
    assert trained(order)["noise.batches-not-random"].verdict is WARNING


def test_a_run_with_batches_of_four_is_found():
    found = trained(shuffled, batch=4)
    assert found["noise.small-batch"].verdict is WARNING


def test_a_run_that_whitens_as_many_features_as_samples_is_found():
    found = trained(shuffled, norm=lambda width: ns.norms.build("decorrelated-batch", width, groups=1))
    assert found["noise.whitening-batch"].verdict is WARNING
    assert "singular" in found["noise.whitening-batch"].message
