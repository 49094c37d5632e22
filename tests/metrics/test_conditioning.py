"""Condition numbers, effective ranks and the Kronecker estimate against dense float64 references."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normscope as ns
from normscope.core.errors import ArgumentError
from normscope.core.estimate import Status
from normscope.core.store import Store
from normscope.metrics import conditioning

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(model, make, steps=1, every=1, lr=0.01, loss=F.cross_entropy, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr)
    with ns.attach(model, optimizer, every=every, probes="covariance", **options) as scope:
        for _ in range(steps):
            x, y = make()
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return scope.record()


def batch(samples=200, width=8, classes=5):
    return torch.randn(samples, width, generator=GENERATOR), torch.randint(classes, (samples,), generator=GENERATOR)


@pytest.fixture(scope="module")
def record():
    torch.manual_seed(0)
    layers = [m for _ in range(7) for m in (nn.Linear(8, 8), nn.Tanh())]
    return run(nn.Sequential(*layers, nn.Linear(8, 5)), batch, steps=12)


@pytest.mark.parametrize(
    ("percent", "value"), [(50, 5.0), (80, 50.0), (90, 100.0), (95, 100.0), (100, 100.0), (1, 1.0)]
)
def test_the_condition_number_is_of_the_percentage_asked_for(percent, value):
    values = np.array([10.0, 9, 8, 5, 2, 1, 0.5, 0.2, 0.1, 0.1])
    found = conditioning.condition_number(values, percent, width=10, samples=50, rank=10)
    assert found.value == pytest.approx(values[0] / values[math.ceil(percent / 10) - 1])
    assert found.value == pytest.approx(value)
    assert found.status is Status.EXACT


def test_a_condition_number_that_does_not_exist_says_why():
    values = np.array([2.0, 1.0, 0.0, 0.0])
    few = conditioning.condition_number(values[:2], 100, width=4, samples=2, rank=2)
    flat = conditioning.condition_number(values, 100, width=4, samples=40, rank=2)
    broken = conditioning.condition_number(values * np.nan, 50, width=4, samples=40, rank=0)
    statuses = [found.status for found in (few, flat, broken)]
    assert statuses == [Status.FEW_SAMPLES, Status.RANK_DEFICIENT, Status.NON_FINITE]
    assert not any(found.usable for found in (few, flat, broken))


@pytest.mark.parametrize("factor", ["input", "gradient"])
@pytest.mark.parametrize("about", ["moment", "covariance"])
def test_stored_numbers_are_those_of_the_stored_eigenvalues(record, factor, about):
    kept = conditioning.spectra(record, factor=factor, about=about)
    ranks = conditioning.series(record, "rank", factor=factor, about=about)
    assert len(kept) == 8
    for site, (steps, values) in kept.items():
        for step, eigenvalues in zip(steps, values.astype(np.float64), strict=True):
            rank = int(ranks.loc[step, site])
            for percent in conditioning.PERCENTS:
                kappa = conditioning.condition_numbers(record, percent, factor=factor, about=about).loc[step, site]
                index = math.ceil(percent * len(eigenvalues) / 100)
                expected = eigenvalues[0] / eigenvalues[index - 1] if index <= rank else np.nan
                assert kappa == pytest.approx(expected, rel=1e-3, nan_ok=True)
            spread = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
            intrinsic = eigenvalues.sum() / eigenvalues[0]
            for kind, expected in (("participation", spread), ("intrinsic", intrinsic)):
                found = conditioning.effective_rank(record, kind=kind, factor=factor, about=about).loc[step, site]
                assert found == pytest.approx(expected, rel=1e-4)


def test_the_factor_of_a_classifiers_head_lacks_a_direction(record):
    frame = conditioning.conditions(record, 100, factor="gradient").set_index("site")
    assert frame.loc["14/output", "status"] is Status.RANK_DEFICIENT
    assert conditioning.series(record, "rank", factor="gradient")["14/output"].dropna().eq(4).all()


def test_too_few_samples_and_too_wide_layers_have_a_status_instead_of_a_number():
    torch.manual_seed(0)
    few = conditioning.conditions(run(nn.Sequential(nn.Linear(40, 5)), lambda: batch(20, 40)))
    assert few["status"].tolist() == [Status.FEW_SAMPLES]
    assert few["value"].isna().all()
    wide = run(nn.Sequential(nn.Linear(1500, 5)), lambda: batch(900, 1500))
    assert conditioning.conditions(wide)["status"].tolist() == [Status.NOT_ESTIMATED]
    assert (conditioning.series(wide, "error") > 0).all(axis=None)
    broken = run(nn.Sequential(nn.Linear(8, 5)), lambda: (batch()[0] * math.nan, batch()[1]))
    assert conditioning.conditions(broken)["status"].tolist() == [Status.NON_FINITE]


def per_sample_fisher(model, layer, x, y, loss=F.cross_entropy):
    """E[vec(dl/dW) vec(dl/dW)^T] over the samples, each gradient by a backward of its own, in float64."""
    model = model.double()
    gradients = []
    for sample, target in zip(x.double(), y, strict=True):
        model.zero_grad()
        loss(model(sample[None]), target[None]).backward()
        gradients.append(layer.weight.grad.flatten().numpy().copy())
    return sum(np.outer(g, g) for g in gradients) / len(gradients)


def test_the_kronecker_estimate_is_exact_where_input_and_gradient_are_independent():
    """Every input meets every output gradient once: the loss is linear in the output."""
    x, g = torch.randn(6, 4, generator=GENERATOR), torch.randn(5, 3, generator=GENERATOR)
    inputs, targets = x.repeat_interleave(5, 0), g.repeat(6, 1)
    model = nn.Sequential(nn.Linear(4, 3, bias=False))

    def loss(output, target):
        return (output * target).sum(1).mean()

    record = run(model, lambda: (inputs, targets), loss=loss)
    exact = np.linalg.eigvalsh(per_sample_fisher(model, model[0], inputs, targets, loss))[::-1]
    assert conditioning.fisher(record).loc[0, "0/output"] == pytest.approx(exact[0], rel=1e-4)
    assert conditioning.fisher(record, 100).loc[0, "0/output"] == pytest.approx(exact[0] / exact[-1], rel=1e-3)


def test_the_kronecker_estimate_is_within_a_factor_of_three_on_a_real_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 5))
    data = batch(300, 6)
    record = run(model, lambda: data, lr=0.0)
    for name in ("0", "2", "4"):
        exact = np.linalg.eigvalsh(per_sample_fisher(model, model.get_submodule(name), *data))[-1]
        estimate = conditioning.fisher(record).loc[0, f"{name}/output"]
        assert 1 / 3 < estimate / exact < 3
    assert conditioning.fisher(record).shape == (1, 3)


def test_rows_of_one_sample_add_up_in_the_kronecker_estimate():
    """Tokens whose inputs and gradients are uncorrelated: F = T S_x (x) S_g."""
    torch.manual_seed(0)
    x, signs = torch.randn(4000, 3, 2, generator=GENERATOR), torch.randn(4000, 3, 2, generator=GENERATOR)
    model = nn.Sequential(nn.Linear(2, 2, bias=False))

    def loss(output, target):
        return (output * target).sum((1, 2)).mean()

    record = run(model, lambda: (x, signs), loss=loss)
    gradients = torch.einsum("nto,nti->noi", signs, x).flatten(1).double().numpy()
    exact = np.linalg.eigvalsh(gradients.T @ gradients / len(gradients))[-1]
    assert conditioning.fisher(record).loc[0, "0/output"] == pytest.approx(exact, rel=0.1)


def test_balance_finds_the_layer_that_stands_out(record):
    found = conditioning.balance(record)
    last = conditioning.fisher(record).apply(lambda column: column.dropna().tail(3).median())
    assert found.ratio.n == 8
    assert found.site == last.idxmax()
    assert found.ratio.value == pytest.approx(last.max() / last.median(), rel=1e-6)


def test_the_first_layer_is_not_hidden_and_neither_is_one_beside_it():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.c(torch.tanh(self.a(x)) + self.b(x))

    torch.manual_seed(0)
    assert conditioning.hidden(run(Two(), batch)) == ["c/input"]


def test_collapse_compares_the_two_ends(record):
    rank = conditioning.effective_rank(record)
    first = rank.apply(lambda column: column.dropna().iloc[0])[1:]
    found = conditioning.collapse(record, start=True)
    assert found.ratio.value == pytest.approx(first.iloc[:3].median() / first.iloc[-3:].median())
    assert (found.first, found.last, found.ratio.n) == ("2/input", "14/input", 7)


def test_a_batch_of_few_samples_is_no_collapse():
    """Three samples vary along two directions at most, however many positions the first layers have."""
    torch.manual_seed(0)
    wide = [nn.Conv1d(8, 8, 3, padding=1) for _ in range(5)]
    narrow = [nn.Linear(8, 8) for _ in range(3)]
    model = nn.Sequential(*wide, nn.AdaptiveAvgPool1d(1), nn.Flatten(), *narrow, nn.Linear(8, 5))
    found = run(model, lambda: (torch.randn(3, 8, 32), torch.arange(3)))
    ends = conditioning.collapse(found, start=True)
    assert ends.at_first > 2.5 * ends.at_last
    assert ends.ratio.value == pytest.approx(2 / ends.at_last)


def test_a_record_without_second_moments_gives_nothing():
    empty = Store(None, "empty", {}).record()
    assert conditioning.conditions(empty).empty
    assert conditioning.fisher(empty).empty
    assert conditioning.spectra(empty) == {}
    assert conditioning.correlation(empty, "a/input").size == 0
    assert conditioning.balance(empty).ratio.status is Status.NOT_RECORDED
    assert conditioning.collapse(empty, start=True).ratio.status is Status.FEW_SAMPLES


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: conditioning.series(r, "max", factor="inputs"), "factor='inputs' is unknown; did you mean 'input'"),
        (
            lambda r: conditioning.series(r, "max", about="mean"),
            "about='mean' is unknown; .*Options: moment, covariance",
        ),
        (
            lambda r: conditioning.effective_rank(r, kind="stable"),
            "kind='stable' is unknown; .*participation, intrinsic",
        ),
    ],
)
def test_an_unknown_name_is_an_error(record, call, message):
    with pytest.raises(ArgumentError, match=message):
        call(record)


def test_correlations_come_back_as_a_matrix():
    model = nn.Sequential(nn.Linear(8, 5))
    data = batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with ns.attach(model, optimizer, every=1, probes=("covariance", "correlation")) as scope:
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    expected = np.corrcoef(data[0].double().numpy().T)
    assert conditioning.correlation(scope.record(), "0/input") == pytest.approx(expected, abs=1e-5)
