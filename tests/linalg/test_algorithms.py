"""Eigenpairs, spectrum, trace and diagonal against dense matrices and known spectra."""

import contextlib
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance
from torch import nn

import normscope as ns
from normscope.core.estimate import Status
from normscope.linalg.extremal import extremal
from tests.linalg.models import make, quadratic

LOSS = F.cross_entropy
ORDER = {"LA": lambda x: -x, "SA": lambda x: x, "LM": lambda x: -np.abs(x)}


@pytest.fixture(scope="module")
def network():
    """A conv-BN network of 1,486 parameters after a little training: its Problem, dense Hessian and eigenvalues."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).double()  # fmt: skip
    centers = torch.randn(10, 1, 8, 8, dtype=torch.float64)
    y = torch.arange(20) % 10
    x = centers[y] + 0.3 * torch.randn(20, 1, 8, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    problem = ns.Problem(model, LOSS, [(x, y)])
    operator = problem.operator()
    matrix = operator.matmat(torch.eye(operator.size, dtype=torch.float64)).numpy()
    return problem, matrix, np.linalg.eigvalsh(matrix)


def test_top_ten_after_sixty_steps(network):
    problem, matrix, values = network
    found = ns.eigenpairs(problem, 10, "LM", tol=1e-6, max_matvecs=60)
    expected = values[np.argsort(-abs(values))][:10]
    np.testing.assert_allclose(found.values, expected, rtol=1e-9)
    assert found.matvecs <= 60
    vectors = found.vectors.numpy()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(10), atol=1e-12)
    residuals = np.linalg.norm(matrix @ vectors - vectors * found.values, axis=0)
    np.testing.assert_allclose(found.residuals, residuals, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("which", ORDER)
@pytest.mark.parametrize("options", [{}, {"max_basis": 22}, {"verify": True}])
def test_default_tolerance_is_kept(network, which, options):
    problem, matrix, values = network
    found = ns.eigenpairs(problem, 10, which, **options)
    expected = values[np.argsort(ORDER[which](values))][:10]
    np.testing.assert_allclose(found.values, expected, rtol=1e-3)
    assert found.converged.all()
    residuals = np.linalg.norm(matrix @ found.vectors.numpy() - found.vectors.numpy() * found.values, axis=0)
    np.testing.assert_allclose(found.residuals, residuals, rtol=1e-4, atol=1e-11)
    assert (residuals <= 1e-3 * abs(found.values)).all()


def test_the_budget_ends_the_search(network):
    found = ns.eigenpairs(network[0], 10, tol=1e-12, max_matvecs=20)
    assert found.matvecs == 20
    assert not found.converged.all()
    assert "of 10 converged to 1e-12, 20 matvecs" in repr(found)
    assert found.frame().columns.tolist() == ["pair", "value", "residual", "converged"]


def test_pyhessian_agrees(network):
    problem, _, values = network
    found = ns.eigenpairs(problem, 2, "LM", tol=1e-6, engine="pyhessian")
    np.testing.assert_allclose(found.values, values[np.argsort(-abs(values))][:2], rtol=1e-3)
    assert (found.residuals < 0.05 * abs(found.values)).all()
    trace = ns.trace(problem, 60, engine="pyhessian")
    assert abs(trace.value - values.sum()) < 4 * trace.standard_error


def test_single_precision(network):
    problem, _, values = network
    single = ns.Problem(problem.model, LOSS, [(x.float(), y) for x, y in problem.batches], dtype=torch.float32)
    found = ns.eigenpairs(single, 5)
    assert found.vectors.dtype == torch.float32
    np.testing.assert_allclose(found.values, values[::-1][:5], rtol=1e-3)


@pytest.mark.parametrize("which", ORDER)
@pytest.mark.parametrize("basis", [None, 12])
@pytest.mark.parametrize(
    "eigenvalues",
    [
        [1.0, -1.0] * 20,  # two invariant directions
        [5.0] * 3 + [3.0] * 2 + [1.0] * 35,
        [0.0] * 40 + [2.0, 7.0, 7.0],  # rank-deficient
        [0.0] * 30,
        [*range(-20, 20)],  # indefinite
        [3.0, 2.0, 1.0, 0.5, -4.0],  # k = size
    ],
)
def test_known_spectra(eigenvalues, basis, which):
    problem, matrix = quadratic([float(x) for x in eigenvalues])
    found = ns.eigenpairs(problem, 5, which, tol=1e-8, max_basis=basis)
    expected = np.array(sorted(eigenvalues, key=ORDER[which])[:5], dtype=float)
    assert found.converged.all()
    shown = np.sort(abs(found.values) if which == "LM" else found.values)
    np.testing.assert_allclose(shown, np.sort(abs(expected) if which == "LM" else expected), atol=1e-10)
    np.testing.assert_allclose(matrix @ found.vectors, found.vectors.numpy() * found.values, atol=1e-6)


def test_copies_are_found_when_asked_for():
    problem, _ = quadratic([4.0] * 4 + list(np.linspace(-2, 3, 150)))
    found = ns.eigenpairs(problem, 5, tol=1e-6, verify=True, max_matvecs=400)
    np.testing.assert_allclose(found.values, [4, 4, 4, 4, 3], rtol=1e-6)
    assert found.converged.all()


def test_the_basis_is_capped():
    problem, _ = quadratic(list(np.linspace(0, 1, 300) ** 3))
    operator = problem.operator()
    rows = []
    original = torch.Tensor.new_empty

    def counted(self, *shape, **options):
        rows.append(shape[0])
        return original(self, *shape, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", counted)
        found = extremal(operator, 3, "LA", 1e-6, max_basis=10, max_matvecs=300)
        ns.spectrum(problem, method="slq", steps=25, probes=1)
    assert rows == [11, 26]
    assert found.converged.all()
    assert found.matvecs > 10


# ---- spectrum --------------------------------------------------------------------------------------------------------


def distance(found, values):
    return wasserstein_distance(found.nodes, values, found.weights) / (values[-1] - values[0])


def test_the_exact_spectrum_of_a_small_problem():
    model, batch = make("batch")
    problem = ns.Problem(model, LOSS, [batch])
    found, operator = ns.spectrum(problem), problem.operator()
    values = np.linalg.eigvalsh(operator.matmat(torch.eye(operator.size, dtype=torch.float64)).numpy())
    np.testing.assert_allclose(found.nodes, values, atol=1e-12)
    assert found.exact
    assert found.moment(1).value * found.size == pytest.approx(values.sum())
    assert found.moment(2).status is Status.EXACT


def test_quadrature_is_near_the_exact_spectrum(network):
    problem, _, values = network
    apart = [distance(ns.spectrum(problem, method="slq", steps=60, probes=1, seed=s), values) for s in range(3)]
    assert np.median(apart) < 6e-3
    found = ns.spectrum(problem, method="slq", steps=40, probes=4)
    assert found.matvecs == 160
    assert found.weights.sum() == pytest.approx(1)
    assert found.bounds == pytest.approx((values[0], values[-1]), rel=1e-4)
    for order in (1, 2, 3):
        moment = found.moment(order)
        assert abs(moment.value - np.mean(values**order)) < 5 * moment.standard_error
    assert found.frame()["probe"].nunique() == 4


def test_density_follows_its_definition():
    problem, matrix = quadratic([0.0] * 50 + [1.0] * 30 + [40.0] * 20)
    found = ns.spectrum(problem, method="slq", steps=20, probes=8)
    assert len(found.nodes) == 24  # each probe ends in an invariant subspace, with the eigenvalues as nodes
    assert found.variance == pytest.approx(1e-5 * 40)
    points = np.array([-0.02, 0.0, 1.01, 40.0])
    kernel = np.exp(-((points[:, None] - found.nodes) ** 2) / 8e-4) / np.sqrt(2 * np.pi * 4e-4)
    np.testing.assert_allclose(found.density(points), kernel @ found.weights, rtol=1e-6)
    assert np.trapezoid(found.density(), found.grid()) == pytest.approx(1)
    assert found.grid()[[0, -1]] == pytest.approx([-0.01, 40.01])
    share = found.weights[found.nodes > 20].sum()
    assert share == pytest.approx(0.2, abs=0.06)
    exact = ns.spectrum(problem)
    np.testing.assert_allclose(exact.nodes, np.linalg.eigvalsh(matrix), atol=1e-12)
    assert ns.spectrum(problem, method="slq", steps=3, probes=9, max_matvecs=7).matvecs == 6


# ---- trace and diagonal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces_lie_within_their_standard_errors(method):
    decay = [100 / (i + 1) ** 1.5 * (-1) ** (i % 3 == 0) for i in range(120)]
    problem, _ = quadratic(decay)
    found = [ns.trace(problem, 30, method, seed=seed) for seed in range(20)]
    scores = np.array([(f.value - sum(decay)) / f.standard_error for f in found])
    assert (abs(scores) < 3).sum() >= 18
    assert 0.5 < scores.std() < 2
    assert abs(scores.mean()) < 1
    spread = np.std([f.value for f in found])
    assert np.median([f.standard_error for f in found]) == pytest.approx(spread, rel=0.6)
    assert (found[0].n, found[0].status) == ({"hutchinson": 30, "hutch++": 10, "xtrace": 15}[method], Status.SAMPLED)


def test_sketches_pay_where_the_spectrum_decays():
    decay = [2.0 ** (-i / 2) for i in range(100)]
    problem, _ = quadratic(decay)
    errors = {
        method: np.median([abs(ns.trace(problem, 36, method, seed=s).value - sum(decay)) for s in range(10)])
        for method in ("hutchinson", "hutch++", "xtrace")
    }
    assert errors["hutch++"] < errors["hutchinson"] / 5
    assert errors["xtrace"] < errors["hutch++"]


def test_the_trace_of_a_network(network):
    problem, _, values = network
    found = [ns.trace(problem, 50, seed=seed) for seed in range(20)]
    assert all(abs(f.value - values.sum()) < 3 * f.standard_error for f in found)


@pytest.mark.parametrize("method", ["hutch++", "xtrace", "exact"])
@pytest.mark.parametrize("eigenvalues", [[0.0] * 50 + [2.0, 3.0, -7.0], [1.0, 2.0, 3.0], [0.0] * 20])
def test_traces_are_exact_where_the_sketch_holds_all(method, eigenvalues):
    problem, _ = quadratic(eigenvalues)
    found = ns.trace(problem, 30, method)
    assert found.value == pytest.approx(sum(eigenvalues), abs=1e-10)
    assert (found.standard_error, found.status) == (0.0, Status.EXACT)


def test_the_diagonal(network):
    problem, matrix, _ = network
    found = ns.diagonal(problem, 40)
    scores = (found.values - matrix.diagonal()) / np.maximum(found.standard_errors, 1e-12)
    assert np.median(abs(scores)) == pytest.approx(0.68, abs=0.1)
    frame = found.frame()
    assert frame["parameter"].tolist() == list(problem.names)
    assert frame["size"].sum() == problem.size
    assert frame["mean"][0] == pytest.approx(found.values[:72].mean())


def test_layers(network):
    problem, matrix, _ = network
    found = ns.layerwise(problem, 40).set_index("layer")
    assert found.index.tolist() == ["0", "1", "3", "4", "8"]
    assert found["size"].tolist() == [80, 16, 1168, 32, 170]
    ends = np.cumsum([0, *found["size"]])
    for (_, row), a, b in zip(found.iterrows(), ends, ends[1:], strict=False):
        block = matrix[a:b, a:b]
        assert row["eigenvalue"] == pytest.approx(np.linalg.eigvalsh(block)[-1], rel=1e-3)
        assert abs(row["trace"] - block.trace()) < 4 * row["trace_standard_error"]
        assert row["converged"]


def test_progress_is_shown_when_asked_for():
    problem, _ = quadratic([1.0, 2.0, 3.0])
    shown, hidden = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(shown):
        ns.trace(problem, 10, progress=True)
    with contextlib.redirect_stderr(hidden):
        ns.trace(problem, 10)
    assert "trace" in shown.getvalue()
    assert hidden.getvalue() == ""


def test_the_same_seed_gives_the_same_numbers():
    problem, _ = quadratic(list(np.linspace(-1, 1, 40)))
    for call in (lambda s: ns.trace(problem, 8, seed=s).value, lambda s: ns.diagonal(problem, 4, seed=s).values[0]):
        assert call(1) == call(1)
        assert call(1) != call(2)
