"""SND against closed forms, its law, exact zeros, and what must not be disturbed."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.errors import ArgumentError
from normscope.core.estimate import Status
from normscope.norms import Batch, Norm, Whiten
from tests.checks import bits

D = 16


def gaussian(n=8192, d=D, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def whitened(method):
    return Norm(Batch(), Whiten(method=method), num_features=D)


CLOSED = {
    "batch": (lambda: nn.BatchNorm1d(D), lambda b: math.sqrt(1.5 * D / b)),
    "zca": (lambda: whitened("zca"), lambda b: math.sqrt((D + D * (D + 1) / 4) / b)),
    "cholesky": (lambda: whitened("cholesky"), lambda b: math.sqrt((D + D**2 / 2) / b)),
    "pca": (lambda: whitened("pca"), lambda b: math.sqrt(D)),
}


@pytest.mark.parametrize("method", CLOSED)
@pytest.mark.parametrize("batch", [256, 1024])
def test_closed_forms_for_gaussian_input(method, batch):
    make, form = CLOSED[method]
    found = ns.snd(make(), gaussian(), batch, 60)
    assert found.value == pytest.approx(form(batch), rel=0.1)
    assert 0 < found.standard_error < 0.05 * found.value
    assert (found.n, found.unit, found.status) == (64, "output", Status.SAMPLED)


def test_the_standard_error_is_the_spread_over_other_points():
    values = [
        ns.snd(nn.BatchNorm1d(D), gaussian(), 128, 40, generator=torch.Generator().manual_seed(seed)).value
        for seed in range(12)
    ]
    claimed = ns.snd(nn.BatchNorm1d(D), gaussian(), 128, 40).standard_error
    assert 0.4 < np.std(values, ddof=1) / claimed < 2.0


def test_noise_falls_with_the_root_of_the_batch_size():
    found = [ns.snd(nn.BatchNorm1d(D), gaussian(), batch, 40).value for batch in (64, 256, 1024)]
    assert found[0] / found[1] == pytest.approx(2, rel=0.05)
    assert found[1] / found[2] == pytest.approx(2, rel=0.05)


def test_few_draws_do_not_make_it_small():
    few, many = (ns.snd(nn.BatchNorm1d(D), gaussian(), 64, draws) for draws in (3, 100))
    assert few.value == pytest.approx(many.value, abs=4 * few.standard_error)


def test_it_is_the_definition_written_out():
    """A loop over batches that hold one sample at a time, in numpy."""
    x, rng, batch, draws = gaussian(2000).double().numpy(), np.random.default_rng(0), 8, 200
    each = []
    for i in range(64):
        others = x[rng.integers(len(x), size=(draws, batch - 1))]
        group = np.concatenate((np.broadcast_to(x[i], (draws, 1, D)), others), axis=1)
        y = (x[i] - group.mean(1)) / np.sqrt(group.var(1) + 1e-5)
        each.append(np.linalg.norm(y - y.mean(0), axis=1).mean())
    found = ns.snd(nn.BatchNorm1d(D), torch.from_numpy(x).float(), batch, draws)
    error = math.hypot(found.standard_error, np.std(each) / 8)
    assert abs(found.value - np.mean(each)) < 4 * error
    assert error < 0.02 * found.value


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm(6), (6,)),
        (nn.RMSNorm(6), (6,)),
        (nn.GroupNorm(2, 6), (6, 5, 5)),
        (nn.InstanceNorm2d(6), (6, 5, 5)),
        (nn.Identity(), (6,)),
        (nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Dropout(0.5)), (6,)),
        (torch.tanh, (6,)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_exactly_zero_where_the_batch_does_not_matter(norm, shape):
    x = torch.randn(100, *shape, generator=torch.Generator().manual_seed(2))
    found = ns.snd(norm, x, 32, 5)
    assert (found.value, found.standard_error) == (0.0, 0.0)


def test_the_affine_map_is_left_out_and_a_model_keeps_its_own():
    norm = nn.BatchNorm1d(D)
    plain = ns.snd(norm, gaussian(), 64, 10).value
    with torch.no_grad():
        norm.weight.fill_(3.0)
        norm.bias.fill_(7.0)
    assert ns.snd(norm, gaussian(), 64, 10).value == plain
    assert ns.snd(nn.Sequential(norm), gaussian(), 64, 10).value == pytest.approx(3 * plain, rel=1e-5)


def test_dropout_beside_a_norm_adds_nothing():
    found = [ns.snd(nn.Sequential(nn.BatchNorm1d(D), *more), gaussian(), 64, 10).value for more in ((), [nn.Dropout()])]
    assert found[0] == found[1]


def test_random_layers_of_ones_own_use_the_same_numbers_in_every_draw():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    assert ns.snd(Noisy(), gaussian(200), 16, 5).value == 0


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_disturbed(training):
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout(0.5)).train(training)
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    modes, states = [m.training for m in model.modules()], (torch.get_rng_state(), np.random.get_state()[1].copy())
    python, versions = random.getstate(), [p._version for p in [*model.parameters(), *model.buffers()]]
    for norm, x in ((model, gaussian(300)), (model[1], gaussian(300))):
        ns.snd(norm, x, 32, 4)
    assert {k: bits(v) for k, v in model.state_dict().items()} == {k: bits(v) for k, v in before.items()}
    assert [m.training for m in model.modules()] == modes
    assert bits(torch.get_rng_state()) == bits(states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == python
    assert [p._version for p in [*model.parameters(), *model.buffers()]] == versions
    assert all(p.grad is None for p in model.parameters())


def test_equal_calls_give_equal_numbers_and_a_generator_others():
    first, again = (ns.snd(nn.BatchNorm1d(D), gaussian(), 64, 5) for _ in range(2))
    assert first == again
    other = ns.snd(nn.BatchNorm1d(D), gaussian(), 64, 5, generator=torch.Generator().manual_seed(7))
    assert other.value != first.value


def test_what_is_not_finite_says_so():
    x = gaussian(50)
    x[3] = math.nan
    assert ns.snd(nn.BatchNorm1d(D), x, 16, 3).status is Status.NON_FINITE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bn", gaussian(8), 4, 2), "norm='bn' must be a torch.nn.Module or a function"),
        ((nn.Identity(), [1.0], 4, 2), "samples=list must be a floating-point tensor"),
        ((nn.Identity(), torch.zeros(8), 4, 2), r"samples=\(8,\) must be a floating-point tensor \[N, ...\]"),
        ((nn.Identity(), torch.zeros(8, 2).long(), 4, 2), r"samples=\(8, 2\) must be a floating-point tensor"),
        ((nn.Identity(), torch.zeros(1, 2), 4, 2), "samples holds 1, too few to draw batches from"),
        ((nn.Identity(), gaussian(8), 1, 2), "batch_size=1 must be a whole number, at least 2; try batch_size=64"),
        ((nn.Identity(), gaussian(8), 4.0, 2), "batch_size=4.0 must be a whole number"),
        ((nn.Identity(), gaussian(8), 4, True), "draws=True must be a whole number"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        ns.snd(*arguments)
