"""The noise scale against per-sample gradients in float64, a quadratic of known noise, and accumulated gradients."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.metrics import noise as metrics
from normscope.norms import find_norms
from normscope.probes import noise_scale
from tests.checks import bits

LOSS = nn.functional.mse_loss


class Quadratic(nn.Module):
    """Gradient of sample x is w - x, so that tr(Sigma) and |G|^2 are those of the data."""

    def __init__(self, d):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d, dtype=torch.float64))

    def forward(self, x):
        return self.w - x


def half_square(output, target):
    return 0.5 * output.square().sum(1).mean()


def data(n, d, mean, deviation, seed):
    return mean + deviation * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(problem, batch=8):
    (row,) = noise_scale.measure(problem, find_norms(problem.model), batch)["noise"]
    return dict(zip(row.stats, row.values, strict=True))


def test_a_quadratic_of_known_noise():
    d, mean, deviation = 50, 0.3, 2.0
    trace, signal = d * deviation**2, d * mean**2
    found = []
    for seed in range(200):
        model = Quadratic(d)
        found.append(
            measured(ns.Problem(model, half_square, [(data(256, d, mean, deviation, seed), torch.zeros(256))]))
        )
    chunk = found[0]["chunk"]
    signals, squares = (np.array([f[name] for f in found]) for name in ("signal", "square"))
    error = signals.std() / len(found) ** 0.5
    assert chunk == 32
    assert abs(signals.mean() - signal) < 4 * error
    assert squares.mean() == pytest.approx(signal + trace / chunk, rel=0.03)
    assert chunk * (squares.mean() / signals.mean() - 1) == pytest.approx(trace / signal, rel=0.1)
    for name, values in (("signal_error", signals), ("square_error", squares)):  # claimed against real spread
        assert np.mean([f[name] for f in found]) == pytest.approx(values.std(), rel=0.25)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)).double()


def test_against_gradients_of_single_samples():
    model = small_net()
    x, t = data(256, 5, 0.5, 1.0, 1), data(256, 2, 1.0, 0.5, 2)
    each = []
    for i in range(256):
        found = torch.autograd.grad(LOSS(model(x[i : i + 1]), t[i : i + 1]), list(model.parameters()))
        each.append(torch.cat([g.reshape(-1) for g in found]))
    each = torch.stack(each)
    trace = float(each.var(0).sum())
    signal = float(each.mean(0).square().sum()) - trace / 256
    found = []
    for seed in range(40):  # over many ways to cut the same samples, the mean of the estimate is that of all of them
        order = torch.randperm(256, generator=torch.Generator().manual_seed(seed))
        found.append(measured(ns.Problem(model, LOSS, [(x[order], t[order])])))
    signals, squares = (np.array([f[name] for f in found]) for name in ("signal", "square"))
    assert abs(signals.mean() - signal) < 4 * signals.std() / len(found) ** 0.5
    assert 32 * (squares.mean() / signals.mean() - 1) == pytest.approx(trace / signal, rel=0.1)


def test_chunks_are_equal_and_of_the_training_size_where_a_layer_crosses_the_batch():
    batches = [(torch.zeros(100, 3), {"t": torch.zeros(100)}, 7) for _ in range(3)]
    parts, size = noise_scale.chunks(batches, 1)
    assert (len(parts), size) == (8, 32)
    assert {(p[0].shape[0], p[1]["t"].shape[0], p[2]) for p in parts} == {(32, 32, 7)}
    assert [noise_scale.chunks(batches, wanted)[1] for wanted in (40, 64, 500)] == [40, 64, 64]
    assert noise_scale.chunks([(torch.zeros(2, 1),)], 1) == ([], 0)


class Words(nn.Module):
    """A language model whose output is flattened, as its target is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, x):
        return self.head(self.table(x)).flatten(0, 1)


def test_flattened_targets_are_cut_with_their_samples():
    x = torch.randint(7, (64, 12), generator=torch.Generator().manual_seed(0))
    parts, size = noise_scale.chunks([(x, x.flatten(), torch.ones(1), 0.5)], 1)
    assert (len(parts), size) == (8, 8)
    assert all(torch.equal(part[1], part[0].flatten()) for part in parts)
    assert torch.equal(torch.cat([part[0] for part in parts]), x)
    assert {(len(part[2]), part[3]) for part in parts} == {(1, 0.5)}
    model = Words().double()
    found = measured(ns.Problem(model, nn.functional.cross_entropy, [(x, x.flatten())]))
    each = []
    for i in range(0, 64, 8):
        loss = nn.functional.cross_entropy(model(x[i : i + 8]), x[i : i + 8].flatten())
        each.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
    products = torch.stack(each) @ torch.stack(each).T
    assert found["signal"] == pytest.approx(float(products.sum() - products.trace()) / 56, rel=1e-6)


@dataclass
class Pair:
    x: torch.Tensor


@pytest.mark.parametrize(
    "other", [torch.zeros(100), torch.zeros(2, 64), Pair(torch.zeros(64)), torch.eye(64).to_sparse()]
)
def test_a_batch_whose_samples_cannot_be_told_apart_gives_no_row(other):
    assert noise_scale.chunks([(torch.zeros(64, 3), other)], 1) == ([], 0)
    problem = ns.Problem(nn.Linear(3, 2), lambda output, _: output.square().mean(), [(torch.randn(64, 3), other)])
    assert noise_scale.measure(problem, {}, 8) == {}


def test_a_large_model_is_measured_on_some_of_its_elements(monkeypatch):
    draw, x = torch.zeros(256), data(256, 400, 0.3, 2.0, 5)
    whole = measured(ns.Problem(Quadratic(400), half_square, [(x, draw)]))
    monkeypatch.setattr(noise_scale, "KEPT", 100)
    some = measured(ns.Problem(Quadratic(400), half_square, [(x, draw)]))
    assert some["square"] == pytest.approx(whole["square"], rel=0.1)
    assert some["square"] != whole["square"]


def test_too_few_samples_give_no_row():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    problem = ns.Problem(model, LOSS, [(torch.randn(4, 3), torch.randn(4, 3))])
    assert noise_scale.measure(problem, find_norms(model), 4) == {}


def test_nothing_is_disturbed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    model[0].weight.grad = torch.ones(4, 4)
    before = [bits(t) for t in (*model.state_dict().values(), torch.get_rng_state())]
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    assert measured(ns.Problem(model, LOSS, [(x, x)]), 16)["chunk"] == 16
    assert [bits(t) for t in (*model.state_dict().values(), torch.get_rng_state())] == before
    assert [p.grad is None for p in model.parameters()] == [False] + [True] * 5
    assert float(model[0].weight.grad.sum()) == 16


def accumulate(steps, parts, size, d=50, mean=0.3, deviation=2.0, clip=False):
    model = Quadratic(d)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    draw = torch.Generator().manual_seed(0)
    with ns.attach(model, optimizer, every=1) as scope:
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(parts):
                x = mean + deviation * torch.randn(size, d, generator=draw, dtype=torch.float64)
                (half_square(model(x), None) / parts).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
    return scope.record()


@pytest.mark.parametrize("clip", [False, True])
def test_micro_batches_give_it_for_free(clip):
    record = accumulate(200, 4, 8, clip=clip)
    signal, square = (record.series("/output", name, role="gradient") for name in ("signal", "square"))
    assert len(signal) == 200
    assert 8 * (square.mean() / signal.mean() - 1) == pytest.approx(200 / 4.5, rel=0.15)  # tr / |G|^2
    scale = metrics.scale(record)
    assert scale.micro
    assert abs(scale.estimate.value - 200 / 4.5) < 4 * scale.estimate.standard_error


@pytest.mark.parametrize("parts", [1, 2])
def test_one_or_two_backwards_are_too_few(parts):
    record = accumulate(3, parts, 8)
    assert not [b for b in record.blocks if b.role == "gradient" and "signal" in b.stats]


class Pairs(nn.Module):
    """A layer that takes whole pairs of samples alone, four of them at least."""

    def forward(self, x):
        if len(x) < 8:
            raise ValueError("fewer than four pairs")
        return x


def test_a_model_that_takes_no_part_of_a_batch_is_not_measured():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), Pairs())
    batches = [(torch.randn(8, 3), torch.randn(8, 3)) for _ in range(2)]
    record = ns.examine(model, nn.functional.mse_loss, batches, probes="noise-scale")
    (event,) = record.events.itertuples()
    assert event.kind == "note"
    assert "noise-scale cannot be measured here: the model does not run on a part of a batch" in event.message


def test_a_diverged_model_has_no_noise_scale():
    found = noise_scale.agreement(np.full((4, 4), np.inf))
    assert np.isnan(found["signal_error"])
